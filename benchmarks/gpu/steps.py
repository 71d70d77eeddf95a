"""One step of a visit: a command, its limit, and what became of it."""

import os
import runpy
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.gpu.child import Child

LEAST_S = 3.0  # with less left, a step is not begun


@dataclass(frozen=True)
class Step:
    """A command and its time limit in seconds.

    command: a program with its arguments, or "-m", a Python module and its arguments, which runs in a fork.
    needs: steps without whose success this one is worthless.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """What became of a step: its exit code (None: out of time, or never started) and its time in seconds."""

    name: str
    code: int | None
    seconds: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.code == 0


def log_name(step: str) -> str:
    return step.replace(", ", "-").replace(" ", "-") + ".log"


def run_step(step: Step, work: Path, seconds_left: float, variables: Mapping[str, str]) -> Outcome:
    """Runs one step, its output into a log of its name in ``work``, with ``variables`` added to the environment. It
    gets its own limit or what is left, whichever is less; out of time, it is interrupted before it is killed."""
    limit = min(step.limit, seconds_left)
    if limit < LEAST_S:
        return Outcome(step.name, None, 0.0, "no time left")
    child = Child(lambda: _execute(step.command, variables), work / log_name(step.name))
    try:
        code, note = child.wait(limit), ""
        if code is None:
            gone = child.stop()
            note = f"stopped after {limit:.0f} s"
            note += "" if gone else ", and does not end: the driver may be waiting for a kernel that hangs"
    except BaseException:  # Ctrl-C does not reach a session of its own
        child.stop()
        raise
    finally:
        child.stop(interrupt=False)  # what it left behind: workers of a test run, a build's compilers
    if code is not None and code < 0:
        note = f"ended by signal {-code}"
    return Outcome(step.name, code, round(time.monotonic() - child.started, 1), note)


def _execute(command: tuple[str, ...], variables: Mapping[str, str]) -> None:
    os.environ.update(variables)
    os.chdir(ROOT)
    if command[0] != "-m":
        try:
            os.execvp(command[0], command)
        except OSError as error:
            sys.exit(f"cannot run {command[0]}: {error}")
    sys.argv = [command[1], *command[2:]]
    runpy.run_module(command[1], run_name="__main__", alter_sys=True)
