"""The tables' tiles compile for rows in segments without a spill, and load asynchronously."""

import dataclasses
import itertools
from unittest import mock

import pytest
import torch

from fastlora.backends.configs import FUSED_RANK, TILE_TABLES, TileConfig, table_for
from fastlora.backends.target import Target
from fastlora.backends.triton import segment_launch
from fastlora.problem import Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, describe_segments
from tests.support.compile_gate import MORE_ARCHITECTURES, assert_fits, expected_instruction
from tests.support.compile_target import compile_for
from tests.support.triton_checks import needs_compiler

pytestmark = needs_compiler
ALL = Needs(True, True, True, True)
# Of those, outside the sweep: the largest and the smallest that a model's layers are given.
DEMANDING = {
    (80, "ampere", 128, "forward", True),
    (80, "ampere", 128, "backward", True),
    (80, "unaligned large-rank", 16, "backward", False),
    (90, "hopper few rows", 32, "forward", False),
}


def meta(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def compiled(arch: int, direction: str, config: TileConfig, rank: int, dtype: torch.dtype, aligned: bool, drops: bool):
    """The kernel of a call with everything that takes registers."""
    m, e, t, g = 4096, 8, 4, 8
    n, k = (1024, 2048) if aligned else (1001, 2003)
    x, dy, s = (meta(m, width, dtype=dtype) for width in (k, n, rank))
    weight, bias, scalings = meta(e, n, k, dtype=dtype), meta(e, n, dtype=dtype), meta(t, dtype=torch.float32)
    factors = meta(t, rank, k, dtype=dtype), meta(t, n, rank, dtype=dtype)
    where = Segments(meta(g), meta(g), meta(g))
    drop = (False, 0.1, torch.tensor(2**40)) if drops else (False, 0.0, None)
    if direction == "forward":
        operands, spec = describe_segments(GroupedForward(x, weight, *factors, bias, 1.0, scalings, where, *drop))
    else:
        given = GroupedBackward(dy, x, weight, *factors, s, 2, 1.0, scalings, where, *drop)
        operands, spec = describe_segments(given, ALL)
    config = segment_launch.without_spill(config, rank, aligned and dtype.itemsize == 2)
    device = mock.patch.object(segment_launch, "target_of", lambda device: Target(arch, n_sms=132))
    with device, compile_for(arch) as driver:
        segment_launch.prepare(spec, config)(operands)
    (launch,) = driver.launched
    return launch.kernel


def shipped():
    for arch, (name, table) in itertools.product((80, 90, *MORE_ARCHITECTURES), TILE_TABLES.items()):
        large_rank, few_rows = name.endswith(" large-rank"), name.endswith(" few rows")
        dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
        aligned, rank = not name.startswith("unaligned"), 256 if large_rank else FUSED_RANK
        if table_for(arch, rank, dtype.itemsize, aligned, few_rows) != name:
            continue
        makes_s = (False,) if large_rank else (True,) if dtype == torch.float32 else (True, False)
        directions = ("forward",) if few_rows else ("forward", "backward")
        for config, direction, fused in itertools.product(table, directions, makes_s):
            tile = f"{config.block_m}x{config.block_n}x{config.block_k}"
            label = f"sm_{arch}-{name}-{tile}-{direction}" + "-separate" * (not fused)
            in_sweep = (arch, name, config.block_m, direction, fused) not in DEMANDING
            yield pytest.param(
                arch, direction, dataclasses.replace(config, fused=fused), rank, dtype, aligned, not few_rows, id=label,
                marks=[pytest.mark.sweep] if in_sweep else [],
            )  # fmt: skip


@pytest.mark.parametrize("arch, direction, config, rank, dtype, aligned, drops", list(shipped()))
def test_shipped_configurations(arch, direction, config, rank, dtype, aligned, drops):
    kernel = compiled(arch, direction, config, rank, dtype, aligned, drops)
    assert_fits(kernel, arch, expected_instruction(arch, config, dtype))
    if aligned:  # the pipelines of the product and, backward, of the gradients' sums
        assert kernel.asm["ptx"].count("cp.async.c") >= config.num_stages * (3 if direction == "backward" else 2)
