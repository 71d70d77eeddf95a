"""`fastlora bench` and `fastlora tune` on the command line."""

import json

import pytest
import torch

from fastlora.cli import claims
from fastlora.cli.training.settings import Settings


@pytest.fixture
def small_machine(monkeypatch):
    monkeypatch.setattr("fastlora.bench.peaks.MATMUL_SIZE", {"cpu": 64})
    monkeypatch.setattr("fastlora.bench.peaks.COPY_BYTES", {"cpu": 1 << 20})


def test_one_case_end_to_end(fastlora_cli, tmp_path, small_machine):
    measured = fastlora_cli(
        "bench",
        "--case",
        "8,6,10,2",
        "--device",
        "cpu",
        "--seconds",
        0,
        "--skip",
        "compiled peft",
        "--output",
        tmp_path,
    )
    assert measured.code == 0, measured.err
    assert "| M 8, N 6, K 10, R 2, float32 |" in measured.out
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {row["variant"] for row in report["layer"]} >= {"frozen", "fastlora", "eager", "unsloth order"}
    assert "compiled peft" not in {row["variant"] for row in report["layer"]} | set(report["missing"])
    again = fastlora_cli("bench", "--from", tmp_path / "bench.json", "--output", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "bench.md").read_text() == (tmp_path / "bench.md").read_text()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case", "8,6"], "--case '8,6' is not M,N,K,R"),
        (["--case", "8,6,10,two"], "is not M,N,K,R"),
        (["--case", "8,6,10,0"], "sizes must be at least 1"),
        (["--case", "8,6,10,2,0.1,float8"], "unknown dtype 'float8'"),
        (["--peer", "nobody"], "unknown peer 'nobody'"),
        (["--skip", "nobody"], "--skip nobody: no such peer"),
        (["--from", "nowhere.json"], "cannot read nowhere.json"),
        (["--preset", "huge"], "'huge' is not one of"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(fastlora_cli, tmp_path, arguments, message, small_machine):
    refused = fastlora_cli("bench", *arguments, "--device", "cpu", "--output", tmp_path)
    assert refused.code == 2
    assert message in refused.err.strip().splitlines()[-1]
    assert not (tmp_path / "bench.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("arguments", [["bench", "--device", "cuda"], ["tune"]])
def test_a_missing_gpu_is_said(fastlora_cli, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    refused = fastlora_cli(*arguments)
    assert refused.code == 2 and ("CUDA device" in refused.error_line or "GPU" in refused.error_line)


def test_peers_are_named(fastlora_cli):
    listed = fastlora_cli("bench", "--list-peers")
    assert listed.code == 0
    for name in ("peft", "compiled peft", "loralib", "torchtune", "unsloth order", "lorafusion", "runlora order"):
        assert f"\n{name} " in f"\n{listed.out}"


@pytest.fixture(scope="module")
def found(tiny_model, text_file):
    settings = Settings(
        model=str(tiny_model), text=(str(text_file),), steps=12, block_size=24, held_out=4, batch_size=2, rank=4
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "LATENCY_SECONDS", 0.0)
        return {**claims.measure_claims(settings, lambda line: None), "command": "fastlora bench --claims"}


def test_claims_are_measured(found):
    parameters = found["parameters"]
    assert 0 < parameters["share"] < 0.5
    lora, full = found["runs"][claims.LORA], found["runs"][claims.FULL]
    assert lora["tensor_bytes"]["gradients"] < full["tensor_bytes"]["gradients"]
    assert full["tensor_bytes"]["optimizer"] >= 2 * full["tensor_bytes"]["gradients"]
    assert lora["held_out_after"] < found["held_out_before"]
    assert full["learning_rate"] in full["learning_rates_tried"]
    assert set(found["latency"]) == {"base", "merged", "adapter"}


def test_claims_are_written_as_tables(found, tmp_path):
    stored, text = claims.write_claims(found, tmp_path)
    assert json.loads(stored.read_text())["runs"].keys() == found["runs"].keys()
    written = text.read_text()
    for line in ("trainable parameters", "merged ÷ base inference time", "| weights |", "fastlora bench --claims"):
        assert line in written
