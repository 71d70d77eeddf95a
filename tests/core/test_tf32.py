"""Whether a float32 layer may use TF32: what torch's own products do, however it was set."""

import subprocess
import sys

import pytest
import torch

from fastlora.operands import uses_tf32

# Whether TF32 is allowed after a program, in a process of its own: torch's settings know no way back.
TF32_SETTINGS = {
    "": False,
    "matmul.allow_tf32 = True": True,
    "matmul.allow_tf32 = True; matmul.allow_tf32 = False": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.set_float32_matmul_precision('highest')": False,
    "torch.backends.cudnn.allow_tf32 = False": False,
    "torch.backends.cudnn.allow_tf32 = True": False,
}
TF32_SETTINGS_SINCE_2_9 = {
    "torch.backends.fp32_precision = 'tf32'": True,
    "torch.backends.fp32_precision = 'ieee'": False,
    "matmul.fp32_precision = 'tf32'": True,
    "matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'; matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'ieee'; matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cudnn.fp32_precision = 'tf32'": True,  # it is all of CUDA's
    # A mixture, after which torch raises on a read of the old flag.
    "torch.set_float32_matmul_precision('high'); matmul.fp32_precision = 'ieee'": False,
    "matmul.allow_tf32 = False; matmul.fp32_precision = 'tf32'": True,
}


@pytest.mark.skipif(not hasattr(torch._C, "_set_fp32_precision_setter"), reason="this torch has the old flags alone")
def test_every_way_of_setting_tf32_is_read():
    found = _tf32_after({**TF32_SETTINGS, **TF32_SETTINGS_SINCE_2_9})
    assert found == {**TF32_SETTINGS, **TF32_SETTINGS_SINCE_2_9}


def test_the_old_ways_are_read_where_there_is_no_new_one(monkeypatch):
    class OldFlags:
        allow_tf32 = True

    monkeypatch.setattr(torch.backends.cuda, "matmul", OldFlags)
    assert uses_tf32(torch.float32) and not uses_tf32(torch.bfloat16)


def _tf32_after(settings) -> dict[str, bool]:
    """What each program leaves, in forks of one process that has imported the backend."""
    program = f"""
import os, torch
from fastlora.operands import uses_tf32
matmul = torch.backends.cuda.matmul
for setting in {list(settings)!r}:
    if os.fork() == 0:
        exec(setting)
        print(int(uses_tf32(torch.float32)), flush=True)
        os._exit(0)
    os.wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return dict(zip(settings, (line == "1" for line in done.stdout.split()), strict=True))
