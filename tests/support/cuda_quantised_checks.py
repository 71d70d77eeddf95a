"""Layers over packed weights run by the compiled CUDA kernels' own PTX in the emulator, and checked: values, scratch
bit for bit, the protocol."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.backends.cuda import quantised_launch
from fastlora.backends.cuda.tiles import CudaTile
from fastlora.problem import LaunchSpec, Needs
from fastlora.quantised_weight import QuantisedWeight
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_checks import ALL, LARGE, MEDIUM, SMALL, describe
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of
from tests.support.quantised_checks import draw, draw_integers, draw_packed, run_layer


def emulate(
    case: numerics.Case,
    packed: QuantisedWeight,
    tile: CudaTile,
    options: LaunchOptions | None = None,
    ptx=ptx_of,
    needs: Needs | None = ALL,
    ctas: int = 4,
    in_loop: bool = False,
) -> tuple[dict[str, Tensor], list]:
    """Results of a layer's forward and backward, and the launches' counters."""

    def prepare(spec: LaunchSpec):
        return quantised_launch.prepare(spec, tile, ctas, in_loop)

    with emulated(options, ptx) as launch:
        results = run_layer(case, packed, needs, prepare, in_loop)
    assert len(launch.stats) == (2 if needs else 1), "one launch each way"
    return results, launch.stats


class FormatCase(NamedTuple):
    """A format of packed weights, a layer and the tile that computes it. ``block``: elements that share a scale, of
    4-bit formats."""

    name: str
    sizes: tuple[int, int, int, int]
    tile: CudaTile
    dtype: torch.dtype = torch.bfloat16
    dropout_p: float = 0.0
    block: int = 64

    def describe(self) -> str:
        dropout = f" p={self.dropout_p}" if self.dropout_p else ""
        return f"{self.name} {describe(self.tile)} {self.sizes} {self.dtype}{dropout}"

    def check(self, options: LaunchOptions | None = None, ptx=ptx_of) -> None:
        case, packed = draw(self.name, self.sizes, self.dtype, block=self.block, dropout_p=self.dropout_p)
        results, _ = emulate(case, packed, self.tile, options, ptx)
        numerics.assert_accurate(results, case)


# [M, N, K, R]: several row groups; panels of several parts with a ragged last one; blocks that run over the end of a
# row, and over the end of a part.
EVERY_FORMAT = (
    FormatCase("nf4", (280, 328, 392, 24), replace(MEDIUM, splits=2)),
    FormatCase("nf4 nested", (520, 328, 264, 16), LARGE),
    FormatCase("fp4", (264, 136, 264, 64), MEDIUM, dropout_p=0.3),
    FormatCase("fp4 nested", (392, 264, 328, 40), LARGE, torch.float16, 0.3, block=512),
    FormatCase("int8", (264, 136, 392, 16), MEDIUM, torch.float16),
    FormatCase("int8 tensor", (136, 264, 264, 8), MEDIUM),
    FormatCase("int8 group", (264, 136, 272, 8), MEDIUM),
    FormatCase("float8", (264, 136, 264, 8), MEDIUM),
)
INTEGERS = (((392, 328, 264, 16), LARGE), ((264, 264, 392, 40), replace(MEDIUM, group_m=8, gradients_last=True)))


def check_integers(sizes, tile: CudaTile, schedules=SCHEDULES, ptx=ptx_of) -> None:
    """Under every schedule the same, one right result. With one cluster at a time, a tile that waited for a later one
    would deadlock."""
    case, packed = draw_integers(sizes, torch.bfloat16)
    for options in schedules:
        numerics.assert_exact(emulate(case, packed, tile, options, ptx)[0], case)


GROUPED = replace(MEDIUM, group_m=8)  # as those that are shipped (fastlora.backends.cuda.tiles.group_size)


def check_group(options: LaunchOptions | None = None, ptx=ptx_of) -> None:
    """A whole group, and a ragged one behind it whose last row block has a tail."""
    case, packed = draw_integers(((GROUPED.group_m + 2) * GROUPED.block_m + 13, 136, 264, 16), torch.bfloat16)
    numerics.assert_exact(emulate(case, packed, GROUPED, options, ptx)[0], case)


# In the loop of the product, by the one tile that is compiled for it, in groups as those that are shipped.
IN_LOOP = replace(SMALL, group_m=8, splits=2)
UNSPLIT = replace(IN_LOOP, splits=1)


def draw_selected(name: str, n: int, k: int, dtype: torch.dtype, block: int) -> tuple[numerics.Case, QuantisedWeight]:
    """A layer of k rows, each of which picks a column of the packed weight: Y is the weight's own bits, transposed. Its
    branch and its bias are zero."""
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = draw_e5m2(weight) if name == "float8 e5m2" else draw_packed(name, weight, block)
    case = numerics.draw_case(k, n, k, 8, dtype)
    zeros = {each: torch.zeros_like(getattr(case, each)) for each in ("lora_a", "lora_b", "bias")}
    return replace(case, x=torch.eye(k, dtype=dtype), weight=packed.dequantize(), **zeros), packed


def draw_e5m2(weight: Tensor) -> QuantisedWeight:
    """In the float8 that torchao does not choose by itself; every other row is scaled."""
    n, k = weight.shape
    scales = torch.ones(n, 1).index_fill(0, torch.arange(0, n, 2), 0.37)
    codes = (weight.float() / scales).to(torch.float8_e5m2)
    return QuantisedWeight("float8", (codes, scales), (n, k), weight.dtype, (1, k))


class SelectedCase(NamedTuple):
    """A format whose values are compared bit for bit with the library's. ``n``, ``k``: the weight's; ``block``:
    elements of 4-bit formats that share a scale."""

    name: str
    n: int
    k: int
    tile: CudaTile = IN_LOOP
    dtype: torch.dtype = torch.bfloat16
    block: int = 64

    def describe(self) -> str:
        return f"{self.name} [{self.n}, {self.k}] splits {self.tile.splits} {self.dtype}"

    def check(self, options: LaunchOptions | None = None, ptx=ptx_of) -> None:
        case, packed = draw_selected(self.name, self.n, self.k, self.dtype, self.block)
        results, _ = emulate(case, packed, self.tile, options, ptx, needs=None, in_loop=True)
        numerics.assert_exact(results, case)


# Columns and steps end in tails; blocks run over the end of a row, and of a step; more scales than have one nested
# scale.
SELECTED = (
    SelectedCase("nf4", 136, 96),
    SelectedCase("nf4 nested", 152, 160, UNSPLIT, block=32),
    SelectedCase("fp4", 72, 96, dtype=torch.float16, block=128),
    SelectedCase("fp4 nested", 136, 160, replace(IN_LOOP, splits=3), torch.float16),
    SelectedCase("int8", 136, 96, dtype=torch.float16),
    SelectedCase("int8 tensor", 72, 96, UNSPLIT),
    SelectedCase("int8 group", 72, 128),
    SelectedCase("float8", 136, 96, UNSPLIT),
    SelectedCase("float8 e5m2", 136, 96),
)
IN_LOOP_INTEGERS = (((49, 200, 544, 24), UNSPLIT), ((64, 136, 96, 8), IN_LOOP))


def check_integers_in_loop(sizes, tile: CudaTile, schedules=SCHEDULES, ptx=ptx_of) -> None:
    """Under every schedule the same, one right result; zero points; more steps of a split than there are stages."""
    case, packed = draw_integers(sizes, torch.bfloat16)
    for options in schedules:
        results = emulate(case, packed, tile, options, ptx, needs=None, in_loop=True)[0]
        numerics.assert_exact(results, case)
