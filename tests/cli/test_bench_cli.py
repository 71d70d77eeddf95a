"""`fastlora bench` and `fastlora tune` on the command line."""

import json
import os
import signal
import sys
from dataclasses import replace

import pytest
import torch

from fastlora.backends import tuning
from fastlora.backends.configs import TILE_TABLES, table_for
from fastlora.bench import claims, contest, packed, run, timing, tuner, ways
from fastlora.bench.correctness import WrongResult
from fastlora.finetune.settings import Settings
from fastlora.tables import WIDTH


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
    assert max(map(len, measured.out.splitlines())) <= WIDTH
    report = json.loads((tmp_path / "bench.json").read_text())
    ratios = {row["variant"]: row["ratio_to_frozen"] for row in report["layer"] if row["pass"] == "step"}
    del ratios["frozen"]
    shown = [line.split("  ") for line in measured.out.partition("One layer, step")[2].splitlines()[2:][: len(ratios)]]
    table = {cells[0]: cells[-1].strip() for cells in shown}
    assert list(table)[0] == "fastlora" and set(table) == set(ratios) and set(table.values()) == {"1"}
    assert all(f"{ratio:.3f}" in measured.out for ratio in ratios.values())
    assert "| M 8, N 6, K 10, R 2, float32 |" in (tmp_path / "bench.md").read_text()
    assert {row["variant"] for row in report["layer"]} >= {"frozen", "fastlora", "eager", "unsloth order"}
    assert "compiled peft" not in {row["variant"] for row in report["layer"]} | set(report["missing"])
    again = fastlora_cli("bench", "--from", tmp_path / "bench.json", "--output", tmp_path / "again")
    assert again.code == 0, again.err
    assert (tmp_path / "again" / "bench.md").read_text() == (tmp_path / "bench.md").read_text()


def test_a_busy_machine_is_said(fastlora_cli, tmp_path, small_machine, monkeypatch):
    """A clock that runs while the thread does not, as when another process has the CPU."""
    clock = timing.time.thread_time
    for share, said in ((0.5, True), (1.0, False)):
        with monkeypatch.context() as patch:
            # What the thread had is a share of what passed.
            patch.setattr(timing.time, "thread_time", lambda share=share: share * timing.time.perf_counter())
            result = fastlora_cli(*SMALL, "--case", "8,6,10,2", "--output", tmp_path / str(share))
        assert result.code == 0, result.err
        assert ("busy machine: the timed work had 50% of a CPU" in result.text) is said
        assert all(row["cpu_share"] == pytest.approx(share, rel=0.01) for row in report_rows(tmp_path / str(share)))
    assert timing.time.thread_time is clock


