"""Rows in segments by the compiled CUDA kernels, in the emulator: values, races, missing waits, accesses out of bounds,
reads of what nobody wrote, deadlocks; and which calls they refuse."""

import dataclasses
import itertools

import pytest
import torch

from fastlora import selection
from fastlora.backends.cuda import segment_launch
from fastlora.backends.cuda.tiles import choose_segment_tile
from fastlora.problem import Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, describe_segments
from tests.emulator import EmulatorError
from tests.support import segment_checks, segments
from tests.support.cuda_checks import needs_kernels
from tests.support.cuda_emulation import SCHEDULES
from tests.support.cuda_segment_bugs import COMPILED, PLANTED, Planted, check_changed, check_compiled
from tests.support.cuda_segment_checks import (
    NEEDS,
    SHORT,
    SIZES,
    SUBSETS,
    TALL,
    TESTED_TALL,
    WAYS,
    check_bad_ends,
    check_layout,
    check_missing,
    check_needs,
    check_neighbours,
    check_schedules,
    check_way,
    run,
)
from tests.support.segment_checks import LAYOUTS

pytestmark = [needs_kernels, pytest.mark.usefixtures("own_workspace", "poisoned")]
TILES = pytest.mark.parametrize("tile", (SHORT, TALL), ids=("64x128", "128x128"))


def schedule(*what) -> object:
    """One or another for each."""
    return SCHEDULES[sum(map(ord, str(what))) % len(SCHEDULES)]


@pytest.mark.parametrize(
    "layout, tile",
    [
        pytest.param(layout, tile, marks=[pytest.mark.sweep] if tile == TALL and layout not in TESTED_TALL else [])
        for layout, tile in itertools.product(LAYOUTS, (SHORT, TALL))
    ],
    ids=str,
)
def test_integers_are_exact(layout, tile):
    check_layout(layout, tile, schedule(layout, tile))


@pytest.mark.parametrize("way", WAYS)
def test_ways(way):
    check_way(way, schedule(way))


@TILES
def test_every_schedule_gives_the_same_bits(tile):
    check_schedules(tile)


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_gradients_that_are_asked_for(needs):
    check_needs(needs, SCHEDULES[2])


@TILES
def test_what_does_not_exist_gives_nan(tile):
    check_missing(tile, SCHEDULES[3])


@TILES
def test_bad_ends_touch_nothing_else(tile):
    check_bad_ends(tile, SCHEDULES[2])


@pytest.mark.parametrize("tile, transposed", list(itertools.product((SHORT, TALL), (False, True))))
def test_a_neighbours_nan_stays_there(tile, transposed):
    check_neighbours(tile, transposed, SCHEDULES[1])


@pytest.mark.parametrize("name", COMPILED)
def test_bugs_in_the_ptx_are_found(name):
    with pytest.raises((EmulatorError, AssertionError)):
        check_compiled(name)


@pytest.mark.sweep
def test_the_sources_as_they_are_pass():
    for check in {planted.check for planted in PLANTED.values()}:
        check_changed(Planted("csrc/schedule.h", "// The queue of tiles", "// The queue", check))


@pytest.mark.sweep
@pytest.mark.parametrize("name", PLANTED)
def test_bugs_in_the_sources_are_found(name):
    """Each compiles two kernels."""
    with pytest.raises((EmulatorError, AssertionError)):
        check_changed(PLANTED[name])


def test_what_is_read_and_written():
    """X once for each column of Y and for S, a weight and the factors once a row block; in the backward dY once more
    for dB, X once for dA; nothing wide is written but Y and dX."""
    (n, k, r), blocks = (256, 128, 16), 4
    case = segments.draw_case([64, 128, 64], n, k, r, torch.bfloat16)
    x, dy, weight, s = 256 * k * 2, 256 * n * 2, n * k * 2, 256 * r * 2
    _, (forward, backward) = run(case, dataclasses.replace(SHORT, group_m=2))
    factors = {"lora_a": blocks * r * k * 2, "lora_b": blocks * r * n * 2}

    def counted(stats, counter: str, names) -> dict[str, int]:
        return {name: getattr(stats.buffers[name], counter) for name in names}

    wanted = {"act": 3 * x, "weight": blocks * weight, "s": 2 * s, **factors}
    assert counted(forward, "bytes_read", wanted) == wanted
    written = {"out": dy, "s": s, "kept_s": s}
    assert counted(forward, "bytes_written", written) == written
    wanted = {"act": 3 * dy, "layer_input": x, "weight": blocks * weight, "lora_a": factors["lora_a"], "saved_s": 2 * s}
    assert counted(backward, "bytes_read", wanted) == wanted
    written = {"out": x, "s": s, "grad_a": 3 * r * k * 2, "grad_b": 3 * r * n * 2, "gradient_partials": 0}
    assert counted(backward, "bytes_written", written) == written


