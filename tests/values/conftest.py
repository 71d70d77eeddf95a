"""Kernels run for real: on a GPU where there is one, else in Triton's interpreter.

Triton decides when it is imported, so these tests want a process of their own with TRITON_INTERPRET=1 (``make test``
sees to it); elsewhere they say that they did not run."""

import pytest
import torch
import triton

INTERPRETED = triton.knobs.runtime.interpret
HAS_GPU = torch.cuda.is_available()

if INTERPRETED:
    from tests.support import interpreter

    interpreter.install()


def pytest_collection_modifyitems(items):
    if not (HAS_GPU or INTERPRETED):
        reason = pytest.mark.skip(reason="needs a GPU, or a process with TRITON_INTERPRET=1: see `make test`")
        for item in items:
            if "/values/" in str(item.path):
                item.add_marker(reason)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")
