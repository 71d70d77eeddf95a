"""The GPU visit: every step is tried, none can stop or outlast the others, and its log is kept."""

import json
import subprocess
import sys
import time

import pytest
import torch
from click.testing import CliRunner

from benchmarks import ROOT, mark
from benchmarks.gpu import visit
from benchmarks.gpu.visit import Step, main, plan, run_plan
from fastlora.backends import reference
from fastlora.bench.cases import LayerCase
from fastlora.bench.layer import input_sets


def python(code):
    return (sys.executable, "-c", code)


def test_a_failing_or_endless_step_does_not_stop_the_rest(tmp_path, capsys):
    steps = [
        Step("good", python("print('fine')"), 60),
        Step("bad step", python("import sys; print('reason'); sys.exit(3)"), 60),
        Step("endless", python("import time; print('on', flush=True); time.sleep(600)"), 6),
        Step("absent", ("no-such-command-anywhere",), 60),
        Step("last", python("import os; print(os.environ['XDG_CACHE_HOME'])"), 60),
    ]
    outcomes = run_plan(steps, tmp_path, budget=120)
    assert [outcome.code for outcome in outcomes] == [0, 3, None, None, 0]
    assert outcomes[2].note == "stopped after 6 s" and "cannot run" in outcomes[3].note
    assert [entry["name"] for entry in json.loads((tmp_path / "summary.json").read_text())] == [s.name for s in steps]
    assert (tmp_path / "bad-step.log").read_text() == "reason\n"
    assert (tmp_path / "last.log").read_text() == f"{tmp_path / 'cache'}\n"
    assert "reason" in capsys.readouterr().out