def described(needs=None, **options):
    """The description of a call on a GPU that need not be there; ``needs``: of a backward."""
    dtype = options.pop("dtype", torch.bfloat16)
    case = segments.draw_case([8, 8], 32, 48, options.pop("r", 16), dtype, **options)
    scaling = (1.0, case.scaling) if isinstance(case.scaling, torch.Tensor) else (case.scaling, None)
    where, drop = Segments(case.ends, case.experts, case.adapters), (case.transposed, case.dropout_p, None)
    factors = case.weight, case.lora_a, case.lora_b
    if needs is None:
        return describe_segments(GroupedForward(case.x, *factors, case.bias, *scaling, where, *drop))[1]
    s = case.x.new_zeros(len(case.x), case.lora_a.shape[1])
    dims = 0 if case.bias is None else case.bias.dim()
    return describe_segments(GroupedBackward(case.dy, case.x, *factors, s, dims, *scaling, where, *drop), needs)[1]


def test_what_is_compiled_is_served():
    for options in ({}, {"transposed": True, "r": 64}, {"scaling": "each", "bias": "each"}, {"dtype": torch.float16}):
        assert segment_launch.why_not_compiled(described(**options)) is None, options
        assert segment_launch.why_not_compiled(described(NEEDS, **options)) is None, options
    assert selection.serving_module("cuda", described()) is segment_launch


@pytest.mark.parametrize(
    "options, reason",
    (
        ({"r": 72}, "rank 72 of rows in segments is above 64"),
        ({"dtype": torch.float32}, "dtype torch.float32 is not float16 or bfloat16"),
        ({"dropout_p": 0.1}, "no kernel for rows in segments drops elements"),
        ({"needs": Needs(True, True, True, True), "bias": "each"}, "makes the bias's gradient"),
        ({"dtype": torch.float16, "scaling": "each"}, "scalings of torch.float32 with x of torch.float16"),
    ),
    ids=str,
)
def test_what_is_not_compiled_is_refused_with_its_reason(options, reason):
    assert reason in segment_launch.why_not_compiled(described(**options))


@pytest.mark.parametrize("value", ("1", "True", "0", None))
def test_where_assertions_are_asked_for_triton_serves(monkeypatch, value):
    """Its kernels trap on broken segments; these have no such switch."""
    monkeypatch.setattr(segment_launch.single, "unusable", lambda device: None)
    monkeypatch.delenv("TRITON_DEBUG", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_DEBUG", value)
    reason = segment_launch.why_unsupported(described()._replace(device=torch.device("cuda", 0)))
    assert reason is None if value in ("0", None) else "TRITON_DEBUG asks for kernels that trap" in reason


@pytest.mark.parametrize(
    "changes, reason",
    (
        ({"n_segments": segment_launch.MAX_SEGMENTS + 1}, "1024 segments are not from 1 to 1023"),
        ({"n_segments": 0}, "0 segments are not from 1"),
        ({"n_adapters": 0}, "0 adapters has none to read"),
        ({"weight": torch.float32}, "weights of torch.float32 would have to be cast to torch.bfloat16"),
        ({"scalings": torch.float64}, "scalings of torch.float64"),
        ({"weight_stride": 0}, "weights 0 elements apart interleave"),
    ),
    ids=str,
)
def test_stacks_that_no_kernel_takes_are_refused_with_their_reason(changes, reason):
    spec = described()
    assert reason in segment_launch.why_not_compiled(spec._replace(stacks=spec.stacks._replace(**changes)))


def test_a_tile_is_tall_where_segments_are_long():
    assert [choose_segment_tile(m, g).block_m for m, g in ((4096, 32), (4096, 33), (16, 1))] == [128, 64, 64]


def test_an_only_weight_may_have_any_stride_to_the_next(own_workspace):
    case = segment_checks.draw("one segment", *SIZES, torch.bfloat16, integers=True, bias="one")
    weight = case.weight.as_strided(case.weight.shape, (4, *case.weight.stride()[1:]))
    results, _ = run(segments.changed(case, weight=weight), SHORT)
    segments.assert_exact(results, case)


def test_factors_of_another_dtype_have_gradients_of_it(own_workspace):
    case = segment_checks.draw("few", *SIZES, torch.bfloat16, bias="each", adapter_dtype=torch.float32)
    results, _ = run(case, SHORT)
    assert results["da"].dtype == results["db"].dtype == torch.float32
    segments.assert_accurate(results, case)
