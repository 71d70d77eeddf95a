"""The GPU visit: every step is tried, none can stop or outlast the others, and its log is kept."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks import ROOT
from benchmarks.gpu import child, objects, steps, visit
from benchmarks.gpu.child import Child
from benchmarks.gpu.stages import STAGES, Stage
from benchmarks.gpu.steps import Step
from benchmarks.gpu.visit import main, run_plan
from fastlora import environment


def python(code):
    return (sys.executable, "-c", code)


def run(planned, tmp_path, budget=120):
    return run_plan(planned, tmp_path / "out", tmp_path / "work", budget)


def test_a_failing_or_endless_step_does_not_stop_the_rest(tmp_path, capsys):
    planned = [
        Step("good", python("print('fine')"), 60),
        Step("bad step", python("import sys; print('reason'); sys.exit(3)"), 60),
        Step("endless", python("import time; print('on', flush=True); time.sleep(600)"), 6),
        Step("absent", ("no-such-command-anywhere",), 60),
        Step("crash", python("import os; os.kill(os.getpid(), 11)"), 60),
        Step("last", python("import os; print(os.environ['XDG_CACHE_HOME'])"), 60),
    ]
    outcomes = run(planned, tmp_path)
    assert [outcome.code for outcome in outcomes] == [0, 3, None, 1, -11, 0]
    assert outcomes[2].note == "stopped after 6 s" and outcomes[4].note == "ended by signal 11"
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [entry["name"] for entry in summary["steps"]] == [step.name for step in planned]
    assert [entry["last_line"] for entry in summary["steps"]][:2] == ["fine", "reason"]
    assert (tmp_path / "work" / "bad-step.log").read_text() == "reason\n"
    assert "cannot run no-such-command-anywhere" in (tmp_path / "work" / "absent.log").read_text()
    assert (tmp_path / "work" / "last.log").read_text() == f"{tmp_path / 'work' / 'cache'}\n"
    assert "reason" in capsys.readouterr().out


def test_a_python_step_runs_in_a_fork_with_its_own_arguments(tmp_path):
    outcomes = run([Step("module", ("-m", "json.tool", "--no-such-option"), 60)], tmp_path)
    assert outcomes[0].code == 2
    assert "unrecognized arguments: --no-such-option" in (tmp_path / "work" / "module.log").read_text()
    assert "json.tool" not in sys.argv[0] and os.environ.get("XDG_CACHE_HOME") != str(tmp_path / "work" / "cache")


def test_a_step_whose_needs_failed_is_not_begun(tmp_path):
    planned = [
        Step("build", python("raise SystemExit(1)"), 60),
        Step("kernels", python("print('ran')"), 60, needs=("build",)),
        Step("others", python("pass"), 60),
    ]
    outcomes = run(planned, tmp_path)
    assert [(outcome.code, outcome.note) for outcome in outcomes[1:]] == [(None, "not run: build failed"), (0, "")]
    assert not (tmp_path / "work" / "kernels.log").exists()
    assert run(planned[1:], tmp_path)[0].code == 0, "the build is not asked for again where only these are wanted"


def test_the_archive_is_whole_after_every_step(tmp_path):
    archive = tmp_path / "out" / visit.ARCHIVE
    code = (
        "import tarfile; names = tarfile.open({!r}).getnames();"
        " assert 'work/first.log' in names and 'work/large' not in names, names"
    )
    planned = [
        Step("first", python(f"open({str(tmp_path / 'work' / 'large')!r}, 'wb').truncate(7 << 20)"), 60),
        Step("second", python(code.format(str(archive))), 60),
    ]
    assert [outcome.code for outcome in run(planned, tmp_path)] == [0, 0]
    with tarfile.open(archive) as file:
        assert {"work/first.log", "work/second.log", "work/summary.json"} == set(file.getnames())
    assert {path.name for path in (tmp_path / "out").iterdir()} == {visit.ARCHIVE, visit.SUMMARY}


def test_a_stopped_step_takes_its_children_with_it(tmp_path):
    alive = tmp_path / "alive"
    code = (
        "import time, pathlib\nfor i in range(600):\n time.sleep(0.2)\n"
        f" pathlib.Path({str(alive)!r}).write_text(str(i))"
    )
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    run([Step("parent", python(parent), 8)], tmp_path)
    before = alive.read_text()
    time.sleep(1.5)
    assert alive.read_text() == before


def test_what_a_step_leaves_running_ends_with_it(tmp_path):
    sleeper = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    assert run([Step("leaving", python(sleeper), 60)], tmp_path)[0].ok
    left = int((tmp_path / "work" / "leaving.log").read_text())
    for _ in range(100):
        state = Path(f"/proc/{left}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it runs beside the next step")


def test_a_step_out_of_time_is_interrupted_before_it_is_killed(tmp_path):
    """What it has measured until then is written."""
    code = (
        "import time\ntry: time.sleep(60)\nexcept KeyboardInterrupt: print('written', flush=True)\n"
        "time.sleep({})\nprint('lingering', flush=True)"
    )
    planned = [Step("yielding", python(code.format(0)), 5), Step("clinging", python(code.format(60)), 5)]
    outcomes = run(planned, tmp_path)
    assert [(outcome.name, outcome.note) for outcome in outcomes] == [
        ("yielding", "stopped after 5 s"),
        ("clinging", "stopped after 5 s"),
    ]
    assert (tmp_path / "work" / "yielding.log").read_text() == "written\nlingering\n"
    assert (tmp_path / "work" / "clinging.log").read_text() == "written\n"


def test_an_interrupted_visit_leaves_no_step_running(tmp_path, monkeypatch):
    started = []

    class Interrupted(Child):
        def wait(self, seconds):
            if self not in started:
                started.append(self)
                raise KeyboardInterrupt
            return super().wait(seconds)

    monkeypatch.setattr(steps, "Child", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        run([Step("endless", python("import time; time.sleep(60)"), 60)], tmp_path)
    assert started[0].code is not None


def test_a_process_that_cannot_be_killed_does_not_hold_up_the_visit(tmp_path, monkeypatch):
    """As one that waits for the driver, which waits for a kernel that never ends."""
    killed = []
    kill = os.killpg
    monkeypatch.setattr(child.os, "killpg", lambda pid, number: killed.append(pid))
    for name in ("INTERRUPT_S", "GRACE_S"):
        monkeypatch.setattr(child, name, 0.2)
    planned = [Step("stuck", python("import time; time.sleep(20)"), 5), Step("next", python("pass"), 60)]
    stuck, following = run(planned, tmp_path)
    assert stuck.code is None and "does not end" in stuck.note and killed
    assert following.code == 0
    kill(killed[0], signal.SIGKILL)


def test_the_budget_ends_the_visit(tmp_path):
    planned = [Step("first", python("pass"), 60), Step("second", python("pass"), 60)]
    outcomes = run(planned, tmp_path, budget=0)
    assert [(outcome.code, outcome.note) for outcome in outcomes] == [(None, "no time left")] * 2


def planned(stage, tmp_path):
    return STAGES[stage].steps(tmp_path, tmp_path / "work", 4)


def test_what_is_imported_before_the_forks_touches_no_gpu():
    """CUDA does not work in the fork of a process that has used it."""
    code = (
        "import torch\nasked = []\n"
        "for name in ('is_available', 'device_count', 'current_device', 'get_device_capability', 'init', '_lazy_init',"
        " 'get_device_properties', 'synchronize'):\n"
        " setattr(torch.cuda, name, lambda *args, name=name: asked.append(name))\n"
        "from benchmarks.gpu import visit\nvisit.preload()\nimport sys\n"
        "assert 'tests.support.cuda_emulation' in sys.modules and 'fastlora._C' not in sys.modules\nprint(asked)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "[]\n", done.stderr


def test_the_budgets_are_those_of_a_short_visit():
    assert {name: stage.budget for name, stage in STAGES.items()} == {"contact": 230, "measure": 200, "second": 230}


@pytest.mark.parametrize(
    "stage, order",
    (
        ("contact", ("build", "info", "cuda tests", "mark", "precompile", "triton tests", "mark triton", "memcheck")),
        ("measure", ("build", "info", "sweep", "ncu forward", "ncu backward", "bench layer")),
        ("second", ("build", "info", "cuda tests", "mark", "tune")),
    ),
)
def test_a_stage_is_in_order_of_worth_and_fits_its_commands(tmp_path, stage, order):
    found = planned(stage, tmp_path)
    names = [step.name for step in found]
    assert len(set(names)) == len(names) and sorted(order, key=names.index) == list(order)
    assert all(set(step.needs) <= set(names) for step in found)
    for step in found:
        for argument in step.command:
            if argument.startswith("tests/"):
                assert (ROOT / argument).exists(), argument
            assert "pip" not in argument.split()


def test_make_gpu_installs_nothing():
    """Such a machine may have no network."""
    command = ["make", "--dry-run", "gpu", "STAGE=measure", f"PYTHON={sys.executable}"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "benchmarks.gpu --stage measure" in shown and "pip" not in shown


@pytest.fixture
def one_step(tmp_path, monkeypatch):
    def use(code):
        stage = Stage(60, lambda output, work, workers: [Step("only", python(code), 60)])
        monkeypatch.setitem(STAGES, "contact", stage)
        monkeypatch.setattr(visit, "ROOT", tmp_path / "checkout")
        return tmp_path / "gpu"

    return use


@pytest.mark.parametrize("code, expected", [("pass", 0), ("raise SystemExit(5)", 1)])
def test_the_exit_code_tells_whether_all_went_well(one_step, code, expected):
    output = one_step(code)
    assert CliRunner().invoke(main, ["--output", str(output)]).exit_code == expected
    assert json.loads((output / "summary.json").read_text())["stage"] == "contact"


def test_an_earlier_visits_folder_is_set_aside(one_step):
    output = one_step("pass")
    output.mkdir()
    (output / "bench.json").write_text("of an earlier visit")
    runner = CliRunner()
    assert runner.invoke(main, ["--output", str(output)]).exit_code == 0
    assert (output / "bench.json").exists()  # a folder of something else
    assert runner.invoke(main, ["--output", str(output), "--only", "only"]).exit_code == 0
    assert (output / "bench.json").exists()  # this visit goes on
    assert runner.invoke(main, ["--output", str(output)]).exit_code == 0
    assert {path.name for path in output.iterdir()} == {visit.ARCHIVE, visit.SUMMARY}
    (earlier,) = (path for path in output.parent.iterdir() if path.name.startswith("gpu-"))
    assert (earlier / "bench.json").exists()


def test_the_command_line_names_unknown_steps(one_step):
    refused = CliRunner().invoke(main, ["--only", "nothing", "--output", str(one_step("pass"))])
    assert refused.exit_code == 2 and "no step 'nothing'" in refused.output


def supervised(tmp_path, text, *options):
    """The output and exit code of benchmarks.gpu.supervise over a file of tests."""
    (tmp_path / "test_it.py").write_text(text)
    command = [sys.executable, "-m", "benchmarks.gpu.supervise", *options, "--", str(tmp_path), "-c", os.devnull]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return done.stdout + done.stderr, done.returncode


def test_a_test_that_hangs_or_dies_costs_itself_alone(tmp_path):
    text = """
