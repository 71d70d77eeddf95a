"""fastlora: the group, its lazy commands, and `fastlora info`."""

import importlib
import json
import platform
import subprocess
import sys

import click
import pytest
import torch

from fastlora.cli import info
from fastlora.cli.main import COMMANDS, main
from fastlora.tables import WIDTH


@pytest.mark.parametrize("name", COMMANDS)
def test_every_listed_command_exists(name):
    module, _, attribute = COMMANDS[name].partition(":")
    assert isinstance(getattr(importlib.import_module(module), attribute), click.Command)


def test_help_lists_every_command(fastlora_cli):
    result = fastlora_cli("--help")
    assert result.code == 0
    assert all(f"\n  {name} " in result.out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns(fastlora_cli, name):
    result = fastlora_cli(name, "--help")
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= WIDTH


def test_finetunes_help_names_the_schedule_and_where_else_to_go(fastlora_cli):
    """The numbers are those of learning_rate_at, which has a test."""
    text = fastlora_cli("finetune", "--help").text
    assert "a linear warm-up over the first tenth of the steps, then a cosine down to a tenth" in text
    assert "Trainer, TRL or axolotl" in text and "fastlora.integrations.peft.patch" in text


def test_no_arguments_show_help_and_fail(fastlora_cli):
    result = fastlora_cli()
    assert result.code == 2
    assert "Usage:" in result.err


@pytest.mark.parametrize(
    ("args", "words"),
    [(["tune-all"], "tune-all"), (["info", "--jsonn"], "--jsonn"), (["finetune", "--rank"], "--rank")],
)
def test_usage_error_is_one_line(fastlora_cli, args, words):
    result = fastlora_cli(*args)
    assert result.code == 2
    assert result.error_line.startswith("fastlora: error: ")
    assert words in result.error_line


def test_module_runs_as_a_script():
    command = [sys.executable, "-m", "fastlora.cli.main", "no-such-command"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2
    assert "no-such-command" in result.stderr


def test_interrupt_outside_of_training_exits_with_130(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(info, "collect", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        main(["info"])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err.strip() == "fastlora: interrupted"


def test_info_as_json(fastlora_cli):
    import fastlora

    result = fastlora_cli("info", "--json")
    assert result.code == 0
    report = json.loads(result.out)
    assert report["versions"]["python"] == platform.python_version()
    assert report["versions"]["torch"] == torch.__version__
    assert report["backends"] == fastlora.available_backends()
    assert report["backends"]["reference"] == "usable"
    assert (
        set(report["served_by"]["cpu"].values()) == set(report["served_by"]["cpu, dropout"].values()) == {"reference"}
    )
    assert [entry["device"] for entry in report["devices"]] == [
        "cpu",
        *(f"cuda:{index}" for index in range(torch.cuda.device_count())),
    ]


def test_info_says_who_serves_a_layer_by_dtype(fastlora_cli, monkeypatch):
    entry = {"device": "cuda:0", "name": "Imaginary"}
    monkeypatch.setattr(info, "device_list", lambda: [entry])
    monkeypatch.setattr(
        "fastlora.selection.why_unsupported",
        lambda name, spec: (
            "no compiler" if name in ("cuda", "triton") or (name == "composed" and spec.dropout) else None
        ),
    )
    shown = fastlora_cli("info").text
    assert "cuda:0 bfloat16 composed, float16 composed, float32 composed, float64 composed" in shown
    assert "cuda:0, dropout bfloat16 reference, float16 reference, float32 reference, float64 reference" in shown


def test_info_as_text_names_each_backend_and_its_reason(fastlora_cli):
    import fastlora

    result = fastlora_cli("info")
    assert result.code == 0
    assert max(map(len, result.out.splitlines())) <= WIDTH
    for name, reason in fastlora.available_backends().items():
        assert f" {name} {reason} " in result.text


def test_info_shows_the_environments_backend_and_refuses_nonsense(fastlora_cli, monkeypatch):
    monkeypatch.delenv("FASTLORA_BACKEND", raising=False)
    assert "FASTLORA_BACKEND not set: the best backend serves each call" in fastlora_cli("info").text
    monkeypatch.setenv("FASTLORA_BACKEND", "reference")
    result = fastlora_cli("info", "--json")
    assert result.code == 0 and json.loads(result.out)["environment"] == {"FASTLORA_BACKEND": "reference"}
    states = {"cuda": "no CUDA device", "reference": "usable"}
    collected = info.collect() | {"backends": states, "environment": {"FASTLORA_BACKEND": "cuda"}}
    with monkeypatch.context() as patch:
        patch.setattr(info, "collect", lambda: collected)
        result = fastlora_cli("info")
    assert result.code == 0
    assert "FASTLORA_BACKEND cuda: no other serves a call, and here it is no CUDA device" in result.text
    monkeypatch.setenv("FASTLORA_BACKEND", "cublas")
    result = fastlora_cli("info")
    assert result.code == 2
    assert "FASTLORA_BACKEND is 'cublas': choose one of cuda, triton, composed, reference" in result.error_line
    assert "'cublas', which is no backend" in result.text


def test_info_fails_where_a_required_backend_is_not_usable(fastlora_cli, monkeypatch):
    states = {"cuda": "compiled for compute capability 9.0, this device has 8.0", "triton": "usable"}
    collected = info.collect() | {"backends": states}
    monkeypatch.setattr(info, "collect", lambda: collected)
    assert fastlora_cli("info", "--require", "triton").code == 0
    result = fastlora_cli("info", "--json", "--require", "cuda, triton")
    assert result.code == 2 and result.error_line.endswith(f"required, but not usable: cuda: {states['cuda']}")
    assert json.loads(result.out)["backends"] == states
    result = fastlora_cli("info", "--require", "cublas")
    assert result.code == 2 and "no backend 'cublas'" in result.error_line


def test_info_names_a_device_that_cannot_be_asked(fastlora_cli, monkeypatch):
    def fail(index):
        raise RuntimeError("CUDA error: devices are busy\nmore")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", fail)
    result = fastlora_cli("info", "--json")
    assert json.loads(result.out)["devices"][1] == {"device": "cuda:0", "problem": "CUDA error: devices are busy"}


def test_info_reports_what_is_not_installed(monkeypatch, fastlora_cli):
    monkeypatch.setattr(info, "PACKAGES", (*info.PACKAGES, "no-such-package"))
    monkeypatch.setattr(info, "COMPILERS", ("no-such-compiler",))
    result = fastlora_cli("info", "--json")
    versions = json.loads(result.out)["versions"]
    assert versions["no-such-package"] is None
    assert versions["no-such-compiler"] is None
    lines = [line.split() for line in fastlora_cli("info").out.splitlines()]
    assert ["no-such-package", "none"] in lines
    assert ["no-such-compiler", "none"] in lines


def test_compiler_version_is_the_release_line(tmp_path, monkeypatch):
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\necho 'a compiler'\necho 'Copyright'\necho 'release 13.0, V13.0.1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert info.compiler_version("nvcc") == f"release 13.0, V13.0.1 ({program})"
