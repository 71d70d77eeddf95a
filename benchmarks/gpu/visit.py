"""Ten minutes on a machine with a GPU: build, test on hardware, measure, tune; everything under one folder.

    python -m benchmarks.gpu --output gpu-visit

Needs Python, torch with CUDA, Triton, click, pytest, ninja and nvcc; no network, and nothing installed: the checkout is
used as it is. Every step runs in a process of its own with a time limit, writes its log, and cannot stop the others;
one that is out of time is interrupted before it is killed, so that it can write what it has. A folder of an earlier
visit is set aside. The exit code is 1 where a step failed or ran out of time.
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from benchmarks import ROOT

CLI = (sys.executable, "-c", "from fastlora.cli.main import main; main()")
BUILD = "from benchmarks.cuda_resources.toolkit import load_setup; print('built', load_setup().build_in_place())"
# Small layers on every tile: the checkers slow kernels down by orders of magnitude.
CHECKED = ("-m", "pytest", "-q", "-x", "tests/kernels/test_cuda_device.py", "-k", "small_layers")
TAIL_LINES = 15
INTERRUPT_S = 5.0  # for an interrupted one to write what it has measured
GRACE_S = 5.0  # for a killed one to be gone


@dataclass(frozen=True)
class Step:
    """A command, its time limit in seconds, and whether the rest is worthless without it."""

    name: str
    command: tuple[str, ...]
    limit: float
    essential: bool = False


@dataclass(frozen=True)
class Outcome:
    """What became of a step: its exit code (None: out of time, or never started) and its time in seconds."""

    name: str
    code: int | None
    seconds: float
    note: str = ""


def pytest_command(workers: int, limit: int) -> tuple[str, ...]:
    """pytest with as many of the wished-for plugins as are installed here. A file that cannot be imported, for want of
    a package, would otherwise keep all the others from running."""
    command = (sys.executable, "-m", "pytest", "-q", "-rs", "--continue-on-collection-errors")
    if importlib.util.find_spec("pytest_timeout"):
        command += ("--timeout", str(limit))
    return (*command, "-n", str(workers)) if importlib.util.find_spec("xdist") else command


def sanitizer(tool: str) -> tuple[str, ...]:
    """Python under compute-sanitizer, which watches our kernels alone and whose findings fail the tests. Every tensor
    is an allocation of its own, or an access past its end would meet its neighbour's memory."""
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    options = ("--tool", tool, "--kernel-name", "kns=lora_", "--error-exitcode", "9")
    return ("env", "PYTORCH_NO_CUDA_MEMORY_CACHING=1", found, *options, sys.executable)


def plan(output: Path, workers: int) -> list[Step]:
    """The steps in order of worth: what is right before what is fast, headline before grid. Their limits add up to more
    than the visit has: each step gets what is left, and few need all of theirs."""
    bench = (*CLI, "bench", "--device", "cuda", "--seconds", "1.5")
    layer = (*bench, "--only", "layer", "--output")
    tests = pytest_command(workers, 100)
    others = ("--ignore", "tests/values", "--ignore", "tests/emulator", "-k", "not test_cuda")
    return [
        Step("device", ("nvidia-smi", "-q"), 20),
        Step("build", (sys.executable, "-c", BUILD), 150),
        Step("info", (*CLI, "info", "--json"), 60, essential=True),
        Step("cuda tests", (*tests, "tests/kernels/test_cuda_device.py"), 100),
        Step("triton tests", (*tests, "tests/values"), 120),
        Step("memcheck", (*sanitizer("memcheck"), *CHECKED), 60),
        Step("mark", (sys.executable, "-m", "benchmarks.mark", "--output", str(output / "mark.json")), 60),
        Step("bench layer", (*layer, str(output / "bench-layer"), "--skip", "compiled peft"), 110),
        Step("tune", (*CLI, "tune", "--seconds", "6"), 90),
        Step("racecheck", (*sanitizer("racecheck"), *CHECKED), 60),
        Step("conformance", (*tests, "tests/emulator/test_conformance.py"), 40),
        Step("bench host", (*bench, "--only", "host", "--only", "decoder", "--output", str(output / "bench-host")), 50),
        Step("other tests", (*tests, "tests", *others), 150),
        Step("bench layer, tuned", (*layer, str(output / "bench-layer-tuned")), 150),
        Step("bench finetune", (*bench, "--only", "finetune", "--output", str(output / "bench-finetune")), 60),
    ]