import ctypes, os, time
def test_first(): pass
def test_hangs(): time.sleep(60)
def test_exits(): os._exit(7)
def test_crashes(): ctypes.string_at(0)
def test_last(): pass
"""
    said, code = supervised(tmp_path, text, "--limit", "2")
    assert code == 1 and "tests: 2 died, 1 hung, 2 passed" in said
    assert "HUNG" in said and "in test_hangs" in said, "with its stack"
    assert "test_exits: the process ended with exit code 7" in said
    assert "test_crashes: the process ended with signal 11" in said


def test_a_skip_for_want_of_a_gpu_is_a_failure(tmp_path):
    text = """
import pytest
def test_it(): pass
@pytest.mark.skip(reason="needs two GPUs")
def test_two(): pass
@pytest.mark.skip(reason="no CUDA device")
def test_one(): pass
"""
    said, code = supervised(tmp_path, text, "--may-skip", "needs two GPUs")
    assert code == 1 and "NOT RUN" in said and "no CUDA device" in said
    assert "tests: 1 not run, 1 passed, 1 skipped" in said
    said, code = supervised(tmp_path, text, "--may-skip", "needs two GPUs", "--may-skip", "no CUDA")
    assert code == 0 and "tests: 1 passed, 2 skipped" in said


@pytest.mark.parametrize(
    "text, found",
    (("import no_such_package_at_all", "No module named 'no_such_package_at_all'"), ("", "no test was found")),
)
def test_what_cannot_be_collected_is_a_failure(tmp_path, text, found):
    said, code = supervised(tmp_path, text)
    assert code == 1 and found in said


def test_tests_are_shared_out_among_processes(tmp_path):
    text = "import pytest\n@pytest.mark.parametrize('i', range(5))\ndef test_it(i): pass"
    said, code = supervised(tmp_path, text, "--workers", "3")
    assert code == 0 and "tests: 5 passed" in said


def test_objects_of_other_sources_are_not_linked(tmp_path, monkeypatch):
    setup = objects.toolkit.load_setup()
    assert "there are none" in objects.why_unusable(tmp_path, setup)
    (tmp_path / "digest").write_text(objects.digest(setup))
    assert "missing" in objects.why_unusable(tmp_path, setup)
    for name in setup.kernel_objects():
        (tmp_path / name).touch()
    assert objects.why_unusable(tmp_path, setup) is None
    monkeypatch.setattr(objects.toolkit, "source_digest", lambda: "others")
    assert "other sources" in objects.why_unusable(tmp_path, setup)


def test_a_copy_without_history_knows_its_commit_and_whether_it_changed(tmp_path, monkeypatch):
    (tmp_path / "fastlora").mkdir()
    source = tmp_path / "fastlora" / "environment.py"
    source.write_text("")
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment.commit() is None
    with monkeypatch.context() as patch:
        patch.setattr(environment, "_commit_of", lambda root: "0123456789ab")
        environment.note_commit(tmp_path)
    assert environment.commit() == "0123456789ab"
    source.write_text("changed = True")
    assert environment.commit() == "0123456789ab+changes"
