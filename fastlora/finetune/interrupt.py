"""Ctrl-C and SIGTERM at a moment when the state can be saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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

    def __enter__(self) -> "Interruption":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        again, self._requested = self._requested, True
        if not self._deferring:
            raise Interrupted
        if again:
            raise KeyboardInterrupt

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
