"""Projections that share an input, proven on the kernels' own PTX as test_triton_ptx.py does for one layer: races,
missing waits, accesses out of bounds, reads of what nobody wrote, deadlocks."""

import itertools

import pytest
import torch

from tests.support import projection_checks as checks
from tests.support.triton_checks import ARCHITECTURES, SCHEDULES, needs_compiler

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]
TESTED = {("q, k, v", 80), ("mixed", 80), ("without dS", 80)}


def swept(condition: bool) -> tuple:
    return (pytest.mark.sweep,) if condition else ()


@pytest.mark.parametrize(
    "name, arch",
    [pytest.param(*each, marks=swept(each not in TESTED)) for each in itertools.product(checks.GROUPS, ARCHITECTURES)],
)
def test_integers_are_exact_under_every_schedule(name, arch):
    checks.check_integers(name, arch)


@pytest.mark.sweep
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_s_in_tiles_of_its_own(arch):
    checks.check_separate(arch)


@pytest.mark.parametrize(
    "dtype, arch",
    [
        (torch.float16, 80),
        pytest.param(torch.bfloat16, 80, marks=pytest.mark.sweep),
        pytest.param(torch.bfloat16, 90, marks=pytest.mark.sweep),
    ],
    ids=str,
)
def test_each_projection_has_its_mask(dtype, arch):
    checks.check_dropout(dtype, arch)


@pytest.mark.sweep
def test_a_float16_branch_overflows_where_the_composed_layer_does():
    checks.check_float16_range(80)


@pytest.mark.parametrize("tile", list(checks.shipped()))
def test_shipped_tiles(tile):
    checks.check_shipped(tile)


@pytest.mark.sweep
def test_results_are_the_same_bits_under_every_schedule():
    group = checks.draw(139, 104, checks.DROPPED, torch.float16)
    first, *others = [checks.emulate(group, 80, options)[0] for options in SCHEDULES[1:4]]
    for other in others:
        assert torch.equal(other[0]["dx"], first[0]["dx"])
        for mine, theirs in zip(other[1], first[1], strict=True):
            assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
