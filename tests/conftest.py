"""What every test shares."""

import signal

import pytest

from tests.support.numerics import poison

# A shell that starts the tests in the background has them ignore Ctrl-C, and so every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def poisoned(monkeypatch):
    poison(monkeypatch)
