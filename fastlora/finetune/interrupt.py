"""Ctrl-C, SIGTERM and SIGHUP at a moment when the state can be saved."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class Interrupted(KeyboardInterrupt):
    """The user asked to stop. Raised between steps, never within one."""


class Interruption:
    """While entered, a signal raises Interrupted: at once, or at the end of a `deferred` block it fell into.

    A second signal within the same block gives up waiting: it raises KeyboardInterrupt there and then. A signal is
    remembered until Interrupted was caught, since Python drops what is raised in a garbage collector's callback.
    """

    def __init__(self) -> None:
        self._deferring = False
        self._requested = False
        self._previous: dict[int, object] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> "Interruption":
        # A signal that is ignored stays ignored: nohup does that to SIGHUP.
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._terminals = [descriptor for descriptor in (1, 2) if _is_terminal(descriptor)]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        again, self._requested = self._requested, True
        if number == getattr(signal, "SIGHUP", None):
            self._leave_terminals()
        if not self._deferring:
            raise Interrupted
        if again:
            raise KeyboardInterrupt

    def _leave_terminals(self) -> None:
        """A terminal that has hung up refuses every write, which would end the process before its state is saved."""
        null = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(null, descriptor)
        os.close(null)
        self._terminals = []

    def caught(self) -> None:
        """Forgets the signal that was answered, so that later `deferred` blocks are not cut by it."""
        self._requested = False

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that must not be cut: a signal takes effect when it has ended."""
        self._raise_if_requested()
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self._raise_if_requested()

    def _raise_if_requested(self) -> None:
        if self._requested:
            raise Interrupted


def _is_terminal(descriptor: int) -> bool:
    try:
        return os.isatty(descriptor)
    except OSError:  # closed
        return False
