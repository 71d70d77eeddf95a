"""Compiles Triton kernels for any architecture on a machine without a GPU, through the ordinary launch path.

A stand-in driver answers Triton's questions about the device and drops the launch, so that ``kernel[grid](...)`` on
meta tensors specialises and compiles exactly as it would for a launch."""

import re
import subprocess
import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend, get_ptxas

SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}  # bytes a block may use
TENSOR_MEMORY_COLUMNS = 512
REGISTER_FILE = 65536
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass(frozen=True)
class Launch:
    """One launch that a kernel was asked for."""

    kernel: Any  # triton's CompiledKernel
    grid: tuple[int, int, int]
    args: dict[str, Any]  # what is left of the arguments after specialisation, in order; "name.0" of a tuple's


def _at_run_time(name: str, argument: Any, signature: Any) -> Iterator[tuple[str, Any]]:
    """What a compiled kernel is passed of an argument, by name; each element of a tuple by itself."""
    if isinstance(signature, tuple):
        for i, (each, of_each) in enumerate(zip(argument, signature, strict=True)):
            yield from _at_run_time(f"{name}.{i}", each, of_each)
    elif signature != "constexpr":
        yield name, argument


class _CompileOnlyDriver(DriverBase):
    """Answers for a device of compute capability ``arch``, collects the launches and hands each to ``on_launch``."""

    def __init__(self, arch: int, assembles: bool):
        self.arch, self.assembles = arch, assembles
        self.launched: list[Launch] = []
        self.on_launch: Callable[[Launch], None] | None = None
        facts = {
            "max_shared_mem": SHARED_MEMORY[arch], "multiprocessor_count": 132, "warpSize": 32,
            "max_num_regs": REGISTER_FILE, "mem_clock_rate": 0, "mem_bus_width": 0, "sm_clock_rate": 0,
        }  # fmt: skip
        self.utils = types.SimpleNamespace(
            get_device_properties=lambda device: facts,
            load_binary=lambda *args, **kwargs: (None, object(), -1, -1, 1024),  # module, function, resources
        )
        driver = self

        class Launcher:
            def __init__(self, source, metadata):
                self.source, self.metadata = source, metadata

            def __call__(self, grid_x, grid_y, grid_z, stream, function, packed, metadata, on_enter, on_exit, *args):
                kernel = next(k for k in compiled_kernels(self.source.fn, driver.device) if k.function is function)
                named = zip(self.source.fn.arg_names, args, strict=True)
                runtime = dict(flat for name, a in named for flat in _at_run_time(name, a, self.source.signature[name]))
                driver.launched.append(Launch(kernel, (grid_x, grid_y, grid_z), runtime))
                if driver.on_launch is not None:
                    driver.on_launch(driver.launched[-1])

        self.launcher_cls = Launcher

    @classmethod
    def is_active(cls):
        return True

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return self.device

    @property
    def device(self) -> int:
        """Triton caches compiled kernels by device: each architecture is one, and with PTX alone another."""
        return self.arch if self.assembles else -self.arch

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("meta")

    def map_python_to_cpp_type(self, ty):
        return ty

    def get_benchmarker(self):
        raise RuntimeError("nothing can be timed on a compile-only driver")

    def get_device_interface(self):
        raise RuntimeError("a compile-only driver has no device")


@dataclass(frozen=True)
class Resources:
    """What ptxas gave a kernel."""

    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    threads: int


@cache
def _driver(arch: int, assembles: bool) -> _CompileOnlyDriver:
    """One for each architecture, for compiled kernels keep the driver they were compiled under."""
    return _CompileOnlyDriver(arch, assembles)


@contextmanager
def compile_for(arch: int, on_launch: Callable[[Launch], None] | None = None, assembles: bool = True):
    """Within it, kernels compile for ``arch``; yields a driver whose ``launched`` lists the launches asked for.

    Args:
        arch: compute capability (90 for 9.0).
        on_launch: may run each launch in its own way.
        assembles: whether PTX is assembled, which is a sixth of the time; kernels have an empty cubin without.
    """
    driver = _driver(arch, assembles)
    driver.launched, driver.on_launch = [], on_launch
    config = triton.runtime.driver
    saved = config._active  # None where no GPU has been asked for yet; reset_active() would insist on one
    config.set_active(driver)
    try:
        with nullcontext() if assembles else _no_assembler():
            yield driver
    finally:
        config._active = saved


@contextmanager
def _no_assembler():
    """The hash is part of the key of the cache on disk, where no kernel without a cubin may pass for a whole one."""
    whole = CUDABackend.hash
    with (
        mock.patch.object(CUDABackend, "make_cubin", lambda *args: b""),
        mock.patch.object(CUDABackend, "hash", lambda backend: f"{whole(backend)}-ptx"),
    ):
        yield


def compiled_kernels(kernel, device: int) -> list:
    """Every variant of a @triton.jit kernel compiled for a device so far, oldest first."""
    return list(kernel.device_caches[device][0].values())


def remarks(compiled, arch: int) -> list[str]:
    """What ptxas says of a kernel's wgmma pipeline (C75xx): each means that it waits where the code does not."""
    return re.findall(r"\(C75\d\d\)[^\n]*", _assembler_report(compiled, arch))


def spilled_bytes(compiled, arch: int) -> int:
    """Bytes that a kernel stores and loads for want of registers. (Its stack may be of another use: ptxas gives every
    kernel for sm_120 eight bytes.)"""
    (found,) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", _assembler_report(compiled, arch))
    return sum(map(int, found))


def _assembler_report(compiled, arch: int) -> str:
    target = f"--gpu-name=sm_{arch}" + ("a" if arch >= 90 else "")
    with tempfile.TemporaryDirectory() as directory:
        ptx = Path(directory, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [get_ptxas(arch).path, "-v", target, ptx, "-o", ptx.with_suffix(".cubin")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def resources(compiled) -> Resources:
    """Registers, stack and memories of a compiled kernel, from its cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    metadata = compiled.metadata
    return Resources(
        registers=found["REG"],
        stack=found["STACK"],
        local=found["LOCAL"],
        shared=metadata.shared,
        tensor_memory=getattr(metadata, "tmem_size", 0) or 0,
        threads=32 * metadata.num_warps,
    )
