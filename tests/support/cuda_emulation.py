"""Runs the launchers of fastlora.backends.cuda.launch on the CPU.

The parameters are the very ones that would go to the GPU; the kernel is the PTX that the library holds next to the code
for the GPU; the emulator stands in for the device.
"""

import functools
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from fastlora.backends.cuda import extension, tiles
from fastlora.backends.cuda import launch as cuda
from fastlora.problem import Needs
from tests.emulator import LaunchOptions, Struct, TensorMap, load_ptx
from tests.emulator.conformance import coverage
from tests.support import launches
from tests.support.numerics import Case

# Residencies (of clusters), orders and moments in which asynchronous copies take effect.
SCHEDULES = (
    LaunchOptions(seed=1, resident=1, async_policy="early"),
    LaunchOptions(seed=2, resident=2, async_policy="random"),
    LaunchOptions(seed=3, async_policy="random", shuffle_ctas=True),
    LaunchOptions(seed=4, async_policy="late", shuffle_ctas=True, proxy_fence="both"),
)
_WRITTEN = ("out", "s", "grad_a", "grad_b", "grad_bias", "gradient_partials", "split_partials")


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, or the copy that Triton brings along."""
    import triton

    beside_triton = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return shutil.which(name) or (str(beside_triton) if beside_triton.exists() else None)


def unavailable() -> str | None:
    """Why the compiled kernels cannot be tested here, or None."""
    return extension.load()[1] or (None if tool("cuobjdump") else "cuobjdump is not found")


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


def variants_for(tile: tiles.CudaTile, dropout: bool, rank: int) -> tuple[dict, dict]:
    """The two compiled kernels, forward and backward, that serve a layer."""
    size = {"block_m": tile.block_m, "block_n": tile.block_n}
    found = (
        [kernel for kernel in tiles.kernels(rank, dropout=dropout, backward=each) if kernel.items() >= size.items()]
        for each in (False, True)
    )
    (forward,), (backward,) = found
    return forward, backward


@functools.lru_cache(maxsize=128)
def _module(text: str):
    return load_ptx(text)


class EmulatedLaunch:
    """Takes the place of fastlora.backends.cuda.launch._launch.

    Args:
        options: how the emulator runs.
        ptx: from a kernel's name to its text; tests of seeded bugs change it on the way.

    ``stats`` holds the counters of every launch.
    """

    def __init__(self, options: LaunchOptions | None = None, ptx: Callable[[str], str] = ptx_of):
        self.options, self.stats, self._ptx = options or LaunchOptions(), [], ptx

    def __call__(self, plan, device, operands):
        raw, maps = plan.parameters(**{name: cuda._address(operand) for name, operand in operands.items()})
        tensors = {name: operand for name, operand in operands.items() if isinstance(operand, torch.Tensor)}
        variant = plan.variant
        if self._ptx is ptx_of:  # the kernel as it is: every instruction must have a conformance case
            coverage.check(ptx_of(variant["name"]))
        self.stats.append(
            _module(self._ptx(variant["name"])).launch(
                variant["name"],
                grid=plan.ctas,
                block=variant["threads"],
                cluster=(variant["cluster"], 1, 1),
                args=[_parameters(raw, maps, {t.data_ptr(): t for t in tensors.values()})],
                shared_bytes=variant["shared_bytes"],
                buffers=tensors,
                read_only=[name for name in tensors if name not in _WRITTEN and name != "workspace"],
                uninitialised=[name for name in tensors if name in _WRITTEN],
                options=self.options,
            )
        )


@contextmanager
def emulated(options: LaunchOptions | None = None, ptx: Callable[[str], str] = ptx_of):
    """Within it, the CUDA launchers run in the emulator; yields the EmulatedLaunch."""
    launch, real = EmulatedLaunch(options, ptx), cuda._launch
    cuda._launch = launch
    try:
        yield launch
    finally:
        cuda._launch = real


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
        for variant in variants_for(tile, c.dropout_p > 0.0, c.lora_a.shape[0])
    )
    y, s = launches.forward(cuda, c.x, c.weight, c.lora_a, c.lora_b, c.bias, *shared, tile=forward, ctas=ctas)
    gradients = launches.backward(
        cuda, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, *shared, needs, tile=backward, ctas=ctas
    )
    return {"y": y, **{n: g for n, g in gradients._asdict().items() if g is not None}}, s


def _parameters(raw: bytes, maps: list[dict], by_address: dict[int, torch.Tensor]) -> Struct:
    """The structure that ``raw`` holds, with tensors and tensor maps in the emulator's terms."""
    at = {each["offset"]: _tensor_map(each, by_address[each["address"]]) for each in maps}
    fields, offset = [], 0
    while offset < len(raw):
        if offset in at:
            fields.append(at[offset])
            offset += 128
            continue
        word = raw[offset : offset + 8]
        fields.append(by_address.get(int.from_bytes(word, "little"), word))
        offset += 8
    return Struct(fields)


def _tensor_map(described: dict, tensor: torch.Tensor) -> TensorMap:
    return TensorMap(
        tensor,
        box=described["box"],
        swizzle=described["swizzle"],
        shape=(described["rows"], described["columns"]),
        strides=(described["stride_bytes"] // 2, 1),
    )
