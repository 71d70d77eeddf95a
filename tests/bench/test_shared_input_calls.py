"""What layers that share an input cost the host: a group against its single layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import group_calls, host_calls
from tests.support import cuda_runtime

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", host_calls.BACKENDS)
def test_a_group_takes_no_more_calls_and_time_than_its_layers(backend):
    """By the launches of a GPU's calls. In a process of its own: the driver and the runtime are replaced there. Of time
    the least of many turns is taken, in CPU time of the thread: others can only add to it; a tenth is left to chance.
    """
    if backend == "cuda" and cuda_runtime.unavailable():
        pytest.skip(f"CUDA: {cuda_runtime.unavailable()}")
    command = [sys.executable, "-m", "benchmarks.group_calls", "--json", "--rounds=100", f"--backend={backend}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert [(row["layers"], row["dropout"]) for row in rows] == [(g, p) for g in group_calls.GROUPS for p in (0.0, 0.1)]
    for row in rows:
        assert row["counts"][backend] == 2 and row["counts"]["groups"] == 1 and not row["counts"]["fallbacks"]
        for what in group_calls.WHAT:
            assert 50 < row[f"group {what} calls"] <= row[f"single {what} calls"], (what, row)
            assert row[f"group {what} us"] <= 1.1 * row[f"single {what} us"], (what, row)


@pytest.mark.parametrize("count", group_calls.GROUPS.values(), ids=group_calls.GROUPS)
def test_what_the_rule_costs_on_the_cpu_is_bounded(count):
    """Calls on top of those of single layers, which call no op there: the parent's hooks, the checks in front of every
    result that is handed out."""
    calls = group_calls.make_calls(count, 0.0, features=32, dtype=torch.float32)
    found = {name: host_calls.count_calls(call) for name, call in calls.items()}
    assert found["group forward"] <= found["single forward"] + 22, found
    assert found["group step"] <= found["single step"] + 16, found
