"""fastlora finetune loses nothing of the user's: refusals, what is written when, and runs that go further."""

import csv
import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest

from fastlora.errors import CommandError
from fastlora.finetune import full, loop, runner
from fastlora.finetune.interrupt import Interruption
from fastlora.finetune.loop import learning_rate_at
from fastlora.finetune.state import FILE_NAME, SavedState

START_TIMEOUT_S = 120
WEIGHTS = "adapter/adapter_model.safetensors"


def contents(directory):
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def run_of(directory, name="fastlora"):
    return json.loads((directory / "report.json").read_text())["runs"][name]


def steps_of(directory):
    with open(directory / "steps.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def die_in_step(monkeypatch):
    """Makes the n-th training step of the next run end the process's work there and then, as a kill would."""

    def arrange(n):
        count, step = 0, loop._step

        def dying_step(*args):
            nonlocal count
            count += 1
            if count == n:
                raise KeyboardInterrupt
            return step(*args)

        monkeypatch.setattr(loop, "_step", dying_step)

    return arrange


@pytest.mark.parametrize("name", [FILE_NAME, "adapter/adapter_config.json", "report.json", "notes.txt"])
def test_a_directory_that_holds_something_is_refused(finetune, tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    result = finetune("--output", tmp_path)
    assert result.code == 2
    assert all(word in result.error_line for word in (name.split("/")[0], "--resume", "--overwrite", str(tmp_path)))
    assert contents(tmp_path) == {name: b"mine"}


def test_a_writers_abandoned_stage_is_nothing_of_the_users(finetune, tmp_path):
    (tmp_path / ".fastlora-1-abc" / "new").mkdir(parents=True)
    assert finetune("--output", tmp_path, "--steps", 1).code == 0


def test_overwrite_replaces_the_runs_files_and_no_others(finetune, tmp_path):
    assert finetune("--output", tmp_path, "--steps", 1).code == 0
    (tmp_path / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    assert finetune("--output", tmp_path, "--steps", 2, "--overwrite", "--log", "jsonl").code == 0
    after = contents(tmp_path)
    assert after.keys() == before.keys() - {"steps.csv"} | {"steps.jsonl"}
    assert {name for name in after if name in before and after[name] == before[name]} == {
        "notes.txt", "adapter/adapter_config.json",
    }  # fmt: skip
    lines = [json.loads(line) for line in after["steps.jsonl"].splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2]
    assert "--resume goes on" in finetune("--output", tmp_path, "--resume", "--overwrite").error_line


def test_an_input_that_cannot_be_used_overwrites_nothing(finetune, tmp_path):
    assert finetune("--output", tmp_path / "out", "--steps", 1).code == 0
    before = contents(tmp_path / "out")
    (tmp_path / "bad.jsonl").write_text("{}")
    assert finetune("--output", tmp_path / "out", "--overwrite", "--text", tmp_path / "bad.jsonl").code == 2
    assert finetune("--output", tmp_path / "out", "--overwrite", "--learning-rate", 1e-30, "--targets", "x").code == 2
    assert contents(tmp_path / "out") == before


def test_the_adapter_is_there_before_anything_is_measured_about_it(finetune, fastlora_cli, monkeypatch, tmp_path):
    assert finetune("--output", tmp_path, "--steps", 1).code == 0
    before = contents(tmp_path)

    def failing(*args):
        raise CommandError("cannot merge")

    with monkeypatch.context() as patch:
        patch.setattr(runner, "check_merge", failing)
        assert finetune("--output", tmp_path, "--steps", 3, "--overwrite").code == 2
    after = contents(tmp_path)
    assert after[WEIGHTS] != before[WEIGHTS]
    assert not after.keys() & {"report.json", "loss.png"}  # those were about another adapter
    result = fastlora_cli("finetune", "--output", tmp_path, "--resume")
    assert result.code == 0 and "fastlora: all 3 steps are done; more --steps would go further" in result.text
    assert contents(tmp_path)[WEIGHTS] == after[WEIGHTS] and len(run_of(tmp_path)["losses"]) == 3


def test_a_killed_run_goes_on_from_its_last_save(finetune, die_in_step, tmp_path):
    options = ["--dropout", 0.3, "--eval-every", 3]
    assert finetune(*options, "--output", tmp_path / "whole").code == 0
    parts = tmp_path / "parts"
    die_in_step(6)
    assert finetune(*options, "--save-every", 2, "--output", parts).code == 130
    assert SavedState(parts).records["fastlora"].step == 4
    assert finetune("--resume", "--output", parts).code == 0
    whole, resumed = run_of(tmp_path / "whole"), run_of(parts)
    assert resumed["losses"] == whole["losses"]
    assert resumed["held_out_losses"] == whole["held_out_losses"]
    assert [step for step, _ in whole["held_out_losses"]] == [0, 3, 6]
    assert contents(parts)[WEIGHTS] == contents(tmp_path / "whole")[WEIGHTS]


def test_an_evaluation_that_was_interrupted_is_made_up_for(finetune, monkeypatch, tmp_path):
    measure, calls = runner.held_out_loss, 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 2:
            signal.raise_signal(signal.SIGINT)
        return measure(*args)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "held_out_loss", interrupted)
        assert finetune("--eval-every", 3, "--output", tmp_path).code == 130
    assert finetune("--resume", "--output", tmp_path).code == 0
    assert [step for step, _ in run_of(tmp_path)["held_out_losses"]] == [0, 3, 6]


def test_a_finished_run_goes_further(finetune, die_in_step, monkeypatch, tmp_path):
    """With PEFT's beside it, and interrupted between the two: both have the schedule of the new length from there."""
    assert finetune("--compare", "peft", "--output", tmp_path).code == 0
    first, weights = run_of(tmp_path)["losses"], contents(tmp_path)[WEIGHTS]
    with monkeypatch.context():
        die_in_step(5)  # the first of PEFT's four
        assert finetune("--resume", "--steps", 10, "--output", tmp_path).code == 130
    assert {name: record.step for name, record in SavedState(tmp_path).records.items()} == {"fastlora": 10, "peft": 6}
    result = finetune("--resume", "--steps", 12, "--output", tmp_path)
    assert result.code == 2 and "--compare needs one schedule" in result.error_line
    monkeypatch.undo()
    result = finetune("--resume", "--steps", 10, "--output", tmp_path)
    assert result.code == 0, result.err
    run = run_of(tmp_path)
    assert run["losses"][:6] == first and len(run["losses"]) == len(run_of(tmp_path, "peft")["losses"]) == 10
    assert "the curves agree" in result.text
    assert contents(tmp_path)[WEIGHTS] != weights
    rates = [float(row["learning_rate"]) for row in steps_of(tmp_path) if row["run"] == "fastlora" and row["loss"]]
    assert rates == [learning_rate_at(step, 6 if step < 6 else 10, 0.01) for step in range(10)]


def test_what_a_resumed_run_may_change(finetune, die_in_step, monkeypatch, tmp_path):
    with monkeypatch.context():
        die_in_step(4)
        assert finetune("--save-every", 3, "--output", tmp_path).code == 130
    result = finetune("--resume", "--steps", 2, "--output", tmp_path)
    assert result.code == 2 and "--steps is 2, but the run to resume has done 3" in result.error_line
    monkeypatch.undo()
    assert finetune("--resume", "--steps", 4, "--learning-rate", 0.001, "--output", tmp_path).code == 0
    assert [float(row["learning_rate"]) for row in steps_of(tmp_path) if row["loss"]][3] == learning_rate_at(
        3, 4, 0.001
    )


def test_full_fine_tuning_is_measured_on_request_alone(finetune, monkeypatch, tmp_path):
    monkeypatch.setattr(full, "make_optimizer", lambda *args: pytest.fail("measured"))
    result = finetune("--steps", 1, "--output", tmp_path)
    memory = json.loads((tmp_path / "report.json").read_text())["memory"]
    assert not memory["full_finetuning_measured"] and memory["full_finetuning_tensor_bytes"]["optimizer"] > 0
    assert "estimated; --measure-full takes one step of it" in result.text


def test_too_little_memory_is_one_line(finetune, monkeypatch, tmp_path):
    def allocate(*args):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loop, "_step", allocate)
    result = finetune("--output", tmp_path)
    assert result.code == 2
    assert "out of memory" in result.err.splitlines()[-1] and "--grad-accum" in result.err.splitlines()[-1]


def test_an_ignored_hang_up_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
    try:
        with Interruption():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_goes_away_leaves_the_state(tiny_model, text_file, tmp_path):
    """The kernel sends SIGHUP then, and every later write to the terminal fails."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # without columns a bar shows nothing
    command = [sys.executable, "-c", "from fastlora.cli.main import main; main()", "finetune", "--model", tiny_model]
    command += ["--text", text_file, "--steps", 100_000, "--block-size", 24, "--output", tmp_path / "out"]

    def own_terminal():
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=own_terminal,
    )
    os.close(slave)
    try:
        deadline, shown = time.monotonic() + START_TIMEOUT_S, b""
        while b"loss=" not in shown:
            assert select.select([master], [], [], deadline - time.monotonic())[0], shown
            shown += os.read(master, 4096)
        os.close(master)
        assert process.wait(START_TIMEOUT_S) == 130
    finally:
        process.kill()
    assert SavedState(tmp_path / "out").records["fastlora"].step > 0
