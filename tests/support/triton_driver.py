"""A layer's two launches through Triton's own driver and launchers, over the emulated CUDA driver.

    python -m tests.support.triton_driver DIRECTORY DROPOUT

A program of its own: whoever opens libcuda.so.1 in its process gets the emulated one, which is put into DIRECTORY.
Prints the launches' counts as JSON; exits with an error where a launch or a result is wrong.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from fastlora import one_launch
from tests.support import cuda_driver, numerics

STREAM = 0x5712EA
N_SMS = 4
MATRICES = ("x", "weight", "lora_a", "lora_b", "dy")


def as_cuda() -> None:
    """What Triton's driver asks torch, as it is where one GPU is current."""
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: cuda_driver.EmulatedDevice.capability
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM


def _noting(device: cuda_driver.EmulatedDevice, launch: Callable) -> Callable:
    """CompiledLaunch.__call__, which tells the device of the tensors and kernels that it is called with."""

    def noting(self, *args):
        for tensor in _flat(args):
            if isinstance(tensor, torch.Tensor):
                device.know(tensor)
        self.compile(*args)
        device.ptx_of[self.compiled.function] = self.compiled.asm["ptx"]
        launch(self, *args)
        assert self._direct is not None, "Triton's own launcher was not taken"
        if device.error:
            raise device.error

    return noting


def _flat(args: tuple) -> Iterator:
    for each in args:
        if isinstance(each, tuple):
            yield from _flat(each)
        else:
            yield each


def _in_wide_rows(matrix: torch.Tensor) -> torch.Tensor:
    """The same between other columns."""
    return torch.nn.functional.pad(matrix, (8, 8), value=7.0)[:, 8:-8]


def _off_by_one(matrix: torch.Tensor) -> torch.Tensor:
    """The same, one element behind 16 bytes."""
    return torch.cat([matrix.new_full((1,), 7.0), matrix.flatten()])[1:].view(matrix.shape)


# How the matrices lie, call after call, without dropout: the launch of one layout must not serve another.
LAYOUTS = {"first": {}, "moved": {}, "wide": dict.fromkeys(("x", "weight", "lora_a", "lora_b", "dy"), _in_wide_rows)}
LAYOUTS |= {"S off by one": {"s": _off_by_one}, "x off by one": {"x": _off_by_one}, "moved again": {}}


def run(directory: Path, dropout_p: float) -> dict[str, list[int]]:
    """Forward and backward of a bf16 layer with checked results; without dropout in one layout after the other."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    opened = cuda_driver.as_libcuda(directory)
    as_cuda()
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from fastlora import dispatch, selection
    from fastlora.backends.target import Target
    from fastlora.backends.triton import compiled
    from fastlora.backends.triton import launch as backend
    from fastlora.problem import BackwardOperands, ForwardOperands, Needs

    device = cuda_driver.EmulatedDevice(driver=opened)
    triton.runtime.driver.set_active(CudaDriver())
    compiled.CompiledLaunch.__call__ = _noting(device, compiled.CompiledLaunch.__call__)
    selection.why_unsupported = lambda name, spec: None
    backend.target_of = lambda device: Target(90, N_SMS)
    drawn = numerics.draw_case(100, 136, 200, 16, torch.bfloat16, dropout_p=dropout_p)
    for layout in [*LAYOUTS.values()][: 1 if dropout_p else None]:
        matrices = {name: layout.get(name, torch.clone)(getattr(drawn, name)) for name in MATRICES}
        c = dataclasses.replace(drawn, **matrices)
        shared = (c.weight, c.lora_a, c.lora_b)
        numbers = (c.scaling, c.dropout_p, c.seed)
        y, s = dispatch.forward(ForwardOperands(c.x, *shared, c.bias, *numbers), "triton")
        s = layout.get("s", torch.clone)(s)
        needs = Needs(True, True, True, True)
        gradients = dispatch.backward(BackwardOperands(c.dy, c.x, *shared, s, *numbers), needs, "triton")
        numerics.assert_accurate({"y": y, **gradients._asdict()}, c)
    if dropout_p:
        _run_projections(device)
    return {name: [getattr(each, name) for each in device.stats] for name in ("tma_loads", "wgmma", "threads")}


def _run_projections(device: cuda_driver.EmulatedDevice) -> None:
    """Projections that share an input, by tuples of arguments: null pointers, seeds and the number 1 among them; twice,
    for what is compiled for the first call's seeds serves others."""
    from unittest import mock

    from fastlora.backends.target import Target
    from fastlora.backends.triton import projection_launch
    from fastlora.projections import SharedForward
    from tests.support import projection_checks as checks

    with mock.patch.object(projection_launch, "target_of", lambda device: Target(90, N_SMS)):
        for seed in (0, 16 * 12345):
            group = checks.draw(40, 72, checks.DROPPED)
            cases = [c if c.seed is None else dataclasses.replace(c, seed=torch.tensor(seed)) for c in group.cases]
            group = checks.Group(group.members, (*cases,))
            made = one_launch.together_forward(SharedForward(group.cases[0].x, checks.operands(group)), "triton")
            assert made is not None
            ys, ss = made
            gradients = one_launch.together_backward(checks.backward_of(group, ss), "triton")
            assert gradients is not None
            dx, others = gradients
            found = [
                {"y": y} | {name: g for name, g in of_one._asdict().items() if g is not None}
                for y, of_one in zip(ys, others, strict=True)
            ]
            checks.assert_accurate(({"dx": dx}, found), group)
    assert len(device.stats) == 6


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), float(sys.argv[2]))))
