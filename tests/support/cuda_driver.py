"""A CUDA driver for machines without a GPU (libcuda.cpp), and the device that it drives.

What is passed to the driver is what runs in the emulator: grid, block, cluster, shared memory, and each argument by the
bytes at its address.
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
from tests.emulator.launch import LaunchStats
from tests.emulator.ptx import parse
from tests.emulator.tensor_map import unpack

SOURCE = Path(__file__).with_name("libcuda.cpp")
_INCLUDE = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
_TRIPLE = ctypes.POINTER(ctypes.c_uint)
_HOOK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p, _TRIPLE, _TRIPLE, _TRIPLE, ctypes.c_uint,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
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


def _build(target: Path, *link_flags: str) -> None:
    work = target.with_suffix(".new")
    flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-shared", "-isystem", _INCLUDE, *link_flags]
    subprocess.run([compiler(), *flags, SOURCE, "-o", work], check=True)
    work.replace(target)


def as_libcuda(directory: Path) -> Path:
    """Opens the driver as libcuda.so.1, made in ``directory``: for a process in which nobody wants another."""
    named = directory / "libcuda.so.1"
    _build(named, "-Wl,-soname,libcuda.so.1")
    ctypes.CDLL(str(named), mode=ctypes.RTLD_GLOBAL)
    return named


class EmulatedDevice:
    """One GPU of compute capability 9.0 whose context is current in the thread that makes this.

    error: what the emulator found in the last launch, if anything.
    stats: the counters of every launch.
    """

    capability = (9, 0)

    def __init__(self, options: LaunchOptions | None = None, driver: Path | None = None):
        self.options = options or LaunchOptions()
        self.error: Exception | None = None
        self.stats: list[LaunchStats] = []
        self.ptx_of: dict[int, str] = {}  # what machine code was made of, by the function's handle
        self.driver = ctypes.CDLL(str(driver or library()))
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
        self.know(copy)
        return copy

    def know(self, tensor: torch.Tensor) -> None:
        """From now on a launch may name this tensor."""
        self._tensors[tensor.data_ptr()] = tensor

    def synchronize(self) -> None:
        """Nothing: a launch is over when it returns."""

    def _launched(self, function, ptx, kernel, grid, block, cluster, shared_bytes, stream, arguments) -> int:
        try:
            self.error = None
            text = ptx.decode() or self.ptx_of[function]
            self._run(text, kernel.decode(), grid[:3], block[:3], cluster[:3], shared_bytes, arguments)
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
        stats = load_ptx(ptx).launch(
            kernel, grid, block, args,
            shared_bytes=shared_bytes, cluster=cluster if any(cluster) else None, options=self.options,
        )  # fmt: skip
        self.stats.append(stats)
