"""The checks of ``make test`` one by one: a shape under one schedule, where a test runs several.

What looks for defects goes through them: a find that hangs on one of them alone is luck.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from tests.emulator import LaunchOptions
from tests.support import cuda_checks as cuda
from tests.support import cuda_projection_checks as cuda_projections
from tests.support import cuda_quantised_checks as cuda_quantised
from tests.support import cuda_range
from tests.support import cuda_segment_checks as cuda_segments
from tests.support import projection_checks as projections
from tests.support import quantised_checks as quantised
from tests.support import scaled_checks as scaled
from tests.support import segment_checks as segments
from tests.support import triton_checks as triton
from tests.support.cuda_emulation import variants_for

Check = tuple[str, Callable]
LAUNCH_LIMIT_S = 40.0  # of a processor


def limited(schedules: Iterable[LaunchOptions]) -> tuple[LaunchOptions, ...]:
    """A kernel that hangs is given up soon."""
    return tuple(dataclasses.replace(options, timeout_s=LAUNCH_LIMIT_S) for options in schedules)


def _each(
    checks: Iterable[tuple[str, Callable, Sequence[LaunchOptions]]], all_schedules: Sequence[LaunchOptions]
) -> Iterator[Check]:
    """Each check under one of its schedules at a time: no check and no schedule comes again before all others have."""
    checks = [*checks]
    for turn in range(max(len(schedules) for _, _, schedules in checks)):
        for place, (name, check, schedules) in enumerate(checks):
            if turn < len(schedules):
                options = schedules[(turn + place) % len(schedules)]
                one = functools.partial(check, schedules=limited([options]))
                yield f"{name}, schedule {all_schedules.index(options)}", one


def triton_integers(arch: int) -> Iterator[Check]:
    """The smallest layers first."""
    sizes = (*triton.UNEVEN_SIZES, *triton.FUSED_SIZES, *triton.SEPARATE_SIZES)
    checks = (
        (f"sm_{arch} integers {each}", functools.partial(triton.check_integers, each, arch), triton.SCHEDULES)
        for each in sizes
    )
    return _each(checks, triton.SCHEDULES)


def triton_dropped(arch: int) -> Iterator[Check]:
    checks = (
        (
            f"sm_{arch} dropout {sizes} {dtype}",
            functools.partial(triton.check_dropout, sizes, dtype, arch),
            triton.DROPPED_SCHEDULES,
        )
        for sizes, dtype in triton.DROPPED
    )
    return _each(checks, triton.SCHEDULES)


def triton_float16(arch: int) -> Iterator[Check]:
    for factors in triton.FLOAT16_FACTORS:
        yield f"sm_{arch} float16 range {factors}", functools.partial(triton.check_float16_range, *factors, arch)


def triton_transposed(arch: int) -> Iterator[Check]:
    checks = (
        (
            f"sm_{arch} transposed {sizes}",
            functools.partial(triton.check_transposed, sizes, arch),
            triton.SCHEDULES[1:4],
        )
        for sizes in triton.TRANSPOSED_SIZES
    )
    return _each(checks, triton.SCHEDULES)


def triton_infinities(arch: int) -> Iterator[Check]:
    check = functools.partial(triton.check_infinities, arch)
    return _each([(f"sm_{arch} infinities", check, triton.INFINITE_SCHEDULES)], triton.SCHEDULES)


def triton_needs(arch: int) -> Iterator[Check]:
    for needs in triton.SUBSETS:
        name = "+".join(name for name, wanted in needs._asdict().items() if wanted)
        yield f"sm_{arch} gradients {name}", functools.partial(triton.check_needs, needs, arch)


def triton_shipped() -> Iterator[Check]:
    """The smallest tiles first: they are the quickest."""
    for each in reversed([*triton.shipped()]):
        (tile,) = each.values
        yield each.id, functools.partial(triton.check_shipped, tile, on_kernel=triton.gate_of(tile))


def triton_packed_formats() -> Iterator[Check]:
    """Over packed weights: a format in one launch each."""
    for each in quantised.EVERY_FORMAT:
        yield each.describe(), each.check


def triton_packed_integers() -> Iterator[Check]:
    checks = (
        (
            f"sm_{arch} packed integers {sizes}",
            functools.partial(quantised.check_integers, sizes, arch),
            triton.SCHEDULES,
        )
        for arch, sizes in quantised.INTEGERS
    )
    return _each(checks, triton.SCHEDULES)


def triton_scaled() -> Iterator[Check]:
    """DoRA layers."""
    checks = (
        (
            f"sm_{arch} scaled columns {sizes}",
            functools.partial(scaled.check_integers, sizes, arch),
            triton.SCHEDULES,
        )
        for arch, sizes in scaled.INTEGERS
    )
    return _each(checks, triton.SCHEDULES)


def triton_segments(arch: int) -> Iterator[Check]:
    """Rows in segments, the ragged ones first."""
    layouts = sorted(segments.LAYOUTS, key=lambda layout: layout != "ragged")
    checks = (
        (
            f"sm_{arch} segments, {layout}",
            functools.partial(segments.check_layout, layout, arch),
            segments.schedules_of(layout),
        )
        for layout in layouts
    )
    return _each(checks, triton.SCHEDULES)


def _segment_ways(ways: Iterable[tuple[str, int]]) -> Iterator[Check]:
    checks = (
        (f"sm_{arch} segments, {way}", functools.partial(segments.check_way, way, arch), triton.DROPPED_SCHEDULES)
        for way, arch in ways
    )
    return _each(checks, triton.SCHEDULES)


def triton_segment_ways(arch: int) -> Iterator[Check]:
    return _segment_ways(each for each in segments.TESTED_WAYS if each[1] == arch)


def triton_segments_dropped(arch: int) -> Iterator[Check]:
    return _segment_ways([("dropout", arch)])


def triton_segments_float16(arch: int) -> Iterator[Check]:
    for scaling, on_arch in segments.TESTED_SCALINGS:
        if on_arch == arch:
            check = functools.partial(segments.check_float16_range, scaling, arch)
            yield f"sm_{arch} segments, float16 range {scaling}", check


def triton_segment_needs(arch: int) -> Iterator[Check]:
    for needs, on_arch in segments.TESTED_SUBSETS:
        if on_arch == arch:
            name = "+".join(name for name, wanted in needs._asdict().items() if wanted)
            yield f"sm_{arch} segments, gradients {name}", functools.partial(segments.check_needs, needs, arch)


def triton_missing(arch: int) -> Iterator[Check]:
    check = functools.partial(segments.check_missing, arch)
    return _each([(f"sm_{arch} segments, what does not exist", check, triton.DROPPED_SCHEDULES)], triton.SCHEDULES)


def triton_bad_ends(arch: int) -> Iterator[Check]:
    check = functools.partial(segments.check_bad_ends, arch)
    return _each([(f"sm_{arch} segments, bad ends", check, segments.BAD_ENDS_SCHEDULES)], triton.SCHEDULES)


def triton_projections(arch: int) -> Iterator[Check]:
    """Projections that share an input, those first that have most of their own."""
    names = sorted(projections.GROUPS, key=lambda name: name != "mixed")
    checks = (
        (
            f"sm_{arch} projections, {name}",
            functools.partial(projections.check_integers, name, arch),
            projections.schedules_of(name),
        )
        for name in names
    )
    yield from _each(checks, triton.SCHEDULES)
    separate = (f"sm_{arch} projections, separate shrink", functools.partial(projections.check_separate, arch))
    yield from _each([(*separate, triton.DROPPED_SCHEDULES)], triton.SCHEDULES)


def triton_projections_dropped(arch: int) -> Iterator[Check]:
    checks = (
        (
            f"sm_{arch} projections, dropout {dtype}",
            functools.partial(projections.check_dropout, dtype, arch),
            triton.DROPPED_SCHEDULES,
        )
        for dtype in (torch.float16, torch.bfloat16)
    )
    return _each(checks, triton.SCHEDULES)


def triton_projections_float16(arch: int) -> Iterator[Check]:
    yield f"sm_{arch} projections, float16 range", functools.partial(projections.check_float16_range, arch)


def _family(module: str) -> str:
    """Whose kernels a module is part of: those over packed weights, those of segments, those that scale columns, those
    of projections, or all."""
    families = {
        "projection": "projections",
        "projections": "projections",
        "packed": "packed",
        "quantised": "packed",
        "segment": "segments",
        "segments": "segments",
    }
    families |= {"column": "scaled", "scaled": "scaled"}
    return families.get(module.partition("_")[0], "all")


def triton_kinds(module: str) -> list[list[Check]]:
    """The checks of the kernels that a module of theirs is part of, in kinds, but for the tiles that are shipped."""
    kinds = {
        "dense": (
            triton_integers,
            triton_dropped,
            triton_float16,
            triton_infinities,
            triton_needs,
            triton_transposed,
        ),
        "segments": (
            triton_segments,
            triton_segment_ways,
            triton_segment_needs,
            triton_segments_float16,
            triton_missing,
            triton_bad_ends,
        ),
        "projections": (triton_projections, triton_projections_dropped, triton_projections_float16),
    }
    by_family = {
        name: [[*of_kind(arch)] for arch in triton.ARCHITECTURES for of_kind in each] for name, each in kinds.items()
    }
    family, formats = _family(module), [*triton_packed_formats()]
    # Of what decodes, each format is a kind.
    of_formats = [[each] for each in formats] if family == "packed" else [formats]
    by_family["packed"] = [*of_formats, [*triton_packed_integers()]]
    by_family["scaled"] = [[*triton_scaled()]]
    return [kind for name, each in by_family.items() if family in (name, "all") for kind in each if kind]


def triton_checks(module: str) -> list[Check]:
    """All of them, one of each kind after the other; the shipped tiles last."""
    turns = itertools.zip_longest(*triton_kinds(module))
    shipped = triton_shipped() if _family(module) == "all" else ()
    return [*filter(None, itertools.chain(*turns)), *shipped]


def _kernels_of(tile, dropout: bool, rank: int, dtype=torch.bfloat16, **weight: bool) -> set[str]:
    """Names of the forward and the backward kernel; ``weight``: whether it lies transposed, or is decoded, and how."""
    return {variant["name"] for variant in variants_for(tile, dropout, rank, dtype, **weight)}


def cuda_segment_checks() -> Iterator[tuple[str, set[str], Callable]]:
    """Those of rows in segments, as cuda_checks has them; the schedules take turns."""
    options = itertools.cycle(limited(cuda.SCHEDULES))
    for title, tile, layouts in (
        ("64x128", cuda_segments.SHORT, cuda_segments.LAYOUTS),
        ("128x128", cuda_segments.TALL, cuda_segments.TESTED_TALL),
    ):
        kernels = cuda_segments.kernels_of(tile, cuda_segments.SIZES[2])
        checks = {
            **{each: functools.partial(cuda_segments.check_layout, each) for each in layouts},
            "what does not exist": cuda_segments.check_missing,
            "bad ends": cuda_segments.check_bad_ends,
        }
        for what, check in checks.items():
            yield f"segments {title}, {what}", kernels, functools.partial(check, tile, options=next(options))
        for transposed in (False, True):
            read = cuda_segments.kernels_of(tile, cuda_segments.rank_of_neighbours(transposed), transposed=transposed)
            check = functools.partial(cuda_segments.check_neighbours, tile, transposed, next(options))
            yield f"segments {title}, a neighbour's NaN{', transposed' * transposed}", read, check
        check = functools.partial(cuda_segments.check_schedules, tile)
        for name, one in _each([(f"segments {title}, bits", check, cuda.SCHEDULES)], cuda.SCHEDULES):
            yield name, kernels, one
    for way in cuda_segments.WAYS:
        check = functools.partial(cuda_segments.check_way, way, next(options))
        yield f"segments, {way}", cuda_segments.kernels_of_way(way), check
    for needs in cuda_segments.SUBSETS:
        name = "+".join(name for name, wanted in needs._asdict().items() if wanted)
        check = functools.partial(cuda_segments.check_needs, needs, next(options))
        kernels = cuda_segments.kernels_of(cuda_segments.SHORT, cuda_segments.SIZES[2])
        yield f"segments, gradients {name}", kernels, check


def cuda_projection_checks() -> Iterator[tuple[str, set[str], Callable]]:
    """Those of projections that share an input, likewise."""
    options = itertools.cycle(limited(cuda.SCHEDULES))
    of_name = {
        **{name: (group, tile) for name, (group, tile) in cuda_projections.GROUPS.items()},
        **{name: (group, tile) for name, (group, tile, _) in cuda_projections.GROUPED.items()},
    }
    for name, (group, tile) in of_name.items():
        checks = cuda_projections.check_integers if name in cuda_projections.GROUPS else cuda_projections.check_group
        kernels = cuda_projections.kernels_of(group, tile)
        yield f"projections, {name}", kernels, functools.partial(checks, name, next(options))
    for name, (group, tile, dtype, schedules) in cuda_projections.BITS.items():
        kernels = cuda_projections.kernels_of(group, tile, dtype)
        check = functools.partial(cuda_projections.check_schedules, name)
        for title, one in _each([(f"projections, bits of {name}", check, schedules)], cuda.SCHEDULES):
            yield title, kernels, one
    qkv = cuda_projections.kernels_of(cuda_projections.QKV, cuda_projections.WIDE)
    for name in cuda_projections.SUBSETS:
        yield f"projections, {name}", qkv, functools.partial(cuda_projections.check_needs, name, next(options))
    yield "projections, a neighbour's NaN", qkv, functools.partial(cuda_projections.check_neighbours, next(options))
    for name, (tile, rank) in cuda_projections.MASKED.items():
        kernels = cuda_projections.kernels_of(cuda_projections.masked_group(rank, None), tile)
        for end in (None, "65535"):
            check = functools.partial(cuda_projections.check_masks, name, end)
            yield f"projections, mask {name} threshold {end or 'that bits equal'}", kernels, check


def cuda_checks() -> Iterator[tuple[str, set[str], Callable]]:
    """(name, kernels that run, check). Rank 40, whose kernels hold most statements, goes first, and small tiles do."""

    def order(layer):
        tile, _, rank = layer
        return rank != 40, tile.block_m * tile.block_n

    for tile, dropout, rank in sorted(cuda.EVERY_KERNEL, key=order):
        name = f"integers {cuda.describe(tile)} R={rank} {cuda.describe(dropout)}"
        options = limited([cuda.schedule_of(tile, dropout, rank)])[0]
        check = functools.partial(cuda.check_integers, tile, dropout, rank, options)
        yield name, _kernels_of(tile, dropout, rank), check
    for tile, dropout, rank in cuda.TRANSPOSED:
        name = f"transposed {cuda.describe(tile)} R={rank} {cuda.describe(dropout)}"
        options = limited([cuda.schedule_of(tile, dropout, rank, layers=cuda.TRANSPOSED)])[0]
        check = functools.partial(cuda.check_transposed, tile, dropout, rank, options)
        yield name, _kernels_of(tile, dropout, rank, transposed=True), check
    for tile, sizes, dropout_p in cuda.TRANSPOSED_LAYERS:
        kernels = _kernels_of(tile, dropout_p > 0, sizes[3], transposed=True)
        check = functools.partial(cuda.check_schedules, tile, sizes, dropout_p, transposed=True)
        title = f"transposed schedules {cuda.describe(tile)} {sizes} p={dropout_p}"
        for name, one in _each([(title, check, cuda.SCHEDULES[3:])], cuda.SCHEDULES):
            yield name, kernels, one
    for needs in cuda.SUBSETS:
        name = "gradients " + "+".join(n for n, wanted in needs._asdict().items() if wanted)
        yield name, _kernels_of(cuda.LARGE, False, 16), functools.partial(cuda.check_needs, needs)
    for tile, sizes in reversed(cuda.LAYERS):
        for dropout_p in (0.0, 0.3):
            kernels = _kernels_of(tile, dropout_p > 0, sizes[3])
            check = functools.partial(cuda.check_schedules, tile, sizes, dropout_p)
            title = f"schedules {cuda.describe(tile)} {sizes} p={dropout_p}"
            for name, one in _each([(title, check, cuda.SCHEDULES)], cuda.SCHEDULES):
                yield name, kernels, one
    for tile, rank in cuda.FLOAT16_LAYERS:
        kernels = _kernels_of(tile, False, rank, torch.float16)
        check = functools.partial(cuda.check_float16_schedules, tile, rank)
        for name, one in _each([(f"float16 {cuda.describe(tile)} R={rank}", check, cuda.SCHEDULES)], cuda.SCHEDULES):
            yield name, kernels, one
    for tile, rank in cuda.MASKED_LAYERS:
        for end in (None, *cuda.ENDS):
            name = f"mask {cuda.describe(tile)} R={rank} threshold {end or 'that bits equal'}"
            yield name, _kernels_of(tile, True, rank), functools.partial(cuda.check_mask, tile, rank, end)
    for number, layer in enumerate(cuda.GROUPED):
        name = f"groups {cuda.describe(layer[0])} of {layer[0].group_m}"
        options = dataclasses.replace(cuda.schedule_of_group(number), timeout_s=2 * LAUNCH_LIMIT_S)
        yield name, _kernels_of(*layer), functools.partial(cuda.check_group, *layer, options)
    for tile, rank, scaling, dropout_p in cuda_range.OVERFLOWING:
        check = functools.partial(cuda_range.check_overflow, tile, rank, scaling, dropout_p)
        name = f"overflow {cuda.describe(tile)} R={rank} scaling {scaling} p={dropout_p}"
        yield name, _kernels_of(tile, dropout_p > 0, rank, torch.float16), check
    for tile, rank, dtype, dropout_p in cuda_range.INFINITE:
        check = functools.partial(cuda_range.check_infinities, tile, rank, dtype, dropout_p)
        name = f"infinities {cuda.describe(tile)} R={rank} p={dropout_p} {dtype}"
        yield name, _kernels_of(tile, dropout_p > 0, rank, dtype), check
    for sizes, tile in cuda_quantised.INTEGERS:
        check = functools.partial(cuda_quantised.check_integers, sizes, tile)
        title = f"packed integers {cuda.describe(tile)} {sizes}"
        for name, one in _each([(title, check, cuda.SCHEDULES)], cuda.SCHEDULES):
            yield name, _kernels_of(tile, False, sizes[3], decodes=True), one
    for number, each in enumerate(cuda_quantised.EVERY_FORMAT):
        options = limited([cuda.schedule_of_group(number)])[0]
        kernels = _kernels_of(each.tile, each.dropout_p > 0, each.sizes[3], each.dtype, decodes=True)
        yield f"packed {each.describe()}", kernels, functools.partial(each.check, options)
    for sizes, tile in cuda_quantised.IN_LOOP_INTEGERS:
        check = functools.partial(cuda_quantised.check_integers_in_loop, sizes, tile)
        title = f"in the loop, integers splits {tile.splits} {sizes}"
        for name, one in _each([(title, check, cuda.SCHEDULES)], cuda.SCHEDULES):
            yield name, _kernels_of(tile, False, sizes[3], in_loop=True), one
    for number, each in enumerate(cuda_quantised.SELECTED):
        options = limited([cuda.schedule_of_group(number)])[0]
        kernels = _kernels_of(each.tile, False, 8, each.dtype, in_loop=True)
        yield f"in the loop, {each.describe()}", kernels, functools.partial(each.check, options)
    options = dataclasses.replace(cuda.SCHEDULES[1], timeout_s=2 * LAUNCH_LIMIT_S)
    grouped = functools.partial(cuda_quantised.check_group, options)
    yield "packed groups", _kernels_of(cuda_quantised.GROUPED, False, 16, decodes=True), grouped
    yield from cuda_segment_checks()
    yield from cuda_projection_checks()
