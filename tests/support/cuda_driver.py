"""A CUDA driver for machines without a GPU (libcuda.cpp), as a device of the conformance cases' CudaRunner.

What the runner passes to the driver is what runs in the emulator: grid, block, cluster, shared memory, and each
argument by the bytes at its address.
"""

import ctypes
import functools
import hashlib
import subprocess
from pathlib import Path

import torch
import triton

from tests.emulator import LaunchOptions, load_ptx
from tests.emulator.engine_library import build_once, cache_directory, compiler
from tests.emulator.ptx import parse
from tests.emulator.tensor_map import unpack

SOURCE = Path(__file__).with_name("libcuda.cpp")
_INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
_TRIPLE = ctypes.POINTER(ctypes.c_uint)
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p, _TRIPLE, _TRIPLE, _TRIPLE, ctypes.c_uint, ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


@functools.cache
def library() -> Path:
    """The compiled driver. Its name is not the real one's: nothing but a caller by path finds it."""
    digest = hashlib.sha256(compiler().encode())
    for path in (SOURCE, SOURCE.with_name("emulated_map.h"), _INCLUDE / "cuda.h"):
        digest.update(path.read_bytes())
    target = cache_directory() / f"driver-{digest.hexdigest()[:24]}.so"
    build_once(target, _build)
    return target


def _build(target: Path) -> None:
    work = target.with_suffix(".new")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-isystem", _INCLUDE]
    subprocess.run([compiler(), *flags, SOURCE, "-o", work], check=True)
    work.replace(target)


class EmulatedDevice:
    """One GPU of compute capability 9.0 whose context is current in the thread that makes this.

    error: what the emulator found in the last launch, if anything.
    """

    capability = (9, 0)

    def __init__(self, options: LaunchOptions | None = None):
        self.options = options or LaunchOptions()
        self.error: Exception | None = None
        self.driver = ctypes.CDLL(str(library()))
        self._tensors: dict[int, torch.Tensor] = {}
        context = ctypes.c_void_p()
        self.driver.cuInit(0)
        self.driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
        self.driver.cuCtxSetCurrent(context)
        self._hook = _HOOK(self._launched)
        self.driver.fake_hook(self._hook)

    def upload(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy that a launch may name by its address."""
        copy = tensor.clone()
        self._tensors[copy.data_ptr()] = copy
        return copy

    def synchronize(self) -> None:
        """Nothing: a launch is over when it returns."""

    def _launched(self, ptx, kernel, grid, block, cluster, shared_bytes, stream, arguments) -> int:
        try:
            self.error = None
            self._run(ptx.decode(), kernel.decode(), grid[:3], block[:3], cluster[:3], shared_bytes, arguments)
        except Exception as error:
            self.error = error
            return 1
        return 0

    def _run(self, ptx, kernel, grid, block, cluster, shared_bytes, arguments) -> None:
        params = parse(ptx).entries[kernel].params
        given = [ctypes.string_at(arguments[i], param.size) for i, param in enumerate(params)]
        args = {
            param.name: unpack(data, 0, self._tensors) or self._tensors.get(int.from_bytes(data, "little"), data)
            for param, data in zip(params, given, strict=True)
        }
        load_ptx(ptx).launch(
            kernel, grid, block, args,
            shared_bytes=shared_bytes, cluster=cluster if any(cluster) else None, options=self.options,
        )  # fmt: skip
