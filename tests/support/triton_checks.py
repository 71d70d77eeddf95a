"""Layers run by the Triton kernels' own PTX in the emulator, and checked: what the tests of the protocol, the sweep and
the search for planted defects have in common."""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from fastlora.backends import workspace
from fastlora.backends.configs import FUSED_RANK, TILE_TABLES, TileConfig, padded_rank, table_for
from fastlora.backends.target import Target, multiplies_by_warpgroup
from fastlora.backends.triton import launch as triton_lora
from fastlora.problem import Needs
from tests.emulator import LaunchOptions
from tests.support import float16_range, launches, numerics
from tests.support.compile_gate import assert_fits, expected_instruction
from tests.support.triton_emulation import emulated, emulated_launches

needs_compiler = pytest.mark.skipif(
    triton_lora.triton.knobs.runtime.interpret,
    reason="the interpreter compiles no PTX; these tests have their own process",
)

GENERATOR = re.compile(r"(?<!\w)(-845247145|3449720151)\b")  # a factor of Philox
ARCHITECTURES = (80, 90)
ALL = Needs(True, True, True, True)
# Small tiles, so that a small problem has several row groups, columns, parts and slices. block_m of 64 is wgmma's
# least.
SMALL = {80: TileConfig(32, 32, 32, 4, 4, 3, 32, 32, 16), 90: TileConfig(64, 32, 32, 2, 4, 3, 32, 32, 16)}
SCHEDULES = (
    LaunchOptions(),
    LaunchOptions(seed=1, resident=1, async_policy="early"),
    LaunchOptions(seed=2, resident=2, async_policy="random"),
    LaunchOptions(seed=3, async_policy="random", shuffle_ctas=True),
    LaunchOptions(seed=4, resident=3, async_policy="late", shuffle_ctas=True),
)
SUBSETS = tuple(Needs(*wanted) for wanted in itertools.product((False, True), repeat=4) if any(wanted))
DROPPED_SCHEDULES, INFINITE_SCHEDULES = SCHEDULES[2:4], SCHEDULES[::3]
# [M, N, K]. Contractions have more steps than a pipeline has stages, for else what it prefetches never happens; and
# leave every remainder by the stages, for which of them a loop ends on is where its wait for the last step matters.
# The first has row groups before, between and after others: these read a partial sum, write one, or do both.
# Multiples of 16, as a model's layers are, make other kernels than the rest: their loads are asynchronous copies.
LONG = ((272, 160, 192), (208, 224, 160), (176, 192, 224))
FUSED_SIZES = tuple((*size, 16) for size in LONG)
SEPARATE_SIZES = tuple((*size, 96) for size in LONG)
UNEVEN_SIZES = ((264, 136, 200, 8), (264, 136, 200, 72), (130, 40, 64, 16), (97, 33, 47, 3))
TRANSPOSED_SIZES = (FUSED_SIZES[1], SEPARATE_SIZES[2], UNEVEN_SIZES[0], UNEVEN_SIZES[3])
INTEGER_SIZES = (*FUSED_SIZES, *SEPARATE_SIZES, *UNEVEN_SIZES)
MASKED_SIZES = tuple((*size, 16) for size in LONG)
DROPPED_SIZES = (*MASKED_SIZES, *((139, 136, 200, r) for r in (1, 40, 200, 256)))
FLOAT16_FACTORS = ((-0.3, 0.0), (1.0, 0.3), (2.0, 0.0), (-100.7, 0.0), (3000.3, 0.3))  # scaling, dropout_p
DROPPED = tuple(zip(DROPPED_SIZES, itertools.cycle((torch.bfloat16, torch.float16))))


def run(
    case: numerics.Case,
    config: TileConfig,
    arch: int,
    options: LaunchOptions,
    needs=ALL,
    kernels=triton_lora,
    edit_ptx=None,
    only=None,
    on_kernel=None,
):
    """Forward and backward of one layer by ``kernels``; its results, and the counters of the launches.

    The device has few multiprocessors, so that a wave of the queue is shorter than a row group.

    needs: None: there is no backward.
    only: "forward" or "backward", the one launch that ``edit_ptx`` changes. The other is spared: an edited backward
    gets the S that an unedited forward makes, and after an edited forward a backward would show no more than whether
    its bits are an unedited one's.
    on_kernel: gets each compiled kernel, assembled as well.
    """
    c = case
    needs = needs and needs._replace(dbias=needs.dbias and c.bias is not None)
    results: dict[str, torch.Tensor] = {}
    unedited = _unedited_forward(case, config, arch) if only else None
    with emulated_launches(kernels, arch, options, edit_ptx, on_kernel) as stats:
        y, s = unedited if only == "backward" else launches.forward(kernels, *_forward_operands(c), config=config)
        if needs and only != "forward":
            backward_args = (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, needs)
            gradients = launches.backward(kernels, *backward_args, config=config)
            results = {n: g for n, g in gradients._asdict().items() if g is not None}
    assert len(stats) == (1 if only or not needs else 2), "one launch each way"
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    if only == "forward":
        assert all(map(torch.equal, (y, s), unedited)), "Y or S has other bits"
    return {"y": y, **results}, stats


