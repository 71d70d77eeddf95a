"""The visit to a machine with a GPU that is bare and offline: build, test, measure, tune, in minutes.

    python -m benchmarks.gpu.objects                       # before: on any machine with nvcc
    python -m benchmarks.gpu --stage contact --output gpu-visit

Needs Python, torch with CUDA, Triton, click, pytest, ninja and nvcc; no network, and nothing installed: the checkout is
used as it is, with build/gpu-objects and build/commit where they were made. Every step runs in a process of its own
with a time limit, writes its log, and cannot stop the others; one whose needs failed is not begun, and says so. What
comes back are few flat files: summary.json, the results of the mark and the sweep, and visit.tar.gz with all logs, made
anew after every step. The exit code is 1 where a step failed, ran out of time, or could not run.
"""

import contextlib
import importlib
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import click

from benchmarks import ROOT
from benchmarks.gpu.stages import STAGES
from benchmarks.gpu.steps import Outcome, Step, log_name, run_step
from fastlora.environment import commit

TAIL_LINES = 15
ARCHIVE, SUMMARY = "visit.tar.gz", "summary.json"
LARGEST_BYTES = 6 << 20  # of a file in the archive
# What every step would import; none of it touches a GPU.
PRELOADED = (
    "torch", "triton", "pytest", "fastlora", "fastlora.ops", "fastlora.dispatch", "fastlora.bench.layer",
    "benchmarks.judge", "tests.support.cuda_emulation", "tests.support.numerics",
)  # fmt: skip


def preload() -> None:
    """Imports once what the steps' processes share. A step says itself what it cannot import."""
    for name in PRELOADED:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def variables(work: Path) -> dict[str, str]:
    """What the steps' environment has more than this process's: the checkout on the path, and choices of ``fastlora
    tune`` kept in ``work``."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {"PYTHONPATH": path, "XDG_CACHE_HOME": str(work / "cache"), "PYTHONUNBUFFERED": "1"}


def log_tail(work: Path, name: str, lines: int = TAIL_LINES) -> str:
    """The last lines of a step's log."""
    path = work / log_name(name)
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:]) if path.exists() else ""


def write_archive(work: Path, output: Path) -> None:
    """All of ``work`` into one file, which is whole at any moment. Larger files than LARGEST_BYTES stay behind."""
    fresh = output / f".{ARCHIVE}"
    with tarfile.open(fresh, "w:gz", compresslevel=6) as archive:
        for path in sorted(work.rglob("*")):
            if path.is_file() and path.stat().st_size <= LARGEST_BYTES:
                archive.add(path, path.relative_to(work.parent))
    fresh.replace(output / ARCHIVE)


def run_plan(
    steps: list[Step], output: Path, work: Path, budget: float, about: Mapping[str, object] | None = None
) -> list[Outcome]:
    """Runs the steps until the budget (seconds) is spent; keeps summary.json and the archive up to date after each."""
    for folder in (output, work):
        folder.mkdir(parents=True, exist_ok=True)
    ends = time.monotonic() + budget
    outcomes: dict[str, Outcome] = {}
    for step in steps:
        missing = [name for name in step.needs if name in outcomes and not outcomes[name].ok]
        if missing:
            outcome = Outcome(step.name, None, 0.0, f"not run: {', '.join(missing)} failed")
        else:
            outcome = run_step(step, work, ends - time.monotonic(), variables(work))
        outcomes[step.name] = outcome
        said = "ok" if outcome.ok else outcome.note or f"exit code {outcome.code}"
        click.echo(f"{outcome.name}: {said} ({outcome.seconds} s)")
        if not outcome.ok and not missing:
            click.echo(log_tail(work, outcome.name))
        rows = [{**asdict(each), "last_line": log_tail(work, each.name, 1)} for each in outcomes.values()]
        summary = json.dumps({**(about or {}), "budget_s": round(budget, 1), "steps": rows}, indent=1) + "\n"
        (output / SUMMARY).write_text(summary)
        (work / SUMMARY).write_text(summary)
        write_archive(work, output)
    return list(outcomes.values())


def set_aside(output: Path) -> None:
    """Renames the folder of an earlier visit: its files would pass for those of steps that do not run this time."""
    summary = output / SUMMARY
    if summary.exists():
        stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(summary.stat().st_mtime))
        output.rename(output.with_name(f"{output.name}-{stamp}"))


def visit(
    stage: str, output: Path, work: Path, workers: int, only: tuple[str, ...] = (),
    alter: Callable[[list[Step]], list[Step]] = list,
) -> list[Outcome]:  # fmt: skip
    """One stage. ``alter`` gives the steps that run instead of the plan's: a rehearsal makes them small.

    Raises:
        ValueError: ``only`` names a step that the stage does not have.
    """
    began = time.monotonic()
    plan = STAGES[stage]
    steps = plan.steps(output, work, workers)
    unknown = [name for name in only if name not in {step.name for step in steps}]
    if unknown:
        raise ValueError(f"no step {unknown[0]!r}; choose from {', '.join(step.name for step in steps)}")
    if not only:
        set_aside(output)
        shutil.rmtree(work, ignore_errors=True)  # its tuned choices would serve a bench that should be without any
    preload()
    about = {"stage": stage, "commit": commit(), "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    chosen = [step for step in alter(steps) if not only or step.name in only]
    return run_plan(chosen, output, work, plan.budget - (time.monotonic() - began), about)


@click.command()
@click.option("--stage", default="contact", show_default=True, type=click.Choice(tuple(STAGES)))
@click.option("--output", default="gpu-visit", show_default=True, type=click.Path(file_okay=False, path_type=Path))
@click.option("--workers", default=os.cpu_count(), show_default=True, type=click.IntRange(1), help="Processes.")
@click.option("--only", multiple=True, metavar="STEP", help="These steps; may be repeated.")
def main(stage: str, output: Path, workers: int, only: tuple[str, ...]) -> None:
    """Build, test, measure and tune on this machine's GPU."""
    output = output.resolve()
    try:
        outcomes = visit(stage, output, ROOT / "build" / "gpu-work", workers, only)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    click.echo(f"everything is under {output}")
    sys.stdout.flush()
    sys.exit(0 if all(outcome.ok for outcome in outcomes) else 1)
