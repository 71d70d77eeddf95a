"""Runs the launchers of fastlora.backends.cuda.launch on the CPU.

Everything down to the CUDA runtime is what a GPU would get: csrc's host code, and what it passes to cudaLaunchKernel.
There cuda_runtime.py takes over; the kernel is the PTX that the library holds next to the code for the GPU, and the
emulator stands in for the device.
"""

import ctypes
import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch

from fastlora.backends.cuda import extension, tiles
from fastlora.backends.cuda import launch as cuda
from fastlora.operands import as_stored
from fastlora.problem import Needs
from tests.emulator import LaunchOptions, Struct, load_ptx
from tests.emulator.conformance import coverage
from tests.emulator.tensor_map import unpack
from tests.support import cuda_runtime, launches
from tests.support.numerics import Case

# Residencies (of clusters), orders and moments in which asynchronous copies take effect.
SCHEDULES = (
    LaunchOptions(seed=1, resident=1, async_policy="early"),
    LaunchOptions(seed=2, resident=2, async_policy="random"),
    LaunchOptions(seed=3, async_policy="random", shuffle_ctas=True),
    LaunchOptions(seed=4, async_policy="late", shuffle_ctas=True, proxy_fence="both"),
)
STREAM = 0x5712EA  # a handle that a launch must be given
_WRITTEN = ("out", "s", "grad_a", "grad_b", "grad_bias", "gradient_partials", "split_partials", "kept_s")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the copy that Triton brings along."""
    import triton

    beside_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or (str(beside_triton) if beside_triton.exists() else None)


def unavailable() -> str | None:
    """Why the compiled kernels cannot be tested here, or None."""
    return cuda_runtime.unavailable() or (None if tool("cuobjdump") else "cuobjdump is not found")


@functools.cache
def _entries() -> dict[str, str]:
    """The PTX in the library: a module for each kernel."""
    library = extension.loaded().__file__
    return entries_of(
        subprocess.run([tool("cuobjdump"), "-ptx", library], capture_output=True, text=True, check=True).stdout
    )


def entries_of(text: str) -> dict[str, str]:
    """A module for each kernel of some modules' text, by the kernel's name."""
    entries = {}
    for module in re.split(r"^(?=\.version )", text, flags=re.M)[1:]:
        starts = [match.start() for match in re.finditer(r"^[ \t]*(?:\.weak |\.visible )?\.entry ", module, re.M)]
        files = "\n".join(re.findall(r"^\s*\.file\s.*$", module, re.M))
        for start, end in zip(starts, [*starts[1:], len(module)], strict=True):
            body = re.split(r"^\.(?:file|section)\b", module[start:end], maxsplit=1, flags=re.M)[0]
            entries[re.search(r"\.entry\s+(\w+)", body).group(1)] = f"{module[: starts[0]]}{body}{files}\n"
    return entries


def ptx_of(name: str) -> str:
    """The PTX of one compiled kernel."""
    return _entries()[name]


def variants_for(
    tile: tiles.CudaTile,
    dropout: bool,
    rank: int,
    dtype=torch.bfloat16,
    *,
    transposed: bool = False,
    decodes: bool = False,
    in_loop: bool = False,
    shared: bool = False,
) -> tuple[dict, ...]:
    """The compiled kernels, forward and backward, that serve a layer; ``decodes``: over a packed base weight;
    ``shared``: of several projections. Where products decode the weight ``in_loop``, there is the forward alone."""
    size = {"block_m": tile.block_m, "block_n": tile.block_n}
    wanted = {
        "dropout": dropout,
        "transposed": transposed,
        "decodes": decodes,
        "in_loop": in_loop,
        "shared": shared,
        "dtype": str(dtype).removeprefix("torch."),
    }
    found = (
        [kernel for kernel in tiles.kernels(rank, backward=each, **wanted) if kernel.items() >= size.items()]
        for each in ((False,) if in_loop else (False, True))
    )
    return tuple(kernel for (kernel,) in found)


@functools.lru_cache(maxsize=128)
def _module(text: str):
    return load_ptx(text)


class EmulatedLaunch:
    """Where the launches of the emulated runtime end.

    Args:
        options: how the emulator runs.
        ptx: from a kernel's name to its text; tests of seeded bugs change it on the way.

    ``stats`` holds the counters of every launch; ``operands`` the tensors of the last one, by their names in a plan.
    """

    def __init__(self, options: LaunchOptions | None = None, ptx: Callable[[str], str] = ptx_of):
        self.options, self.stats, self._ptx = options or LaunchOptions(), [], ptx
        self.operands: dict[str, torch.Tensor] = {}
        self._error: Exception | None = None

    def launch(self, real: Callable, prepared, tensors, numbers) -> None:
        """launch_bound of fastlora.backends.cuda.launch, given as ``real``, with its operands known to the emulator.
        Raises what the emulator finds."""
        named = zip(prepared.tensors, tensors, strict=True)
        self.operands, self._error = {name: tensor for name, tensor in named if tensor is not None}, None
        try:
            real(prepared, tensors, numbers)
        except RuntimeError as failed:
            raise self._error or failed from None

    def __call__(self, asked: cuda_runtime.Launched) -> int:
        try:
            self._run(asked)
        except Exception as error:
            self._error = error
            return 1
        return 0

    def _run(self, asked: cuda_runtime.Launched) -> None:
        assert asked.stream == STREAM, f"launched on stream {asked.stream:#x}"
        if self._ptx is ptx_of:  # the kernel as it is: every instruction must have a conformance case
            coverage.check(ptx_of(asked.kernel))
        module, tensors = _module(self._ptx(asked.kernel)), self.operands
        of_launch = (*_WRITTEN, "weight") if "codes" in tensors else _WRITTEN  # where a launch decodes the weight
        written = [name for name in tensors if name.split(".")[-1] in of_launch]  # of projections as well
        raw = ctypes.string_at(asked.parameters, module.param_bytes(asked.kernel))
        self.stats.append(
            module.launch(
                asked.kernel,
                grid=asked.grid,
                block=asked.block,
                cluster=None,
                args=[_parameters(raw, {t.data_ptr(): t for t in tensors.values()})],
                shared_bytes=asked.shared_bytes,
                buffers=tensors,
                read_only=[name for name in tensors if name not in written and name != "workspace"],
                uninitialised=written,
                options=self.options,
            )
        )


@contextmanager
def emulated(options: LaunchOptions | None = None, ptx: Callable[[str], str] = ptx_of):
    """Within it, the CUDA launchers run in the emulator; yields the EmulatedLaunch."""
    _entries()  # of the library that is built
    runtime, launch = cuda_runtime.runtime(), EmulatedLaunch(options, ptx)
    runtime.on_launch(launch)
    try:
        with (
            mock.patch.object(cuda, "launch_bound", functools.partial(launch.launch, cuda.launch_bound)),
            mock.patch.object(extension, "load", lambda: (runtime.module, None)),
            mock.patch.object(cuda, "raw_stream", lambda device: STREAM),
        ):
            yield launch
    finally:
        runtime.on_launch(None)


def lies_transposed(weight: torch.Tensor) -> bool:
    """Whether a weight [N, K] is the view of a matrix [K, N]."""
    return as_stored(weight)[1] is not weight


def run_layer(case: Case, tile: tiles.CudaTile, ctas: int, needs: Needs = Needs(True, True, True, True)):  # noqa: B008
    """Forward and backward of one layer, within ``emulated``. S is fused where the tile says so and the kernel can.

    Returns:
        The results by name, and the forward's S.
    """
    c = case
    needs = needs._replace(dbias=needs.dbias and c.bias is not None)
    shared = (c.scaling, c.dropout_p, c.seed)
    forward, backward = (
        replace(tile, fused=tile.fused and variant["fuses"])
        for variant in variants_for(tile, c.dropout_p > 0.0, c.lora_a.shape[0], transposed=lies_transposed(c.weight))
    )
    y, s = launches.forward(cuda, c.x, c.weight, c.lora_a, c.lora_b, c.bias, *shared, tile=forward, ctas=ctas)
    gradients = launches.backward(
        cuda, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, *shared, needs, tile=backward, ctas=ctas
    )
    return {"y": y, **{n: g for n, g in gradients._asdict().items() if g is not None}}, s


def _parameters(raw: bytes, by_address: dict[int, torch.Tensor]) -> Struct:
    """The structure that ``raw`` holds, with tensors and tensor maps in the emulator's terms."""
    fields, offset = [], 0
    while offset < len(raw):
        if tensor_map := unpack(raw, offset, by_address):
            fields.append(tensor_map)
            offset += 128
            continue
        word = raw[offset : offset + 8]
        fields.append(by_address.get(int.from_bytes(word, "little"), word))
        offset += 8
    return Struct(fields)
