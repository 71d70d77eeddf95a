"""Every defect that the tests of the protocol are known to find, and what finds each.

A defect is a planted bug, or one wait, fence or barrier less. Each is looked for by the checks of ``make test`` alone,
at their own shapes and schedules. A check here is one shape under one schedule, where its test runs several: a find
that hangs on one of them alone is luck.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch

from fastlora.backends import workspace
from tests.emulator import EmulatorError, LaunchOptions, TrapError
from tests.support import cuda_bugs, deletions, mutants
from tests.support import cuda_checks as cuda
from tests.support import quantised_checks as quantised
from tests.support import segment_checks as segments
from tests.support import triton_checks as triton
from tests.support.cuda_emulation import ptx_of, variants_for
from tests.support.numerics import poison

Check = tuple[str, Callable]
LAUNCH_LIMIT_S = 40.0  # of a processor


@dataclass(frozen=True)
class Finding:
    """check: the emulator's error, or "values", or "workspace"."""

    check: str
    message: str
    by: str


@dataclass(frozen=True)
class Defect:
    """place: the statement or instruction concerned. checks: what looks for it, by name, the most telling first.
    redundant: why nothing need find it. further: launches beyond the tests', which must not find it either then.
    ways: how many of the checks must find it."""

    name: str
    place: str
    checks: tuple[tuple[str, Callable[[], None]], ...]
    redundant: str | None = None
    further: tuple[tuple[str, Callable[[], None]], ...] = ()
    ways: int = 2

    def find(self, ways: int | None = None) -> list[Finding]:
        """By the first checks that find it: as many as must, or ``ways``."""
        return first_findings(self.checks, ways or self.ways)

    def find_further(self) -> list[Finding]:
        return first_findings(self.further, 1)


def failure(check: Callable[[], None]) -> tuple[str, str] | None:
    """The kind and the text of a check's failure, or None; the workspaces are the check's own."""
    with pytest.MonkeyPatch.context() as patch:
        poison(patch)
        patch.setattr(workspace, "_by_stream", {})
        try:
            check()
        except EmulatorError as error:
            return type(error).__name__, str(error)
        except AssertionError as error:
            return "workspace" if "workspace" in str(error) else "values", str(error)
    return None


def first_findings(
    checks: Iterable[tuple[str, Callable[[], None]]],
    ways: int,
    failure: Callable[[Callable[[], None]], tuple[str, str] | None] = failure,
) -> list[Finding]:
    """Of the first ``ways`` checks that fail; ``failure`` tells whether one does."""
    failed = ((by, failure(check)) for by, check in checks)
    return [*itertools.islice((Finding(*found, by) for by, found in failed if found), ways)]


def _integers(sizes, arch: int, schedules=triton.SCHEDULES):
    return functools.partial(triton.check_integers, sizes, arch, schedules=_limited(schedules))


def _dropped(sizes, arch: int, schedules=triton.DROPPED_SCHEDULES, dtype=torch.bfloat16):
    return functools.partial(triton.check_dropout, sizes, dtype, arch, schedules=_limited(schedules))


def _limited(schedules: Iterable[LaunchOptions]) -> tuple[LaunchOptions, ...]:
    """A kernel that hangs is given up soon."""
    return tuple(dataclasses.replace(options, timeout_s=LAUNCH_LIMIT_S) for options in schedules)


def _each(check: Callable, name: str, all_schedules: Sequence[LaunchOptions], schedules=None) -> Iterator[Check]:
    """The check under one of its schedules at a time."""
    for options in schedules or all_schedules:
        one = functools.partial(check, schedules=_limited([options]))
        yield f"{name}, schedule {all_schedules.index(options)}", one


def triton_integers(arch: int) -> Iterator[Check]:
    """The smallest layers first."""
    for sizes in (*triton.UNEVEN_SIZES, *triton.FUSED_SIZES, *triton.SEPARATE_SIZES):
        check = functools.partial(triton.check_integers, sizes, arch)
        yield from _each(check, f"sm_{arch} integers {sizes}", triton.SCHEDULES)


def triton_dropped(arch: int) -> Iterator[Check]:
    for sizes, dtype in triton.DROPPED:
        check, name = functools.partial(triton.check_dropout, sizes, dtype, arch), f"sm_{arch} dropout {sizes} {dtype}"
        yield from _each(check, name, triton.SCHEDULES, triton.DROPPED_SCHEDULES)


def triton_float16(arch: int) -> Iterator[Check]:
    for factors in triton.FLOAT16_FACTORS:
        yield f"sm_{arch} float16 range {factors}", functools.partial(triton.check_float16_range, *factors, arch)


