"""Whether Triton can launch kernels on a device of this machine. Importable without Triton."""

import os
import shutil
from functools import lru_cache

import torch

from fastlora.problem import PassingReason


def unusable(device: torch.device | None = None) -> str | None:
    """Why kernels cannot be launched on a device (None: the current one), or None. What may pass by the next call is a
    PassingReason."""
    if torch.version.hip is not None:
        return "this torch is built for ROCm, and the kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return PassingReason("no CUDA device; TRITON_INTERPRET=1 runs the float32 kernels slowly on the CPU")
    try:
        major, minor = torch.cuda.get_device_capability(device if device and device.type == "cuda" else None)
    except (RuntimeError, AssertionError) as error:
        return PassingReason(f"the device cannot be used: {_first_line(error)}")
    return f"compute capability {major}.{minor} is below 8.0" if major < 8 else _driver_unusable()


@lru_cache(maxsize=1)
def _driver_unusable() -> str | None:
    """Why Triton's driver cannot work for any device, or None. Triton compiles it, and each kind of launch, with a C
    compiler when first asked to: what is missing shows here, and not in a layer's first call."""
    import triton

    asked = os.environ.get("CC")
    found = shutil.which(asked.split()[0]) if asked else shutil.which("gcc") or shutil.which("clang")
    if found is None:
        return f"no C compiler for its launches: {f'CC={asked} is not found' if asked else 'neither gcc nor clang'}"
    try:
        triton.runtime.driver.active.get_current_target()
    except Exception as error:  # of its compilation, the driver library, the device
        return f"its driver does not start: {type(error).__name__}: {_first_line(error)}"
    return None


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
