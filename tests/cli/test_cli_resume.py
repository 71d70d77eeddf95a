"""fastlora finetune interrupted and resumed: the same losses and files, bit for bit."""

import contextlib
import json
import signal
import subprocess
import sys
import time

import pytest

from fastlora.finetune import loop, runner
from fastlora.finetune.interrupt import SIGNALS, Interrupted, Interruption
from fastlora.finetune.state import FILE_NAME

ADAPTER = "adapter/adapter_model.safetensors"
START_TIMEOUT_S = 120


def losses(directory):
    runs = json.loads((directory / "report.json").read_text())["runs"]
    return {name: run["losses"] for name, run in runs.items()}


@pytest.fixture
def interrupt_in_step(monkeypatch):
    """Makes the n-th training step of the next run receive a signal in its middle."""

    def arrange(n, number=signal.SIGINT):
        count = 0
        step = loop._step

        def interrupted_step(*args):
            nonlocal count
            count += 1
            if count == n:
                signal.raise_signal(number)
            return step(*args)

        monkeypatch.setattr(loop, "_step", interrupted_step)

    yield arrange


@pytest.mark.parametrize(
    ("options", "stops"),
    [
        (["--dropout", 0.3], [1, 3]),
        (["--compare", "peft"], [2]),
        (["--compare", "peft", "--dropout", 0.3], [8]),  # the second step of PEFT's run
    ],
    ids=["twice", "first-run", "second-run"],
)
def test_resumed_run_equals_the_uninterrupted_one(finetune, fastlora_cli, interrupt_in_step, tmp_path, options, stops):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert finetune(*options, "--output", whole).code == 0
    for index, stop in enumerate(stops):
        interrupt_in_step(stop)
        resume = ["--resume"] if index else []
        result = finetune(*options, *resume, "--output", parts)
        assert result.code == 130
        assert f"fastlora finetune --resume --output {parts}" in result.out
        assert (parts / FILE_NAME).exists() and not (parts / "report.json").exists()
    result = fastlora_cli("finetune", "--resume", "--output", parts)
    assert result.code == 0, result.err
    assert losses(parts) == losses(whole)
    assert (parts / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
    logs = [[line.split(",")[:5] for line in (d / "steps.csv").read_text().splitlines()] for d in (whole, parts)]
    assert logs[0] == logs[1]
    calls = [json.loads((d / "report.json").read_text())["runs"]["fastlora"]["dispatch_counts"] for d in (whole, parts)]
    assert calls[0] == calls[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_stop_like_ctrl_c(finetune, interrupt_in_step, tmp_path, number):
    interrupt_in_step(2, number)
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        result = finetune("--output", tmp_path)
    finally:
        signal.signal(number, before)
    assert result.code == 130
    assert "fastlora 2 of 6 steps" in result.text
    assert (tmp_path / FILE_NAME).exists()


def test_second_ctrl_c_in_a_step_gives_up_without_saving(finetune, monkeypatch, tmp_path):
    def impatient_step(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(loop, "_step", impatient_step)
    result = finetune("--output", tmp_path)
    assert result.code == 130
    assert result.err.strip().endswith("fastlora: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_before_the_first_step_saves_nothing(finetune, monkeypatch, tmp_path):
    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(runner, "held_out_loss", interrupted)
    result = finetune("--output", tmp_path)
    assert result.code == 130
    assert "nothing to save" in result.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["fastlora_arm", "peft_arm"])
def test_interrupt_while_resuming_keeps_the_further_state(finetune, interrupt_in_step, monkeypatch, tmp_path, where):
    """Whichever of the two is rebuilt when the signal comes, and although building draws random numbers."""
    options = ["--compare", "peft", "--dropout", 0.3]
    assert finetune(*options, "--output", tmp_path / "whole").code == 0
    parts = tmp_path / "parts"
    interrupt_in_step(8)
    assert finetune(*options, "--output", parts).code == 130
    build = getattr(runner, where)

    def interrupted(*args):
        build(*args)
        signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(runner, where, interrupted)
        result = finetune("--resume", "--output", parts)
    assert result.code == 130
    assert ("is as it was" if where == "fastlora_arm" else "fastlora 6 of 6 steps") in result.text
    result = finetune("--resume", "--output", parts)
    assert result.code == 0, result.err
    assert losses(parts) == losses(tmp_path / "whole")


def test_signal_to_a_real_process(tiny_model, text_file, tmp_path, fastlora_cli):
    output = tmp_path / "out"
    command = [sys.executable, "-c", "from fastlora.cli.main import main; main()", "finetune"]
    command += ["--model", tiny_model, "--text", text_file, "--steps", 100_000, "--block-size", 24, "--output", output]
    process = subprocess.Popen(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        bar = ""
        while "loss=" not in bar:
            assert time.monotonic() < deadline and process.poll() is None, bar
            bar += process.stderr.read(1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=START_TIMEOUT_S)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert "state saved" in out
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert sorted(path.name for path in output.iterdir()) == [FILE_NAME, "steps.csv"]


@pytest.fixture
def interrupted_run(finetune, interrupt_in_step, monkeypatch, tmp_path):
    with monkeypatch.context():
        interrupt_in_step(2)
        assert finetune("--output", tmp_path).code == 130
    return tmp_path


def test_resume_refuses_another_option(finetune, interrupted_run):
    result = finetune("--resume", "--output", interrupted_run, "--rank", 4)
    assert result.code == 2
    assert "--rank is 4, but the run to resume was begun with 8" in result.error_line
    assert (interrupted_run / FILE_NAME).exists()


def test_resume_refuses_another_text(fastlora_cli, interrupted_run, text_file):
    original = text_file.read_bytes()
    try:
        text_file.write_bytes(original.replace(b"frozen", b"melted"))
        result = fastlora_cli("finetune", "--resume", "--output", interrupted_run)
    finally:
        text_file.write_bytes(original)
    assert result.code == 2
    assert "the text or the tokenizer is no longer the same" in result.error_line


def test_resume_without_a_state(fastlora_cli, tmp_path):
    result = fastlora_cli("finetune", "--resume", "--output", tmp_path)
    assert result.code == 2
    assert f"nothing to resume in {tmp_path}" in result.error_line


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"x" * 64])
def test_resume_from_a_damaged_state(fastlora_cli, interrupted_run, damage):
    state = interrupted_run / FILE_NAME
    state.write_bytes(damage(state.read_bytes()))
    result = fastlora_cli("finetune", "--resume", "--output", interrupted_run)
    assert result.code == 2
    assert f"cannot resume from {state}" in result.error_line


def test_resume_from_a_foreign_safetensors_file(fastlora_cli, tmp_path):
    import torch
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / FILE_NAME)
    result = fastlora_cli("finetune", "--resume", "--output", tmp_path)
    assert result.code == 2
    assert "cannot resume" in result.error_line


def test_signal_outside_of_a_deferred_block_raises_at_once_and_handlers_are_restored():
    before = [signal.getsignal(number) for number in SIGNALS]
    with Interruption(), pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_signal_in_a_deferred_block_waits_for_its_end():
    finished = False
    with Interruption() as interruption, pytest.raises(Interrupted), interruption.deferred():
        signal.raise_signal(signal.SIGINT)
        finished = True
    assert finished


def test_signal_that_python_dropped_is_not_lost():
    with Interruption() as interruption:
        # What a garbage collector's callback does to an exception that a handler raises in it.
        with contextlib.suppress(Interrupted):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(Interrupted), interruption.deferred():
            pytest.fail("a step was begun")
        interruption.caught()
        with interruption.deferred():
            pass
