"""Rows in segments, proven on the kernels' own PTX as test_triton_ptx.py does for one adapter: races, missing waits,
accesses out of bounds, reads of what nobody wrote, deadlocks."""

import itertools

import pytest
import torch

from tests.support.segment_checks import (
    LAYOUTS,
    SIZES,
    TESTED_SCALINGS,
    TESTED_SUBSETS,
    TESTED_WAYS,
    WAYS,
    check_bad_ends,
    check_float16_range,
    check_layout,
    check_missing,
    check_needs,
    check_way,
    draw,
    run,
    schedules_of,
)
from tests.support.triton_checks import ARCHITECTURES, SCHEDULES, SMALL, needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_integers_are_exact_under_every_schedule(arch, layout):
    """All layouts by one kernel each way, but for hundreds of segments."""
    check_layout(layout, arch, schedules_of(layout))


@pytest.mark.parametrize(
    "way, arch",
    [
        pytest.param(way, arch, marks=[] if (way, arch) in TESTED_WAYS else [pytest.mark.sweep])
        for way, arch in itertools.product(WAYS, ARCHITECTURES)
    ],
)
def test_ways(way, arch):
    check_way(way, arch)


@pytest.mark.parametrize("scaling, arch", TESTED_SCALINGS)
def test_a_float16_branch_overflows_where_the_composed_layer_does(scaling, arch):
    check_float16_range(scaling, arch)


@pytest.mark.parametrize("needs, arch", TESTED_SUBSETS, ids=str)
def test_gradients_that_are_asked_for(needs, arch):
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
