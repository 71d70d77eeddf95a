"""The host's side of a Triton launch, as far as it can be seen without a device: the kernels are stood in for."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from fastlora.backends.triton import launch as triton_lora
from fastlora.problem import Needs
from tests.support import launches, numerics

pytest.importorskip("triton")


class Recorder:
    """Stands in for a kernel: notes each launch, and on which device it was made."""

    def __init__(self, device: list):
        self.device, self.launches = device, []

    def __getitem__(self, grid):
        return lambda *args, **options: self.launches.append((self.device[-1], grid, args, options))


@pytest.fixture
def kernels(monkeypatch):
    current = ["another device"]

    @contextmanager
    def device_of(tensor):
        current.append(tensor.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    found = {name: Recorder(current) for name in ("lora_forward_kernel", "lora_backward_kernel")}
    for name, recorder in found.items():
        monkeypatch.setattr(triton_lora, name, recorder)
    return found


def test_launches_are_made_on_the_tensors_device(kernels):
    """Triton takes the current device; a second GPU's tensors would meet the first one's stream."""
    c = numerics.draw_case(40, 48, 72, 8, torch.bfloat16)
    _, s = launches.forward(triton_lora, c.x, c.weight, c.lora_a, c.lora_b, c.bias, 1.0, 0.0, None)
    launches.backward(triton_lora, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, 1.0, 0.0, None, Needs(*[True] * 4))
    for recorder in kernels.values():
        assert [device for device, *_ in recorder.launches] == [torch.device("cpu")]


def test_no_value_of_a_seed_is_compiled_for():
    for kernel in (triton_lora.lora_forward_kernel, triton_lora.lora_backward_kernel):
        if not hasattr(kernel, "params"):
            pytest.skip("Triton interprets in this process")
        by_name = {param.name: param for param in kernel.params}
        assert all(by_name[name].do_not_specialize for name in ("seed", "n_words", "wave"))
    assert {param.name: param for param in triton_lora.lora_backward_kernel.params}["gradients_last"].do_not_specialize


INTERPRETED = """
import json, torch, fastlora
results = {}
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    torch.manual_seed(0)
    x, weight, a, b = (torch.randn(*shape).to(dtype) for shape in ((40, 24), (16, 24), (3, 24), (16, 3)))
    try:
        y = fastlora.lora_linear(x, weight, a, b, 0.5, backend="triton")
        exact = fastlora.lora_linear(*(t.double() for t in (x, weight, a, b)), 0.5)
        results[str(dtype)] = (y.double() - exact).abs().max().item()
    except ValueError as error:
        results[str(dtype)] = str(error)
print(json.dumps(results))
"""


@pytest.mark.parametrize("mended", (False, True), ids=("as it is", "loops mended"))
def test_the_interpreter_gives_right_values_or_a_reason(mended):
    """As a user meets it, without the tests' repairs; and with the one that lets Triton 3.6 run under any NumPy."""
    repair = "from tests.support import interpreter; interpreter.mend_range()\n" if mended else ""
    done = subprocess.run(
        [sys.executable, "-c", repair + INTERPRETED],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    found = json.loads(done.stdout)
    if isinstance(found["torch.float32"], str):
        assert not mended and all("install numpy<2.4" in reason for reason in found.values())
        return
    assert found["torch.float32"] < 1e-4
    for dtype in ("torch.float16", "torch.bfloat16"):
        assert f"serves float32 alone, not {dtype}" in found[dtype] and "unset TRITON_INTERPRET" in found[dtype]