def environment(output: Path) -> dict[str, str]:
    """This process's variables, the checkout on the path, and the tuned choices kept under ``output``."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(output / "cache"), "PYTHONUNBUFFERED": "1"}


def run_step(step: Step, output: Path, seconds_left: float) -> Outcome:
    """Runs one step, its output into a log of its name; it gets its own limit or what is left, whichever is less."""
    limit = min(step.limit, seconds_left)
    if limit < 5:
        return Outcome(step.name, None, 0.0, "no time left")
    log, started = output / f"{step.name.replace(', ', '-').replace(' ', '-')}.log", time.monotonic()
    with open(log, "w") as file:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env=environment(output),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            file.write(f"cannot run: {error}")
            return Outcome(step.name, None, 0.0, f"cannot run: {error}")
        try:
            code, note = process.wait(limit), ""
        except subprocess.TimeoutExpired:
            code, note = None, f"stopped after {limit:.0f} s" + _stop(process)
        except BaseException:  # Ctrl-C does not reach a session of its own
            _stop(process)
            raise
    return Outcome(step.name, code, round(time.monotonic() - started, 1), note)


def _stop(process: subprocess.Popen) -> str:
    """Interrupts, then kills the process and its whole session: a build's compilers or a test run's workers would
    otherwise go on beside the next step. Returns what is to be added to the step's note."""
    for number, grace in ((signal.SIGINT, INTERRUPT_S), (signal.SIGKILL, GRACE_S)):
        with suppress(ProcessLookupError):  # all of them are gone
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(grace)
    gone = process.poll() is not None
    return "" if gone else ", and does not end: the driver may be waiting for a kernel that hangs"


def log_tail(output: Path, name: str) -> str:
    """The last lines of a step's log."""
    path = output / f"{name.replace(', ', '-').replace(' ', '-')}.log"
    return "\n".join(path.read_text(errors="replace").splitlines()[-TAIL_LINES:]) if path.exists() else ""


def run_plan(steps: list[Step], output: Path, budget: float) -> list[Outcome]:
    """Runs the steps until the budget (seconds) is spent; keeps summary.json up to date after each."""
    output.mkdir(parents=True, exist_ok=True)
    ends, outcomes = time.monotonic() + budget, []
    for step in steps:
        outcome = run_step(step, output, ends - time.monotonic())
        outcomes.append(outcome)
        click.echo(
            f"{outcome.name}: {'ok' if outcome.code == 0 else outcome.note or f'exit code {outcome.code}'}"
            f" ({outcome.seconds} s)"
        )
        if outcome.code != 0:
            click.echo(log_tail(output, outcome.name))
        (output / "summary.json").write_text(json.dumps([asdict(entry) for entry in outcomes], indent=1) + "\n")
        if step.essential and outcome.code != 0:
            break
    return outcomes


def set_aside(output: Path) -> None:
    """Renames the folder of an earlier visit: its files would pass for those of steps that do not run this time, and
    its tuned choices would serve the bench that should be without any."""
    summary = output / "summary.json"
    if summary.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(summary.stat().st_mtime))
        output.rename(output.with_name(f"{output.name}-{stamp}"))


@click.command()
@click.option("--output", default="gpu-visit", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--minutes", default=9.5, show_default=True, type=click.FloatRange(min=0.1), help="For everything.")
@click.option("--workers", default=8, show_default=True, type=click.IntRange(1), help="Test processes.")
@click.option("--only", multiple=True, metavar="STEP", help="These steps; may be repeated.")
def main(output: Path, minutes: float, workers: int, only: tuple[str, ...]) -> None:
    """Build, test, measure and tune on this machine's GPU."""
    output = output.resolve()
    steps = plan(output, workers)
    unknown = [name for name in only if name not in {step.name for step in steps}]
    if unknown:
        raise click.UsageError(f"no step {unknown[0]!r}; choose from {', '.join(step.name for step in steps)}")
    if not only:
        set_aside(output)
    outcomes = run_plan([step for step in steps if not only or step.name in only], output, minutes * 60)
    click.echo(f"everything is under {output}")
    sys.exit(0 if all(outcome.code == 0 for outcome in outcomes) else 1)
