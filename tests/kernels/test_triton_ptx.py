"""The protocol of the Triton kernels, proven on their own PTX: the launchers' real launches run in the emulator, which
detects races, missing waits and fences, accesses out of bounds, reads of what nobody wrote, and deadlocks."""

import dataclasses
import itertools

import pytest
import torch

from fastlora.backends import workspace
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as triton_lora
from fastlora.operands import describe_backward, describe_forward
from fastlora.problem import BackwardOperands, ForwardOperands
from tests.support import numerics
from tests.support.triton_checks import (
    ALL,
    ARCHITECTURES,
    DROPPED,
    FLOAT16_FACTORS,
    INTEGER_SIZES,
    LONG,
    SCHEDULES,
    SMALL,
    SUBSETS,
    TRANSPOSED_SIZES,
    check_dropout,
    check_float16_range,
    check_infinities,
    check_integers,
    check_needs,
    check_shipped,
    check_transposed,
    gate_of,
    needs_compiler,
    run,
    shipped,
    shipped_transposed,
)
from tests.support.triton_emulation import emulated

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("sizes", INTEGER_SIZES, ids=str)
def test_integers_are_exact_under_every_schedule(arch, sizes):
    check_integers(sizes, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("sizes, dtype", DROPPED, ids=str)
def test_dropout_and_ranks(arch, sizes, dtype):
    check_dropout(sizes, dtype, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_small_ranks_by_tiles_of_their_own(arch):
    case = numerics.draw_integer_case(*LONG[0], 16, torch.bfloat16)
    for options in SCHEDULES[1:4]:
        results, _ = run(case, dataclasses.replace(SMALL[arch], fused=False), arch, options)
        numerics.assert_exact(results, case)


def test_short_tiles_drop_without_padding_the_rank():
    """Tiles of 16 rows on sm_90, whose products are no warpgroup's."""
    config = dataclasses.replace(SMALL[90], block_m=16)
    case = numerics.draw_case(88, 72, 136, 8, torch.bfloat16, dropout_p=0.3)
    for options in SCHEDULES[2:4]:
        results, stats = run(case, config, 90, options)
        numerics.assert_accurate(results, case)
        assert all(launch.mma > 0 and launch.wgmma == 0 for launch in stats)


@pytest.mark.parametrize("last", (False, True))
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_between_the_other_tiles_and_behind_them(monkeypatch, arch, last):
    """Several parts of each; which comes first is the launch's choice, and no kernel's own."""
    monkeypatch.setattr(triton_lora, "gradients_last", lambda *sizes: last)
    case = numerics.draw_integer_case(*LONG[0], 16, torch.bfloat16)
    for options in SCHEDULES[1:4]:
        results, _ = run(case, dataclasses.replace(SMALL[arch], group_m=1), arch, options)
        numerics.assert_exact(results, case)


def test_results_are_the_same_bits_under_every_schedule():
    case = numerics.draw_case(*LONG[0], 16, torch.bfloat16, dropout_p=0.1)
    first, *others = [run(case, SMALL[90], 90, options)[0] for options in SCHEDULES]
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_only_the_gradients_asked_for(needs, arch):
    check_needs(needs, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_float32_adapters_over_a_16_bit_layer(arch):
    case = numerics.draw_case(*LONG[0], 16, torch.bfloat16, adapter_dtype=torch.float32, dropout_p=0.3)
    results, _ = run(case, SMALL[arch], arch, SCHEDULES[2])
    assert results["da"].dtype == results["db"].dtype == torch.float32
    numerics.assert_accurate(results, case)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("scaling, dropout_p", FLOAT16_FACTORS)
def test_float16_overflows_where_the_composed_layer_does(arch, scaling, dropout_p):
    check_float16_range(scaling, dropout_p, arch)


@pytest.mark.parametrize("fused", (True, False))
def test_s_of_float16_is_rounded_once(fused):
    """Of odd sums above 2048, which float16 lacks, three quarters: rounded before the scaling as well, they would be
    others. Y is S, by a B that is the identity."""
    case = numerics.draw_integer_case(130, 48, 64, 16, torch.float16)
    x, lora_a = torch.zeros(130, 64), torch.zeros(16, 64)
    x[:, 0], x[:, 1], lora_a[:, 0], lora_a[:, 1] = 2048.0, 2 * torch.arange(130) + 1, 1.0, 1.0
    case = dataclasses.replace(
        case, x=x, lora_a=lora_a, lora_b=torch.eye(48, 16), weight=torch.zeros(48, 64), bias=None, scaling=0.75
    ).to(torch.float16)
    results, _ = run(case, dataclasses.replace(SMALL[80], fused=fused), 80, SCHEDULES[1], needs=None)
    exact = 0.75 * (case.x.double() @ case.lora_a.double().t())
    assert not torch.equal(exact.half(), (0.75 * (exact / 0.75).half().double()).half()), "either way gives the same"
    assert torch.equal(results["y"][:, :16], exact.half())


@pytest.mark.parametrize("backward", (False, True))
def test_a_launch_learns_how_many_programs_run_at_once(monkeypatch, backward):
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(90, n_sms=3))
    c = numerics.draw_integer_case(130, 40, 64, 8, torch.bfloat16)
    shared = (c.scaling, 0.0, None)
    if backward:
        s = torch.zeros(130, 8, dtype=torch.bfloat16)
        operands, spec = describe_backward(BackwardOperands(c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, *shared), ALL)
    else:
        operands, spec = describe_forward(ForwardOperands(c.x, c.weight, c.lora_a, c.lora_b, c.bias, *shared))
    prepared = triton_lora.prepare(spec, SMALL[90])
    monkeypatch.setattr(triton_lora, "resident_programs", lambda *used: 5)
    with emulated(90):
        for wave in (3, 15):
            assert prepared.wave == wave
            prepared(operands)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_infinities_of_dy_reach_dbias_as_infinities(arch):
    check_infinities(arch)


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("sizes", TRANSPOSED_SIZES, ids=str)
def test_a_base_weight_that_lies_transposed(arch, sizes):
    check_transposed(sizes, arch)


@pytest.mark.parametrize("tile", list(shipped_transposed()))
def test_tiles_over_a_weight_that_lies_transposed(tile):
    check_shipped(tile, on_kernel=gate_of(tile))


def test_a_workspace_longer_than_one_pass_of_its_clearing():
    config = dataclasses.replace(SMALL[80], block_m=16)
    case = numerics.draw_integer_case(16 * 1050 + 13, 24, 32, 8, torch.bfloat16)
    for options in SCHEDULES[:2]:
        results, _ = run(case, config, 80, options, needs=None)  # which finds a word that was left
        assert max(buffer.numel() for buffer in workspace._by_stream.values()) > 2 * 1024
        numerics.assert_exact(results, case)


@pytest.mark.parametrize("tile", list(shipped()))
def test_shipped_configurations(tile):
    """They fit a GPU as well."""
    check_shipped(tile, on_kernel=gate_of(tile))
