"""Rows in segments, proven on the kernels' own PTX as test_triton_ptx.py does for one adapter: races, missing waits,
accesses out of bounds, reads of what nobody wrote, deadlocks."""

import itertools
import re

import pytest
import torch
import triton

from fastlora.backends import workspace
from fastlora.backends.configs import TILE_TABLES
from fastlora.backends.triton import segment_kernels
from tests.emulator import TrapError
from tests.support.segment_checks import (
    ALL,
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
from tests.support.segments import assert_exact, changed, draw_case
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


@pytest.mark.sweep
def test_under_dropout_on_hopper_no_block_is_overwritten_while_wgmma_reads_it():
    """By the largest tile, whose fused shrink would have that race; see launch.overwrites_act."""
    options = {"dropout_p": 0.2, "scaling": "each"}
    case = draw_case([200, 150], 256, 256, 64, torch.bfloat16, **options)
    run(case, TILE_TABLES["hopper"][0], 90, SCHEDULES[3], None)


BROKEN = {
    "ends": ([5, 4, 45, 48], [5, 5, 45, 52], [-1, 5, 45, 48]),
    "experts": ([1, 2, 3, 1],),
    "adapters": ([0, 1, 0, -2],),
}
SAID = {
    "ends": "offsets decrease, begin below 0 or pass the rows of x",
    "experts": "a segment's weight or adapter does not exist",
    "adapters": "a segment's weight or adapter does not exist",
}


def asserted(ptx: str, line: int) -> str:
    """The message of the assertion whose call is at this line."""
    names = re.findall(r"assertMessage_\d+", "\n".join(ptx.splitlines()[:line]))
    (text,) = re.findall(rf"{names[-1]}\[\d+\] = {{(.*?)}}", ptx)
    return bytes(map(int, text.split(","))).decode().rstrip("\0")


@pytest.mark.parametrize("direction", ["forward", pytest.param("backward", marks=pytest.mark.sweep)])
def test_a_debugged_kernel_traps_where_segments_are_broken(monkeypatch, direction):
    """And gives what it should where they are not. TRITON_DEBUG=1 is read into the knob, which debugs all kernels."""
    if direction == "forward":
        monkeypatch.setattr(triton.knobs.runtime, "debug", True)
    else:  # the forward, which would trap first, is not debugged
        monkeypatch.setattr(segment_kernels.segments_backward_kernel, "debug", True)
    needs = None if direction == "forward" else ALL
    case = draw("few", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    ran: list[str] = []

    def launch(broken):
        return run(broken, SMALL[80], 80, SCHEDULES[3], needs, edit_ptx=lambda ptx: ran.append(ptx) or ptx)[0]

    assert_exact(launch(case), case)
    for name, values in ((name, values) for name, all_values in BROKEN.items() for values in all_values):
        broken = changed(case, **{name: torch.tensor(values, dtype=getattr(case, name).dtype)})
        with pytest.raises(TrapError, match="call.uni __assertfail") as trap:
            launch(broken)
        workspace._by_stream.clear()  # a launch that ends so leaves it as it is
        assert asserted(ran[-1], int(re.search(r"PTX line (\d+)", str(trap.value))[1])) == SAID[name]


def test_nothing_is_asserted_otherwise():
    texts: list[str] = []
    case = draw("few", *SIZES, torch.bfloat16, integers=True, bias="each", scaling="each")
    run(case, SMALL[80], 80, SCHEDULES[3], edit_ptx=lambda ptx: texts.append(ptx) or ptx)
    assert len(texts) == 2 and not any("__assertfail" in text or "trap" in text for text in texts)
