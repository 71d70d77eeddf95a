"""Calls of Python and C functions that a prepared launch takes, which are the same in every run; times are not held."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import host_calls
from tests.support import cuda_runtime

ROOT = Path(__file__).resolve().parents[2]
MOST_FORWARD, MOST_BACKWARD = 60, 90


@pytest.mark.parametrize("backend", host_calls.BACKENDS)
def test_a_prepared_launch_takes_few_calls(backend):
    """With dropout, which takes the most. In a process of its own: the driver and runtime are replaced there."""
    if backend == "cuda" and cuda_runtime.unavailable():
        pytest.skip(f"CUDA: {cuda_runtime.unavailable()}")
    command = [sys.executable, "-m", "benchmarks.host_calls", "--json", "--rounds=1", "--dropout=0.1"]
    done = subprocess.run([*command, f"--backend={backend}"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 5 < found["forward_calls"] <= MOST_FORWARD and 5 < found["backward_calls"] <= MOST_BACKWARD, found
    assert found["backend"] == backend and all(found[f"{name}_us"] > 0 for name in ("forward", "backward", "linear"))


def test_calls_are_counted():
    def call():
        len("three"), abs(-1)
        (lambda: None)()

    assert host_calls.count_calls(call) == 3