def triton_transposed(arch: int) -> Iterator[Check]:
    for sizes in triton.TRANSPOSED_SIZES:
        check, name = functools.partial(triton.check_transposed, sizes, arch), f"sm_{arch} transposed {sizes}"
        yield from _each(check, name, triton.SCHEDULES, triton.SCHEDULES[1:4])


def triton_infinities(arch: int) -> Iterator[Check]:
    yield from _each(
        functools.partial(triton.check_infinities, arch),
        f"sm_{arch} infinities",
        triton.SCHEDULES,
        triton.INFINITE_SCHEDULES,
    )


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
    for arch, sizes in quantised.INTEGERS:
        check = functools.partial(quantised.check_integers, sizes, arch)
        yield from _each(check, f"sm_{arch} packed integers {sizes}", triton.SCHEDULES)


def triton_segments(arch: int) -> Iterator[Check]:
    """Rows in segments, the ragged ones first."""
    for layout in sorted(segments.LAYOUTS, key=lambda layout: layout != "ragged"):
        check = functools.partial(segments.check_layout, layout, arch)
        yield from _each(check, f"sm_{arch} segments, {layout}", triton.SCHEDULES)


def triton_segment_ways(arch: int) -> Iterator[Check]:
    for way in segments.WAYS:
        check = functools.partial(segments.check_way, way, arch)
        yield from _each(check, f"sm_{arch} segments, {way}", triton.SCHEDULES, triton.DROPPED_SCHEDULES)


def triton_segments_dropped(arch: int) -> Iterator[Check]:
    check = functools.partial(segments.check_way, "dropout", arch)
    yield from _each(check, f"sm_{arch} segments, dropout", triton.SCHEDULES, triton.DROPPED_SCHEDULES)


def triton_bad_ends(arch: int) -> Iterator[Check]:
    check = functools.partial(segments.check_bad_ends, arch)
    yield from _each(check, f"sm_{arch} segments, bad ends", triton.SCHEDULES, segments.BAD_ENDS_SCHEDULES)


def _family(module: str) -> str:
    """Whose kernels a module is part of: those over packed weights, those of segments, or all."""
    families = {"packed": "packed", "quantised": "packed", "segment": "segments", "segments": "segments"}
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
        "segments": (triton_segments, triton_segment_ways, triton_bad_ends),
    }
    by_family = {
        name: [[*of_kind(arch)] for arch in triton.ARCHITECTURES for of_kind in each] for name, each in kinds.items()
    }
    family, formats = _family(module), [*triton_packed_formats()]
    # Of what decodes, each format is a kind.
    of_formats = [[each] for each in formats] if family == "packed" else [formats]
    by_family["packed"] = [*of_formats, [*triton_packed_integers()]]
    return [kind for name, each in by_family.items() if family in (name, "all") for kind in each]


def triton_checks(module: str) -> list[Check]:
    """All of them."""
    shipped = triton_shipped() if _family(module) == "all" else ()
    return [*itertools.chain(*triton_kinds(module)), *shipped]


def _with_mutant(mutant: mutants.Mutant, place: str, checks: Iterable[Check]) -> Defect:
    kernels = functools.cache(lambda: mutants.load(mutant))
    return Defect(mutant.name, place, tuple((name, lambda c=check: c(kernels=kernels())) for name, check in checks))


def triton_planted() -> list[Defect]:
    """By the checks of what each changes."""
    checks = {
        name: [check for arch in triton.ARCHITECTURES for check in checks_of(arch)]
        for name, checks_of in (
            ("integers", triton_integers),
            ("dropout", triton_dropped),
            ("float16", triton_float16),
            ("infinities", triton_infinities),
            ("segments", triton_segments),
            ("segments, dropout", triton_segments_dropped),
            ("bad ends", triton_bad_ends),
        )
    }
    checks["packed values"] = [*triton_packed_formats()]
    checks["quantised"] = [*triton_packed_integers()]
    return [_with_mutant(mutant, f"{mutant.module}.py", checks[mutant.shows]) for mutant in mutants.MUTANTS]


def triton_deletions() -> list[Defect]:
    """In the sources, so in every kernel that is compiled from them."""
    return [_with_mutant(each, f"{each.module}.py", triton_checks(each.module)) for each in deletions.in_triton()]


