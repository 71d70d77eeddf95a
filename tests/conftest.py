"""What every test shares."""

import gc
import signal

import pytest
import torch

from tests.support.numerics import poison

# A shell that starts the tests in the background has them ignore Ctrl-C, and so every process that they start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish():
    """What has been imported and collected stays, and the emulator's translations are many objects: as it is set by
    default, the garbage collector takes a tenth of the time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000)


@pytest.fixture(autouse=True)
def float32_precision():
    """torchao allows TF32 for the whole process when it quantises a model."""
    before = torch.get_float32_matmul_precision()
    yield
    if torch.get_float32_matmul_precision() != before:
        torch.set_float32_matmul_precision(before)


@pytest.fixture
def poisoned(monkeypatch):
    poison(monkeypatch)
