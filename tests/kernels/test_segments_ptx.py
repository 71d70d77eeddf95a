"""Rows in segments, proven on the kernels' own PTX as test_triton_ptx.py does for one adapter: races, missing waits,
accesses out of bounds, reads of what nobody wrote, deadlocks."""

import itertools

import pytest
import torch

from tests.support.segment_checks import (
    FLOAT16_SCALINGS,
    LAYOUTS,
    SIZES,
    SUBSETS,
    WAYS,
    check_bad_ends,
    check_float16_range,
    check_layout,
    check_missing,
    check_needs,
    check_way,
    draw,
    run,
)
from tests.support.triton_checks import ARCHITECTURES, SCHEDULES, SMALL, needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_exact_under_every_schedule(arch, layout):
    """All layouts by one kernel each way."""
    check_layout(layout, arch, SCHEDULES if layout == "ragged" else SCHEDULES[1::2])


# What sm_90 has of its own is in the products of the fused shrink and under dropout.
IN_SWEEP = {("uneven", 90), ("separate", 90)}


@pytest.mark.parametrize(
    "way, arch",
    [
        pytest.param(way, arch, marks=[pytest.mark.sweep] if (way, arch) in IN_SWEEP else [])
        for way, arch in itertools.product(WAYS, ARCHITECTURES)
    ],
)
def test_ways(way, arch):
    check_way(way, arch)


@pytest.mark.parametrize("scaling", FLOAT16_SCALINGS)
def test_a_float16_branch_overflows_where_the_composed_layer_does(scaling):
    check_float16_range(scaling, 80)


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_gradients_that_are_asked_for(arch, needs):
    check_needs(needs, arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_does_not_exist_gives_nan(arch):
    check_missing(arch)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_bad_ends_touch_nothing_else(arch):
    check_bad_ends(arch)


def test_results_are_the_same_bits_under_every_schedule():
    case = draw("ragged", *SIZES, torch.bfloat16, bias="each", scaling="each")
    first, *others = [run(case, SMALL[80], 80, options)[0] for options in SCHEDULES]
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)