def triton_compiled() -> list[Defect]:
    """In the PTX, instruction by instruction: mostly the compiler's, so that one way to find each is enough."""
    defects = []
    for arch in triton.ARCHITECTURES:
        for what, sizes, check in (
            ("fused shrink", triton.FUSED_SIZES, _integers),
            ("separate shrink", triton.SEPARATE_SIZES, _integers),
            ("dropout", triton.MASKED_SIZES, _dropped),
        ):
            tests = [(str(each), check(each, arch)) for each in sizes]
            further = [
                (f"{each} {options}", check(each, arch, schedules=(options,)))
                for each, options in _further_launches(rank=sizes[0][3])
            ]
            for text in _texts(tests[0][1]):
                kernel = f"sm_{arch} {_direction(text)}, {what}"
                for deletion in deletions.find(text):
                    missing = functools.partial(_check_edited, text, deletion)
                    defects.append(
                        Defect(
                            f"{kernel}: {deletion.what}, PTX line {deletion.line}",
                            deletion.source,
                            tuple((name, functools.partial(missing, check)) for name, check in tests),
                            _why_redundant(deletion),
                            (
                                ("execution", functools.partial(_check_executed, text, deletion, tests[0][1])),
                                *((name, functools.partial(missing, check)) for name, check in further),
                            ),
                            ways=1,
                        )
                    )
    return defects


def _direction(text: str) -> str:
    return "forward" if "lora_forward_kernel" in text else "backward"


def _check_edited(text: str, deletion: deletions.Deletion, check) -> None:
    """A check without an instruction of one of the kernels that it launches."""
    launched = []

    def edit(ptx: str) -> str:
        launched.append(ptx)
        return deletions.without(text, [deletion]) if ptx == text else ptx

    check(edit_ptx=edit, only=_direction(text))
    if text not in launched:
        raise RuntimeError("the check launches other kernels than the one without the instruction")


def _check_executed(text: str, deletion: deletions.Deletion, check) -> None:
    """What never runs can be deleted unnoticed."""
    try:
        _check_edited(text, dataclasses.replace(deletion, replacement="trap"), check)
    except TrapError:
        return
    raise AssertionError("the instruction is never executed")


def _further_launches(rank: int, n: int = 5):
    """Random sizes and schedules, of the same kernels as triton.LONG: these know whether there are several row groups,
    whether M is a multiple of 16, and N and K of a step."""
    generator = random.Random(rank)
    for i in range(n):
        sizes = 16 * generator.randrange(9, 25), 32 * generator.randrange(1, 9), 32 * generator.randrange(1, 9), rank
        yield sizes, LaunchOptions(seed=9 + i, resident=i % 3, async_policy="random", shuffle_ctas=True)


_ASKED_FOR = ("wait for a flag", "acquire of ", "release of ")


def _why_redundant(deletion: deletions.Deletion) -> str | None:
    """Why nothing need find that a kernel lacks the instruction; what the Triton sources ask for has no excuse."""
    if deletion.what.startswith(_ASKED_FOR):
        return None
    if "debug_barrier" in deletions.source_line(deletion.source, mutants.SOURCES):
        return "other barriers are near in this kernel; that the sources lack it is found"
    return "the compiler's own; without it all accesses are still ordered, in every launch"


def _texts(check) -> list[str]:
    """The PTX that a check runs."""
    texts = {}

    def record(ptx):
        texts[ptx] = None
        return ptx

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workspace, "_by_stream", {})
        check(schedules=triton.SCHEDULES[:1], edit_ptx=record)
    return list(texts)


def cuda_planted() -> list[Defect]:
    """By the checks that launch the kernel that the bug is planted in."""
    every = list(cuda_checks())

    def defect(name: str) -> Defect:
        broken, edit = cuda_bugs.SEEDED_BUGS[name]

        def ptx(kernel: str) -> str:
            return edit(ptx_of(kernel)) if kernel == broken.kernel else ptx_of(kernel)

        checks = [(by, functools.partial(check, ptx=ptx)) for by, kernels, check in every if broken.kernel in kernels]
        # The mask's single bits are seen by few.
        checks.sort(key=lambda each: broken.masks and not each[0].startswith("mask"))
        return Defect(name, broken.kernel, tuple(checks))

    return [defect(name) for name in cuda_bugs.SEEDED_BUGS]


def _kernels_of(tile, dropout: bool, rank: int, dtype=torch.bfloat16) -> set[str]:
    """Names of the forward and the backward kernel."""
    return {variant["name"] for variant in variants_for(tile, dropout, rank, dtype)}