def report_rows(directory):
    return json.loads((directory / "bench.json").read_text())["layer"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--case", "8,6"], "--case '8,6' is not M,N,K,R"),
        (["--case", "8,6,10,two"], "is not M,N,K,R"),
        (["--case", "8,6,10,0"], "sizes must be at least 1"),
        (["--case", "8,6,10,2,0.1,float8"], "unknown dtype 'float8'"),
        (["--case", "8,6,10,2,1"], "dropout must be at least 0 and below 1, got 1"),
        (["--case", "8,6,10,2,nan"], "dropout must be at least 0 and below 1, got nan"),
        (["--case", "8,6,10,2,0,float32,x"], "is not M,N,K,R[,P[,DTYPE]]: 7 values"),
        (["--peer", "nobody"], "unknown peer 'nobody'"),
        (["--skip", "nobody"], "--skip nobody: no such peer"),
        (["--from", "nowhere.json"], "cannot read nowhere.json"),
        (["--preset", "huge"], "'huge' is not one of"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(fastlora_cli, tmp_path, arguments, message, small_machine):
    refused = fastlora_cli("bench", *arguments, "--device", "cpu", "--output", tmp_path / "out")
    assert refused.code == 2
    assert message in refused.error_line
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_said_before_anything_is_measured(fastlora_cli, tmp_path, monkeypatch):
    monkeypatch.setattr("fastlora.bench.run.run_bench", lambda options: pytest.fail("measured"))
    (tmp_path / "file").write_text("")
    refused = fastlora_cli("bench", "--device", "cpu", "--output", tmp_path / "file")
    assert refused.code == 2 and f"cannot write {tmp_path / 'file'}" in refused.error_line


SMALL = ("bench", "--device", "cpu", "--seconds", 0, "--only", "layer", "--skip", "compiled peft")


def stop_at(monkeypatch, m, error):
    measured = run.measure_layer

    def stopping(case, *arguments):
        if case.m == m and isinstance(error, signal.Signals):
            os.kill(os.getpid(), error)
        elif case.m == m:
            raise error
        return measured(case, *arguments)

    monkeypatch.setattr(run, "measure_layer", stopping)


def test_the_fastest_backend_is_kept_whatever_becomes_of_tritons_tiles(fastlora_cli, monkeypatch, a_gpu):
    broken = RuntimeError("no image")
    tune_with(monkeypatch, {(128, "forward"): broken}, {(64, "backward"): "composed", (128, "forward"): "composed"})
    tuned = fastlora_cli("tune", *CASES)
    assert tuned.code == 2 and "1 not tuned: no image" in tuned.err
    assert "triton 20.0 µs, composed 10.0 µs, cuda none (cuda: not built): composed serves it, instead of" in tuned.out
    choices = tuning.load_choices("Imaginary")
    assert {key: each.backend for key, each in choices.items()} == {
        "backward m64 n64 k64 r16 bfloat16": "composed", "forward m128 n64 k64 r16 bfloat16": "composed",
    }  # fmt: skip
    assert choices["forward m128 n64 k64 r16 bfloat16"].config is None
    assert "forward m128 n64 k64 r16 bfloat16: composed\n" in fastlora_cli("tune", "--show").out


def test_without_triton_the_others_are_compared(fastlora_cli, monkeypatch, a_gpu):
    monkeypatch.setattr("fastlora.selection.why_unsupported", lambda name, spec: f"{name}: no C compiler")
    tune_with(monkeypatch, {}, {(64, "forward"): "composed"})
    tuned = fastlora_cli("tune", *CASES[:2])
    assert tuned.code == 0 and "triton: no C compiler" in tuned.out
    (chosen,) = tuning.load_choices("Imaginary").values()
    assert chosen == tuning.Tuned("composed", None)


@pytest.mark.parametrize(
    "error, code, line",
    [
        (signal.SIGINT, 130, "fastlora: interrupted"),
        (signal.SIGTERM, 130, "fastlora: interrupted"),
        (WrongResult("fastlora: y is off"), 2, "fastlora: error: not timed, because it is wrong: fastlora: y is off"),
        (torch.OutOfMemoryError("64 GiB"), 2, "fastlora: error: out of memory: 64 GiB"),
    ],
)
def test_an_early_end_keeps_what_was_measured(fastlora_cli, tmp_path, small_machine, monkeypatch, error, code, line):
    stop_at(monkeypatch, 9, error)
    output = tmp_path / "out"
    ended = fastlora_cli(*SMALL, "--case", "8,6,10,2", "--case", "9,6,10,2", "--output", output)
    assert ended.code == code and ended.err.strip().splitlines()[-1] == line
    assert "not finished: stopped at part 3 of 3" in ended.out
    assert {row["m"] for row in json.loads((output / "bench.json").read_text())["layer"]} == {8}
    ended = fastlora_cli(*SMALL, "--case", "9,6,10,2", "--output", tmp_path / "nothing")
    assert ended.code == code and ended.err.strip().splitlines()[-1] == line
    assert not (tmp_path / "nothing").exists()


def test_a_peer_of_ones_own_is_found_in_the_current_directory(fastlora_cli, tmp_path, small_machine, monkeypatch):
    (tmp_path / "lora_at_hand.py").write_text(
        "from torch.nn.functional import linear\n"
        "def right(weight, lora_a, lora_b, scaling, dropout_p):\n"
        "    return lambda x: linear(x, weight) + scaling * linear(linear(x, lora_a), lora_b)\n"
        "def wrong(weight, lora_a, lora_b, scaling, dropout_p):\n"
        "    return lambda x: linear(x, weight) + linear(linear(x, lora_a), lora_b)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    peers = ("--peer", "lora_at_hand:right", "--peer", "lora_at_hand:wrong")
    measured = fastlora_cli(*SMALL, "--case", "8,6,10,2", *peers, "--output", tmp_path / "out")
    assert measured.code == 0, measured.err
    variants = {row["variant"] for row in json.loads((tmp_path / "out" / "bench.json").read_text())["layer"]}
    assert "lora_at_hand:right" in variants and "lora_at_hand:wrong" not in variants
    assert "not measured: lora_at_hand:wrong: WrongResult: lora_at_hand:wrong: y is off" in measured.out


def test_neither_tqdm_nor_matplotlib_is_needed(fastlora_cli, tmp_path, small_machine, monkeypatch):
    for name in ("tqdm", "matplotlib"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "fastlora.bench.plots", raising=False)
    measured = fastlora_cli(*SMALL, "--case", "8,6,10,2", "--output", tmp_path)
    assert measured.code == 0, measured.err
    assert "peaks of this machine\nM=8 N=6 K=10 R=2 float32\n" in measured.err
    assert (tmp_path / "bench.html").exists() and not (tmp_path / "ratio.png").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize("arguments", [["bench", "--device", "cuda"], ["tune"]])
def test_a_missing_gpu_is_said(fastlora_cli, tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    refused = fastlora_cli(*arguments)
    assert refused.code == 2 and ("CUDA device" in refused.error_line or "GPU" in refused.error_line)


@pytest.fixture
def a_gpu(monkeypatch, tmp_path):
    """A GPU as far as `fastlora tune` looks at it, and a cache directory of its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Imaginary")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("fastlora.backends.target.target_of", lambda device: None)
    monkeypatch.setattr("fastlora.selection.why_unsupported", lambda name, spec: None)
    monkeypatch.setattr(tuning, "cache_directory", lambda: tmp_path / "cache")
    tuning.forget_choices()
    yield
    tuning.forget_choices()


def choice(best, table=1):
    base = TILE_TABLES[table_for(90, 16, 2, True)][0]
    table, best = (tuner.Measured(replace(base, group_m=size), float(size)) for size in (table, best))
    return tuner.Choice(table, best, tried=2, failed=0)


def contest_of(winner, default="triton"):
    entrants = [contest.Entrant("cuda", None, "cuda: not built"), contest.Entrant("triton", 20.0)]
    return contest.Contest(default, winner, (*entrants, contest.Entrant("composed", 10.0)))


def tune_with(monkeypatch, outcomes, winners={}):  # noqa: B006
    """Makes a search's outcome depend on M and the direction, and a contest's winner; an exception is raised."""

    def tune_case(case, direction, *rest):
        outcome = outcomes.get((case.m, direction), choice(1))
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def compare_backends(case, direction, device, config):
        return contest_of(winners.get((case.m, direction), "triton"))

    monkeypatch.setattr(tuner, "tune_case", tune_case)
    monkeypatch.setattr(contest, "compare_backends", compare_backends)


CASES = [argument for m in (64, 128, 256) for argument in ("--case", f"{m},64,64,16")]


def test_tuning_keeps_what_beats_the_table_and_forgets_what_no_longer_does(fastlora_cli, monkeypatch, a_gpu):
    tune_with(monkeypatch, {(64, "forward"): choice(8, table=16), (128, "backward"): choice(4, table=16)})
    tuned = fastlora_cli("tune", *CASES)
    assert tuned.code == 0 and "50.0% faster" in tuned.out and "the table's choice stays" in tuned.out, tuned.err
    keys = ["forward m64 n64 k64 r16 bfloat16", "backward m128 n64 k64 r16 bfloat16"]
    choices = tuning.load_choices("Imaginary")
    assert {key: (each.backend, each.config.group_m) for key, each in choices.items()} == {
        keys[0]: ("triton", 8), keys[1]: ("triton", 4),
    }  # fmt: skip
    shown = fastlora_cli("tune", "--show")
    assert "2 choices for Imaginary" in shown.out and keys[0] in shown.out
    tune_with(monkeypatch, {})
    assert fastlora_cli("tune", *CASES, "--dry-run").code == 0 and len(tuning.load_choices("Imaginary")) == 2
    assert fastlora_cli("tune", *CASES[:2]).code == 0
    assert list(tuning.load_choices("Imaginary")) == keys[1:]


def test_shipped_choices_come_from_the_same_command(fastlora_cli, monkeypatch, a_gpu, tmp_path):
    """And where the user's GPU finds the table faster than what is shipped, the table serves."""
    monkeypatch.setattr(tuning, "SHIPPED", tmp_path / "tuned")
    tune_with(monkeypatch, {(64, "forward"): choice(8, table=16)})
    assert fastlora_cli("tune", *CASES[:2], "--output", str(tuning.SHIPPED)).code == 0
    key = "forward m64 n64 k64 r16 bfloat16"
    assert list(tuning.load_choices("Imaginary", tuning.SHIPPED)) == [key] and tuning.load_choices("Imaginary") == {}
    assert "1 choices" in fastlora_cli("tune", "--show", "--output", str(tuning.SHIPPED)).out
    tune_with(monkeypatch, {(64, "forward"): choice(1)})
    assert fastlora_cli("tune", *CASES[:2]).code == 0
    assert tuning.load_choices("Imaginary")[key].config.group_m == 1


@pytest.mark.parametrize(
    "error, code, line",
    [
        (KeyboardInterrupt(), 130, "fastlora: interrupted"),
        (RuntimeError("no image\nfor it"), 2, "fastlora: error: 1 not tuned: no image"),
    ],
)
def test_what_ends_one_search_takes_nothing_from_the_others(fastlora_cli, monkeypatch, a_gpu, error, code, line):
    faster = choice(8, table=16)
    tune_with(monkeypatch, {(64, "forward"): faster, (128, "forward"): error, (256, "forward"): faster})
    tuned = fastlora_cli("tune", *CASES)
    assert tuned.code == code and tuned.err.strip().splitlines()[-1] == line
    expected = {64} if code == 130 else {64, 256}
    assert set(tuning.load_choices("Imaginary")) == {f"forward m{m} n64 k64 r16 bfloat16" for m in expected}


def ways_of(winner, in_loop, untuned=True):
    cuda, triton = (ways.Way(name, True) for name in ("cuda", "triton"))
    medians = {cuda: 20.0, triton: 10.0, cuda._replace(in_loop=False): None}
    chosen = {"cuda": True, "triton": in_loop}
    return ways.Outcome(cuda, winner, chosen, dict.fromkeys(chosen, untuned), medians, {"cuda once": "it is off"})


def test_tuning_over_a_packed_weight_keeps_the_way_to_decode(fastlora_cli, monkeypatch, a_gpu):
    """With Triton's tile for its way; a backward has one."""
    pytest.importorskip("bitsandbytes")
    searched, compared = [], []
    monkeypatch.setattr(packed, "sets_of", lambda case, device, sets_of=packed.sets_of: sets_of(case, "cpu"))

    def tune_case(case, direction, target, module, seconds, in_loop):
        searched.append((direction, in_loop, seconds))
        return choice(4 if in_loop else 8, table=16)

    def compare_ways(case, direction, device, configs):
        compared.append((case.base, direction, {way: config.group_m for way, config in configs.items()}))
        loop = direction == "forward"
        return ways_of(ways.Way("triton", loop), loop, untuned=loop)

    monkeypatch.setattr(tuner, "tune_case", tune_case)
    monkeypatch.setattr(ways, "compare_ways", compare_ways)
    tuned = fastlora_cli("tune", "--base-quant", "nf4", *CASES[:2], "--seconds", "6")
    assert tuned.code == 0, tuned.err
    assert searched == [("forward", False, 3.0), ("forward", True, 3.0), ("backward", False, 6.0)]
    assert compared == [("nf4", "forward", {False: 8, True: 4}), ("nf4", "backward", {False: 8})]
    assert "cuda in the loop 20.0 µs, triton in the loop 10.0 µs, cuda once none (it is off): triton in the loop" in (
        tuned.out
    )
    found = tuning.load_choices("Imaginary")
    keys = [f"{direction} m64 n64 k64 r16 bfloat16 nf4" for direction in ("forward", "backward")]
    assert {key: (each.backend, each.config.group_m, each.in_loop) for key, each in found.items()} == {
        keys[0]: ("triton", 4, {"cuda": True, "triton": True}),
        keys[1]: ("triton", 8, {"cuda": True, "triton": False}),
    }
    shown = fastlora_cli("tune", "--show").out
    assert "cuda decodes in the loop, triton decodes once" in shown


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
    for line in ("trained parameters", "merged ÷ base inference time", "| weights |", "GPT-3 175B", "bench --claims"):
        assert line in written
