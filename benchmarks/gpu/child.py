"""Processes of a visit: forks of one that has imported everything and touched no GPU, so that none waits for imports.

A child leads a session of its own, with which it ends, or, of another child, stays in that one's session.
"""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

INTERRUPT_S = 5.0  # for an interrupted child to write what it has measured
GRACE_S = 5.0  # for a killed one to be gone
_POLL_S = 0.02


class Child:
    """A fork of this process that runs ``work`` with its output at the end of ``log``. Its exit code is that of a
    SystemExit, 0 at the end, and 1 for any other exception, whose traceback is in the log. (The log is opened here,
    once: where that fails, nothing has been started.)"""

    def __init__(self, work: Callable[[], object], log: Path | None = None, *, leads: bool = True):
        sys.stdout.flush()
        sys.stderr.flush()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND) if log else None
        self.leads = leads
        self.started = time.monotonic()
        self.code: int | None = None  # negative: the number of the signal that ended it
        self.pid = os.fork()
        if self.pid == 0:
            _run(work, output, leads)
        if output is not None:
            os.close(output)

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self, seconds: float) -> int | None:
        """The exit code, or None where it still runs after ``seconds``."""
        ends = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < ends:
            time.sleep(_POLL_S)
        return self.code

    def _signal(self, number: int) -> None:
        if self.leads:
            os.killpg(self.pid, number)
        elif self.code is None:
            os.kill(self.pid, number)

    def stop(self, interrupt: bool = True) -> bool:
        """Interrupts (unless told not to), then kills it, and the whole session that it leads. Whether it is gone: one
        that waits for a driver that waits for a kernel may not be."""
        steps = ((signal.SIGINT, INTERRUPT_S), (signal.SIGKILL, GRACE_S))
        for number, grace in steps if interrupt else steps[1:]:
            with suppress(ProcessLookupError):  # all of them are gone
                self._signal(number)
            self.wait(grace)
        return self.poll() is not None


def _run(work: Callable[[], object], output: int | None, leads: bool) -> None:
    code = 1
    try:
        if leads:
            os.setsid()
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        if output is not None:
            os.dup2(output, 1)
            os.dup2(output, 2)
        sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also where a shell had it ignored
        work()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
