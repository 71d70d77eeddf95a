"""The protocol of the Triton kernels, proven on their own PTX: the launchers' real launches run in the emulator, which
detects races, missing waits and fences, accesses out of bounds, reads of what nobody wrote, and deadlocks."""

import dataclasses
import itertools
from unittest import mock

import pytest
import torch

from fastlora.backends import workspace
from fastlora.backends.configs import FUSED_RANK, LADDERS, TileConfig, ladder_for
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.problem import Needs
from tests.emulator import LaunchOptions
from tests.support import float16_range, numerics
from tests.support.triton_emulation import emulated

pytestmark = pytest.mark.skipif(
    triton_lora.triton.knobs.runtime.interpret,
    reason="the interpreter compiles no PTX; these tests have their own process",
)

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


# [M, N, K]. Contractions have more steps than a pipeline has stages, for else what it prefetches never happens; and
# leave every remainder by the stages, for which of them a loop ends on is where its wait for the last step matters.
# The first has row groups before, between and after others: these read a partial sum, write one, or do both.
# Multiples of 16, as a model's layers are, make other kernels than the rest: their loads are asynchronous copies.
LONG = ((272, 160, 192), (208, 224, 160), (176, 192, 224))
BESIDE_SIZES = tuple((*size, 16) for size in LONG)
ALONE_SIZES = tuple((*size, 96) for size in LONG)
UNEVEN_SIZES = ((264, 136, 200, 8), (264, 136, 200, 72), (130, 40, 64, 16), (97, 33, 47, 3))
INTEGER_SIZES = (*BESIDE_SIZES, *ALONE_SIZES, *UNEVEN_SIZES)
MASKED_SIZES = tuple((*size, 16) for size in LONG)
DROPPED_SIZES = (*MASKED_SIZES, *((139, 136, 200, r) for r in (1, 40, 200, 256)))


@pytest.fixture(autouse=True)
def own_workspace(monkeypatch, poisoned):
    """What one test leaves dirty is no one else's."""
    monkeypatch.setattr(workspace, "_by_stream", {})