def cuda_checks() -> Iterator[tuple[str, set[str], Callable]]:
    """(name, kernels that run, check). Rank 40, whose kernels hold most statements, goes first, and small tiles do."""

    def order(layer):
        tile, _, rank = layer
        return rank != 40, tile.block_m * tile.block_n

    for tile, dropout, rank in sorted(cuda.EVERY_KERNEL, key=order):
        name = f"integers {cuda.describe(tile)} R={rank} {cuda.describe(dropout)}"
        options = _limited([cuda.schedule_of(tile, dropout, rank)])[0]
        check = functools.partial(cuda.check_integers, tile, dropout, rank, options)
        yield name, _kernels_of(tile, dropout, rank), check
    for needs in cuda.SUBSETS:
        name = "gradients " + "+".join(n for n, wanted in needs._asdict().items() if wanted)
        yield name, _kernels_of(cuda.LARGE, False, 16), functools.partial(cuda.check_needs, needs)
    for tile, sizes in reversed(cuda.LAYERS):
        for dropout_p in (0.0, 0.3):
            kernels = _kernels_of(tile, dropout_p > 0, sizes[3])
            check = functools.partial(cuda.check_schedules, tile, sizes, dropout_p)
            title = f"schedules {cuda.describe(tile)} {sizes} p={dropout_p}"
            for name, one in _each(check, title, cuda.SCHEDULES):
                yield name, kernels, one
    for tile, rank in cuda.FLOAT16_LAYERS:
        kernels = _kernels_of(tile, False, rank, torch.float16)
        check = functools.partial(cuda.check_float16_schedules, tile, rank)
        for name, one in _each(check, f"float16 {cuda.describe(tile)} R={rank}", cuda.SCHEDULES):
            yield name, kernels, one
    for tile, rank in cuda.MASKED_LAYERS:
        for end in (None, *cuda.ENDS):
            name = f"mask {cuda.describe(tile)} R={rank} threshold {end or 'that bits equal'}"
            yield name, _kernels_of(tile, True, rank), functools.partial(cuda.check_mask, tile, rank, end)
    for number, layer in enumerate(cuda.GROUPED):
        name = f"groups {cuda.describe(layer[0])} of {layer[0].group_m}"
        options = dataclasses.replace(cuda.schedule_of_group(number), timeout_s=2 * LAUNCH_LIMIT_S)
        yield name, _kernels_of(*layer), functools.partial(cuda.check_group, *layer, options)


@functools.cache
def _cuda_sites() -> dict[tuple[str, str], dict[str, list[deletions.Deletion]]]:
    """For each statement that waits, fences or synchronises: its instructions, by kernel."""
    sites: dict[tuple[str, str], dict[str, list[deletions.Deletion]]] = {}
    for variant in cuda.variants():
        if variant["dtype"] == "float16":  # test_fp16_kernels_follow_the_protocol_of_the_bf16_kernels compares them
            continue
        for deletion in deletions.find(ptx_of(variant["name"])):
            by_kernel = sites.setdefault((deletion.statement, deletion.what), {})
            by_kernel.setdefault(variant["name"], []).append(deletion)
    return dict(sorted(sites.items()))


# Deletions in csrc that nothing need find: (what, statement) and why.
REDUNDANT: dict[tuple[str, str], str] = {
    ("wgmma.wait_group 0", "if (first > 0) wgmma_wait<0>();"): (
        "frees registers, of which PTX has enough: without it ptxas serialises the products, which "
        "benchmarks.cuda_resources refuses; the planted bug shares the registers"
    ),
}


def cuda_deletions() -> list[Defect]:
    """A statement, in every kernel that has it."""
    every = list(cuda_checks())

    def defect(place, what, by_kernel):
        def ptx(name: str) -> str:
            return deletions.without(ptx_of(name), by_kernel[name]) if name in by_kernel else ptx_of(name)

        checks = tuple(
            (n, functools.partial(check, ptx=ptx)) for n, kernels, check in every if kernels & set(by_kernel)
        )
        statement = statement_of(place)
        return Defect(f"{what}: {statement}", place, checks, REDUNDANT.get((what, statement)))

    return [defect(place, what, by_kernel) for (place, what), by_kernel in _cuda_sites().items()]


def statement_of(place: str) -> str:
    """The source text of a place, or where that is a helper of one line, of its caller."""
    texts = [deletions.source_line(frame).split("//")[0].strip() for frame in place.split(" < ")]
    return texts[-1] if "__forceinline__" in texts[0] else texts[0]


GROUPS = {
    "Triton: planted": triton_planted,
    "Triton: deletions": triton_deletions,
    "CUDA: planted": cuda_planted,
    "CUDA: deletions": cuda_deletions,
    "Triton, compiled: deletions": triton_compiled,
}
