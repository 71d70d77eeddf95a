"""Triton's own driver and launchers end in the emulator: the launch path that the other tests' stand-ins leave out."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.triton_driver import LAYOUTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
def test_a_layer_through_the_emulated_driver(tmp_path, dropout_p):
    command = [sys.executable, "-m", "tests.support.triton_driver", str(tmp_path), str(dropout_p)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    layers = 1 if dropout_p else len(LAYOUTS)
    counts = {name: each[: 2 * layers] for name, each in counts.items()}  # behind them: several projections
    assert {name: len(each) for name, each in counts.items()} == dict.fromkeys(counts, 2 * layers), (
        "one launch each way"
    )
    assert all(min(each) > 0 for each in counts.values()), "by descriptors and tensor cores"