def run(
    case: numerics.Case,
    config: TileConfig,
    arch: int,
    options: LaunchOptions,
    needs=ALL,
    kernels=triton_lora,
    edit_ptx=None,
):
    """Forward and backward of one layer by ``kernels``; its results, and the counters of both launches.

    The device has few multiprocessors, so that a wave of the queue is shorter than a row group.
    """
    c = case
    needs = needs._replace(dbias=needs.dbias and c.bias is not None)
    device = mock.patch.object(kernels, "target_of", lambda device: Target(arch, n_sms=3))
    if kernels is not triton_lora:  # what a mutant compiles to need not be covered
        edit_ptx = edit_ptx or str
    with device, emulated(arch, options, edit_ptx) as stats:
        forward_args = (c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)
        y, s = kernels.lora_forward(*forward_args, config=config)
        backward_args = (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, needs)
        gradients = kernels.lora_backward(*backward_args, config=config)
    assert len(stats) == 2, "one launch each way"
    assert not any(buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return {"y": y, **{n: g for n, g in gradients._asdict().items() if g is not None}}, stats


def check_integers(sizes, arch: int, schedules=SCHEDULES, **altered):
    """Several residencies, seeds and orders in which asynchronous copies land, all launches over one workspace."""
    case = numerics.draw_integer_case(*sizes, torch.bfloat16)
    for options in schedules:
        results, _ = run(case, SMALL[arch], arch, options, **altered)
        numerics.assert_exact(results, case)


def check_dropout(sizes, dtype, arch: int, schedules=SCHEDULES[2:4], **altered):
    case = numerics.draw_case(*sizes, dtype, dropout_p=0.3)
    for options in schedules:
        results, _ = run(case, SMALL[arch], arch, options, **altered)
        numerics.assert_accurate(results, case)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("sizes", INTEGER_SIZES, ids=str)
def test_integers_are_exact_under_every_schedule(arch, sizes):
    check_integers(sizes, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", DROPPED_SIZES, ids=str)
def test_dropout_and_ranks(arch, dtype, sizes):
    check_dropout(sizes, dtype, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_small_ranks_by_tiles_of_their_own(arch):
    case = numerics.draw_integer_case(*LONG[0], 16, torch.bfloat16)
    for options in SCHEDULES[1:4]:
        results, _ = run(case, dataclasses.replace(SMALL[arch], fused=False), arch, options)
        numerics.assert_exact(results, case)


def test_results_are_the_same_bits_under_every_schedule():
    case = numerics.draw_case(*LONG[0], 16, torch.bfloat16, dropout_p=0.1)
    first, *others = [run(case, SMALL[90], 90, options)[0] for options in SCHEDULES]
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("needs", [Needs(*b) for b in itertools.product((False, True), repeat=4) if any(b)], ids=str)
def test_only_the_gradients_asked_for(needs, arch):
    case = numerics.draw_integer_case(264, 48, 48, 8, torch.bfloat16)
    results, _ = run(case, SMALL[arch], arch, SCHEDULES[3], needs)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    numerics.assert_exact(results, case)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float32_adapters_over_a_16_bit_layer(arch):
    case = numerics.draw_case(*LONG[0], 16, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.3)
    results, _ = run(case, SMALL[arch], arch, SCHEDULES[2])
    assert results["da"].dtype == results["db"].dtype == torch.float32
    numerics.assert_accurate(results, case)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("scaling, dropout_p", [(-0.3, 0.0), (1.0, 0.3), (2.0, 0.0), (-100.7, 0.0), (3000.3, 0.3)])
def test_float16_overflows_where_the_composed_layer_does(arch, scaling, dropout_p):
    for regime in float16_range.REGIMES:
        case = float16_range.draw(regime, scaling, 130, 48, 96, 5, dropout_p)
        float16_range.check(run(case, SMALL[arch], arch, SCHEDULES[2])[0], case)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_infinities_of_dy_reach_dbias_as_infinities(arch):
    """On sm_90 by a product, where other columns than the sum's see infinity times zero."""
    case = numerics.draw_case(*LONG[0], 16, torch.bfloat16)
    case.dy[200, 3], case.dy[5, 40] = float("inf"), float("-inf")
    dbias = run(case, SMALL[arch], arch, SCHEDULES[0])[0]["dbias"]
    assert dbias.isinf().nonzero().flatten().tolist() == [3, 40] and not dbias.isnan().any()
    assert dbias[3] > 0 > dbias[40]


def test_workspaces_of_two_streams_do_not_meet(monkeypatch):
    case = numerics.draw_integer_case(130, 40, 64, 8, torch.bfloat16)
    streams = itertools.cycle([torch.zeros(64, dtype=torch.int32) for _ in range(2)])
    used = []

    def borrow(n_words, device):
        used.append(next(streams))
        return used[-1]

    monkeypatch.setattr(triton_lora, "borrow_workspace", borrow)
    for options in SCHEDULES[:2]:
        results, _ = run(case, SMALL[90], 90, options)
        numerics.assert_exact(results, case)
    assert len({buffer.data_ptr() for buffer in used}) == 2 and not any(buffer.any() for buffer in used)


def shipped():
    for arch, (name, ladder) in itertools.product(ARCHITECTURES, LADDERS.items()):
        rank = 256 if name.endswith(" wide") else FUSED_RANK
        dtype = torch.float32 if name.startswith("float32") else torch.bfloat16
        aligned = not name.startswith("odd")
        if ladder_for(arch, rank, dtype.itemsize, aligned) != name:
            continue
        makes_s = (False,) if rank > FUSED_RANK else (True,) if dtype == torch.float32 else (True, False)
        for (number, config), fused, uneven in itertools.product(enumerate(ladder), makes_s, (False, True)):
            if (uneven and not fused and len(makes_s) == 2) or not (uneven or aligned):
                continue  # every tile at even sizes, and once at uneven ones
            label = f"sm_{arch}-{name}-{config.block_m}x{config.block_n}x{config.block_k}"
            label += "-alone" * (not fused) + "-uneven" * uneven
            config = dataclasses.replace(config, fused=fused)
            yield pytest.param(arch, config, rank, dtype, aligned, number + (not fused), uneven, id=label)


def check_shipped(arch, config, rank, dtype, aligned, number, uneven, **altered):
    """The very tile of the tables, on a problem of a few, in more steps than its pipelines have stages. Half of the
    tiles in row groups of one block, so that gradients are sums over several parts."""
    config = config if config.fused else dataclasses.replace(config, group_m=1)
    steps = config.num_stages + 1
    tail = 8 if uneven else 16
    m = max(config.block_m, steps * config.gradient_m) + tail + uneven
    n = k = max(config.block_n, steps * config.block_k) + tail
    if not aligned:
        n, k = n + 1, k + 3
    dropout_p = 0.2 * ((number + uneven) % 2)
    case = numerics.draw_case(m, n, k, rank - 8 * uneven, dtype, dropout_p=dropout_p)
    results, stats = run(case, config, arch, SCHEDULES[1 + number % 4], **altered)
    # In float32 a thread sums in order, the CPU's eager product in blocks, with a smaller error.
    numerics.assert_accurate(results, case, against_eager=dtype != torch.float32)
    if dtype != torch.float32:
        used = stats[0].wgmma if arch == 90 and config.block_m >= 64 else stats[0].mma
        assert used > 0, "not the matrix instruction that this tile is for"


@pytest.mark.parametrize("arch, config, rank, dtype, aligned, number, uneven", list(shipped()))
def test_shipped_configurations(arch, config, rank, dtype, aligned, number, uneven):
    check_shipped(arch, config, rank, dtype, aligned, number, uneven)