def test_a_stopped_step_takes_its_children_with_it(tmp_path):
    alive = tmp_path / "alive"
    child = (
        f"import time, pathlib\nfor i in range(600): time.sleep(0.2); pathlib.Path({str(alive)!r}).write_text(str(i))"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    run_plan([Step("parent", python(parent), 8)], tmp_path, budget=60)
    before = alive.read_text()
    time.sleep(1.5)
    assert alive.read_text() == before


def test_a_step_out_of_time_is_interrupted_before_it_is_killed(tmp_path):
    """What it has measured until then is written."""
    code = (
        "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written', flush=True)\n"
        "time.sleep({})\nprint('lingering', flush=True)"
    )
    steps = [Step("yielding", python(code.format(0)), 5), Step("clinging", python(code.format(60)), 5)]
    outcomes = run_plan(steps, tmp_path, budget=60)
    assert [(outcome.code, outcome.note) for outcome in outcomes] == [(None, "stopped after 5 s")] * 2
    assert (tmp_path / "yielding.log").read_text() == "written\nlingering\n"
    assert (tmp_path / "clinging.log").read_text() == "written\n"


def test_an_interrupted_visit_leaves_no_step_running(tmp_path, monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def wait(self, timeout=None):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(timeout)

    monkeypatch.setattr(visit.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_plan([Step("endless", python("import time; time.sleep(60)"), 60)], tmp_path, budget=60)
    assert started[0].poll() is not None


def test_an_earlier_visits_folder_is_set_aside(tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "plan", lambda output, workers: [Step("only", python("pass"), 60)])
    output = tmp_path / "gpu"
    output.mkdir()
    (output / "bench.json").write_text("of an earlier visit")
    runner = CliRunner()
    assert runner.invoke(main, ["--output", str(output)]).exit_code == 0
    assert (output / "bench.json").exists()  # a folder of something else
    assert runner.invoke(main, ["--output", str(output), "--only", "only"]).exit_code == 0
    assert (output / "bench.json").exists()  # this visit goes on
    assert runner.invoke(main, ["--output", str(output)]).exit_code == 0
    assert {path.name for path in output.iterdir()} == {"only.log", "summary.json"}
    (earlier,) = (path for path in tmp_path.iterdir() if path != output)
    assert earlier.name.startswith("gpu-20") and (earlier / "bench.json").exists()


def test_a_process_that_cannot_be_killed_does_not_hold_up_the_visit(tmp_path, monkeypatch):
    """As one that waits for the driver, which waits for a kernel that never ends."""
    killed = []
    monkeypatch.setattr(visit.os, "killpg", lambda pid, signal: killed.append(pid))
    for name in ("INTERRUPT_S", "GRACE_S"):
        monkeypatch.setattr(visit, name, 0.2)
    steps = [Step("stuck", python("import time; time.sleep(20)"), 5), Step("next", python("pass"), 60)]
    stuck, following = run_plan(steps, tmp_path, budget=60)
    assert stuck.code is None and "does not end" in stuck.note and killed
    assert following.code == 0


def test_the_budget_ends_the_visit(tmp_path):
    steps = [Step("first", python("pass"), 60), Step("second", python("pass"), 60)]
    outcomes = run_plan(steps, tmp_path, budget=0)
    assert [(outcome.code, outcome.note) for outcome in outcomes] == [(None, "no time left")] * 2


def test_nothing_runs_after_an_essential_step_failed(tmp_path):
    steps = [Step("first", python("raise SystemExit(1)"), 60, essential=True), Step("second", python("pass"), 60)]
    assert [outcome.name for outcome in run_plan(steps, tmp_path, budget=60)] == ["first"]


def test_the_plan_tests_before_it_times_and_fits_its_commands(tmp_path):
    steps = plan(tmp_path, workers=4)
    names = [step.name for step in steps]
    order = ("build", "info", "cuda tests", "triton tests", "memcheck", "mark", "bench layer", "tune", "racecheck")
    assert sorted(order, key=names.index) == list(order)
    assert names.index("tune") < names.index("bench layer, tuned")
    for step in steps:
        for argument in step.command:
            if argument.startswith("tests") or argument.endswith("setup.py"):
                assert (ROOT / argument).exists(), argument


def test_the_visit_needs_no_network_and_nothing_installed(tmp_path):
    """`make gpu` installs nothing where there is a torch, and no step of the visit calls pip."""
    shown = subprocess.run(
        ["make", "--dry-run", "gpu", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "benchmarks.gpu" in shown and "pip" not in shown
    assert not any("pip" in argument.split() for step in plan(tmp_path, 4) for argument in step.command)


def test_plugins_that_are_missing_are_done_without(monkeypatch):
    assert {"-n", "--timeout"} <= set(visit.pytest_command(4, 100))
    monkeypatch.setattr(visit.importlib.util, "find_spec", lambda name: None)
    bare = visit.pytest_command(4, 100)
    assert bare[:3] == (sys.executable, "-m", "pytest") and not {"-n", "--timeout"} & set(bare)


def test_a_test_file_that_wants_a_missing_package_does_not_stop_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(visit, "ROOT", tmp_path)
    (tmp_path / "test_a.py").write_text("import no_such_package_at_all")
    (tmp_path / "test_b.py").write_text("def test_it(): print('ran', flush=True)")
    (outcome,) = run_plan([Step("tests", (*visit.pytest_command(1, 60), "-s", "."), 60)], tmp_path, budget=60)
    assert outcome.code == 1 and "1 passed, 1 error" in (tmp_path / "tests.log").read_text()


MARK_CASE = LayerCase(64, 48, 32, 16, dtype="float32")


@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_the_mark_is_measured_for_what_is_right(direction):
    sets = input_sets(MARK_CASE, "cpu")[:2]
    row = mark.measure(direction, "reference", mark.launch_of(direction, reference, {}), MARK_CASE, sets, rounds=5)
    assert "failure" not in row and row["ratio"] == row["median_us"] / row["frozen_us"] > 0
    assert f"mark {row['mark']:.2f}x" in mark.as_line(row)


@pytest.mark.parametrize(
    "launch, failure",
    (
        (lambda t: {"y": t.x @ t.weight.t()}, "wrong: off by"),
        (lambda t: torch.ones(2) @ torch.ones(3), "size"),
    ),
)
def test_the_mark_says_why_a_variant_was_not_timed(launch, failure):
    row = mark.measure("forward", "broken", launch, MARK_CASE, input_sets(MARK_CASE, "cpu")[:1], rounds=5)
    assert failure in row["failure"] and "ratio" not in row and failure in mark.as_line(row)


def test_the_command_line_names_unknown_steps(tmp_path):
    refused = CliRunner().invoke(main, ["--only", "nothing", "--output", str(tmp_path)])
    assert refused.exit_code == 2 and "no step 'nothing'" in refused.output


@pytest.mark.parametrize("code, expected", [("pass", 0), ("raise SystemExit(5)", 1)])
def test_the_exit_code_tells_whether_all_went_well(tmp_path, monkeypatch, code, expected):
    monkeypatch.setattr(visit, "plan", lambda output, workers: [Step("only", python(code), 60)])
    assert CliRunner().invoke(main, ["--output", str(tmp_path)]).exit_code == expected
