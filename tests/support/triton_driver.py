"""A layer's two launches through Triton's own driver and launchers, over the emulated CUDA driver.

    python -m tests.support.triton_driver DIRECTORY DROPOUT

A program of its own: whoever opens libcuda.so.1 in its process gets the emulated one, which is put into DIRECTORY.
Prints the launches' counts as JSON; exits with an error where a launch or a result is wrong.
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

import torch

from tests.support import cuda_driver, launches, numerics

STREAM = 0x5712EA
N_SMS = 4


def as_cuda() -> None:
    """What Triton's driver asks torch, as it is where one GPU is current."""
    torch.cuda.current_device = lambda: 0
    torch.cuda.set_device = lambda device: None
    torch.cuda.get_device_capability = lambda device=None: cuda_driver.EmulatedDevice.capability
    torch._C._cuda_getCurrentRawStream = lambda device: STREAM


def _noting(device: cuda_driver.EmulatedDevice, launcher: type) -> type:
    """Triton's launcher, which tells the device of the tensors that it is called with."""

    class Noting(launcher):
        def __init__(self, source, metadata):
            super().__init__(source, metadata)
            self.kernels = source.fn

        def __call__(self, grid_x, grid_y, grid_z, stream, function, *args):
            assert stream == STREAM
            for argument in args:
                tensor = getattr(argument, "base", argument)  # of a descriptor
                if isinstance(tensor, torch.Tensor):
                    device.know(tensor)
            for caches in self.kernels.device_caches.values():
                device.ptx_of |= {kernel.function: kernel.asm["ptx"] for kernel in caches[0].values()}
            super().__call__(grid_x, grid_y, grid_z, stream, function, *args)
            if device.error:
                raise device.error

    return Noting


def run(directory: Path, dropout_p: float) -> dict[str, list[int]]:
    """Forward and backward of a bf16 layer, whose results are checked."""
    os.environ["TRITON_LIBCUDA_PATH"] = str(directory)
    opened = cuda_driver.as_libcuda(directory)
    as_cuda()
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    from fastlora.backends.target import Target
    from fastlora.backends.triton import launch as backend
    from fastlora.problem import Needs

    device = cuda_driver.EmulatedDevice(driver=opened)
    driver = CudaDriver()
    driver.launcher_cls = _noting(device, driver.launcher_cls)
    triton.runtime.driver.set_active(driver)
    c = numerics.draw_case(100, 136, 200, 16, torch.bfloat16, dropout_p=dropout_p)
    shared = (c.scaling, c.dropout_p, c.seed)
    with mock.patch.object(backend, "target_of", lambda device: Target(90, N_SMS)):
        y, s = launches.forward(backend, c.x, c.weight, c.lora_a, c.lora_b, c.bias, *shared)
        needs = Needs(True, True, True, True)
        gradients = launches.backward(backend, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, *shared, needs)
    numerics.assert_accurate({"y": y, **gradients._asdict()}, c)
    return {name: [getattr(each, name) for each in device.stats] for name in ("tma_loads", "wgmma", "threads")}


if __name__ == "__main__":
    print(json.dumps(run(Path(sys.argv[1]), float(sys.argv[2]))))
