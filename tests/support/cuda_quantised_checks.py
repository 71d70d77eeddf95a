"""Layers over packed weights run by the compiled CUDA kernels' own PTX in the emulator, and checked: values, scratch
bit for bit, the protocol."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastlora.backends.cuda import quantised_launch
from fastlora.backends.cuda.tiles import CudaTile
from fastlora.problem import Needs
from fastlora.quantised_weight import QuantisedWeight
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support.cuda_checks import ALL, LARGE, MEDIUM, describe
from tests.support.cuda_emulation import SCHEDULES, emulated, ptx_of
from tests.support.quantised_checks import draw, draw_integers, run_layer


def emulate(
    case: numerics.Case,
    packed: QuantisedWeight,
    tile: CudaTile,
    options: LaunchOptions | None = None,
    ptx=ptx_of,
    needs: Needs | None = ALL,
    ctas: int = 4,
) -> tuple[dict[str, Tensor], list]:
    """Results of a layer's forward and backward, and the launches' counters."""
    with emulated(options, ptx) as launch:
        results = run_layer(case, packed, needs, lambda spec: quantised_launch.prepare(spec, tile, ctas))
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