def _forward_operands(c: numerics.Case) -> tuple:
    return c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed


_unedited: dict[tuple, tuple[torch.Tensor, torch.Tensor]] = {}


def _unedited_forward(c: numerics.Case, config: TileConfig, arch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Y and S, which no schedule changes; a case is the same whenever it is drawn."""
    key = (arch, config, c.x.shape, c.lora_b.shape, c.x.dtype, c.dropout_p)
    if key not in _unedited:
        with mock.patch.object(triton_lora, "target_of", lambda device: Target(arch, n_sms=3)), emulated(arch):
            _unedited[key] = launches.forward(triton_lora, *_forward_operands(c), config=config)
    return _unedited[key]


def check_integers(sizes, arch: int, schedules=SCHEDULES, **altered):
    """Several residencies, seeds and orders in which asynchronous copies land, all launches over one workspace."""
    case = numerics.draw_integer_case(*sizes, torch.bfloat16)
    for options in schedules:
        results, _ = run(case, SMALL[arch], arch, options, **altered)
        numerics.assert_exact(results, case)


def check_dropout(sizes, dtype, arch: int, schedules=DROPPED_SCHEDULES, **altered):
    case = numerics.draw_case(*sizes, dtype, dropout_p=0.3)
    for options in schedules:
        results, _ = run(case, SMALL[arch], arch, options, **altered)
        numerics.assert_accurate(results, case)


def check_needs(needs: Needs, arch: int, **altered):
    """On sm_90 by a tile that is shipped: each subset of gradients is a kernel of its own, which must fit as well."""
    case = numerics.draw_integer_case(264, 48, 48, 8, torch.bfloat16)
    config = SMALL[arch]
    if arch == 90:
        config = TILE_TABLES["hopper"][1]
        instruction = expected_instruction(arch, config, torch.bfloat16)
        altered.setdefault("on_kernel", functools.partial(assert_fits, arch=arch, instruction=instruction))
    results, _ = run(case, config, arch, SCHEDULES[3], needs, **altered)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    numerics.assert_exact(results, case)


def check_float16_range(scaling: float, dropout_p: float, arch: int, **altered):
    """Overflow in float16 where the composed layer overflows, and nowhere else."""
    for regime in float16_range.REGIMES:
        case = float16_range.draw(regime, scaling, 130, 48, 96, 5, dropout_p)
        float16_range.check(run(case, SMALL[arch], arch, SCHEDULES[2], **altered)[0], case)


def check_transposed(sizes, arch: int, schedules=SCHEDULES[1:4], **altered):
    """A base weight that lies as [K, N]."""
    case = numerics.draw_integer_case(*sizes, torch.bfloat16)
    lying = dataclasses.replace(case, weight=case.weight.t().contiguous().t())
    for options in schedules:
        results, _ = run(lying, SMALL[arch], arch, options, **altered)
        numerics.assert_exact(results, case)


def check_infinities(arch: int, schedules=INFINITE_SCHEDULES, **altered):
    """Of dY in dbias. On sm_90 it is made by a product, where other columns than the sum's have infinity times zero."""
    case = numerics.draw_case(*LONG[0], 16, torch.bfloat16)
    case.dy[200, 3], case.dy[5, 40] = float("inf"), float("-inf")
    for options in schedules:
        dbias = run(case, SMALL[arch], arch, options, **altered)[0]["dbias"]
        assert dbias.isinf().nonzero().flatten().tolist() == [3, 40] and not dbias.isnan().any()
        assert dbias[3] > 0 > dbias[40]


class Shipped(NamedTuple):
    """A tile of the tables, and what it runs on here."""

    arch: int
    config: TileConfig
    rank: int
    dtype: torch.dtype
    multiple: int  # of N and K: 16, as those of a model's layers; 8, of which rows start on 16 bytes; 1
    dropout_p: float
    forward_only: bool
    transposed: bool = False  # the base weight lies as [K, N]


def shipped():
    """Each tile once, though two tables may have it. With dropout, which takes the most registers, both ways to make S
    where either may be chosen; and without. What serves other sizes besides meets them without dropout."""
    seen = set()
    for arch, (name, table) in itertools.product(ARCHITECTURES, TILE_TABLES.items()):
        rank = 256 if name.endswith(" large-rank") else FUSED_RANK
        dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
        aligned, few_rows = not name.startswith("unaligned"), name.endswith(" few rows")
        if table_for(arch, rank, dtype.itemsize, aligned, few_rows) != name:
            continue
        makes_s = (False,) if rank > FUSED_RANK else (True,) if dtype == torch.float32 else (True, False)
        size = 16 if aligned else 1
        with_dropout = [(fused, size, 0.0 if few_rows else 0.2) for fused in makes_s]
        without = [] if few_rows else [(makes_s[0], 16 if aligned and dtype != torch.float32 else 8, 0.0)]
        for config, (fused, multiple, dropout_p) in itertools.product(table, (*with_dropout, *without)):
            tile = (arch, config, fused, rank, dtype, multiple)
            if (*tile, dropout_p) in seen or (*tile, 0.2) in seen and few_rows:
                continue
            seen.add((*tile, dropout_p))
            label = f"sm_{arch}-{name}-{config.block_m}x{config.block_n}x{config.block_k}"
            label += "-separate" * (not fused) + "-dropout" * (dropout_p > 0.0)
            config = dataclasses.replace(config, fused=fused)
            yield pytest.param(Shipped(arch, config, rank, dtype, multiple, dropout_p, few_rows), id=label)


def shipped_transposed():
    """Those with dropout, which take the most registers; all but the largest are for the sweep."""
    for each in shipped():
        (tile,) = each.values
        if tile.multiple == 16 and not tile.forward_only and tile.dropout_p > 0.0:
            largest = tile.config.block_n == (256 if tile.arch == 90 else 128) and tile.config.fused
            swept = () if largest else (pytest.mark.sweep,)
            yield pytest.param(tile._replace(transposed=True), id=each.id, marks=swept)


def gate_of(tile: Shipped) -> Callable[[Any], None]:
    """Whether one of its kernels fits a GPU, and draws random bits only where something is dropped."""
    instruction = expected_instruction(tile.arch, tile.config, tile.dtype)

    def gate(kernel: Any) -> None:
        assert_fits(kernel, tile.arch, instruction)
        assert bool(GENERATOR.search(kernel.asm["ptx"])) == (tile.dropout_p > 0.0), "draws a mask"

    return gate


def expected_macs(tile: Shipped, m: int, n: int, k: int, r: int) -> tuple[int, int]:
    """Multiply-adds of the two launches: those of whole tiles and steps, and none besides."""
    config, wgmma, drops = tile.config, multiplies_by_warpgroup(tile.arch), tile.dropout_p > 0.0

    def whole(size: int, step: int) -> int:
        return -(-size // step) * step

    def product(columns: int, contracted: int, block_r: int) -> int:
        rows, columns = whole(m, config.block_m), whole(columns, config.block_n)
        contracted, ranks = whole(contracted, config.block_k), whole(r, min(padded_rank(r), 64))
        return rows * (columns * contracted + contracted * block_r + columns * ranks)

    # Where a masked product is wgmma's, the rank is its height.
    block_r, tall = padded_rank(r), max(padded_rank(r), 64)
    masked_r = tall if drops and wgmma and config.block_m >= 64 else block_r
    group = config.group_m * config.block_m
    steps = sum(whole(min(group, m - first), config.gradient_m) for first in range(0, m, group))
    # dbias is a product with 16 columns there, of which Triton gives four warps the same part if it is a low one.
    for_dbias = 16 * wgmma * (1 if config.gradient_n >= 64 else 4)
    sums_of_dy = whole(n, config.gradient_n) * (block_r + for_dbias)
    return (
        product(n, k, masked_r),
        product(k, n, block_r) + steps * (sums_of_dy + whole(k, config.gradient_n) * masked_r),
    )


def check_shipped(tile: Shipped, **altered):
    """In more steps than the tile's pipelines have stages, and more columns than one; with dropout in more row blocks
    than one of its groups has, so that there is a ragged group behind a whole one. At odd sizes a group is one block:
    only sums of several parts over such columns show that a partial sum is overwritten before it has been read."""
    config, steps = tile.config, tile.config.num_stages + 1
    if tile.multiple == 8:
        config = dataclasses.replace(config, group_m=1)
    n_rows = config.group_m + 2 if tile.dropout_p > 0.0 else 1
    m = max(n_rows * config.block_m, steps * config.gradient_m) + 13
    n = k = max(steps, config.block_n // config.block_k + 1) * config.block_k
    if tile.multiple < 16:
        n, k = n + tile.multiple, k + 3 * tile.multiple
    case = numerics.draw_case(m, n, k, tile.rank - 16 * (tile.multiple == 8), tile.dtype, dropout_p=tile.dropout_p)
    # All schedules take turns.
    options = SCHEDULES[1 + (m + n + config.fused + (tile.dropout_p > 0.0)) % 4]
    given = dataclasses.replace(case, weight=case.weight.t().contiguous().t()) if tile.transposed else case
    results, stats = run(given, config, tile.arch, options, None if tile.forward_only else ALL, **altered)
    # In float32 a thread sums in order, the CPU's eager product in blocks, with a smaller error.
    numerics.assert_accurate(results, case, against_eager=tile.dtype != torch.float32)
    if tile.dtype != torch.float32:
        used = stats[0].wgmma if tile.arch == 90 and config.block_m >= 64 else stats[0].mma
        assert used > 0, "not the matrix instruction that this tile is for"
        expected = expected_macs(tile._replace(config=config), m, n, k, case.lora_a.shape[0])
        made = [launch.macs for launch in stats]
        exact = not config.fused or tile.arch == 90 and config.block_m >= 64
        # Where a product of warps makes S as well, Triton may give several of them the same part of it.
        as_expected = [a == b if exact else a >= b for a, b in zip(made, expected, strict=False)]
        assert all(as_expected), f"{made} multiply-adds, not {expected}"
