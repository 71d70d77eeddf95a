"""Every defect that the tests of the protocol are known to find, and what finds each.

A defect is a planted bug, or one wait, fence or barrier less. Each is looked for by the checks of ``make test`` alone,
at their own shapes and schedules, until one of them fails.
"""

import dataclasses
import functools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch

from fastlora.backends import workspace
from tests.emulator import EmulatorError, LaunchOptions, TrapError
from tests.support import cuda_bugs, cuda_checks, deletions, mutants, segment_checks
from tests.support import triton_checks as triton
from tests.support.cuda_emulation import ptx_of, variants_for
from tests.support.numerics import poison


@dataclass(frozen=True)
class Finding:
    """check: the emulator's error, or "values", or "workspace"."""

    check: str
    message: str
    by: str


@dataclass(frozen=True)
class Defect:
    """place: the statement or instruction concerned. checks: what looks for it, by name, the most telling first.
    redundant: why nothing need find it. further: launches beyond the tests', which must not find it either then."""

    name: str
    place: str
    checks: tuple[tuple[str, Callable[[], None]], ...]
    redundant: str | None = None
    further: tuple[tuple[str, Callable[[], None]], ...] = ()

    def find(self) -> Finding | None:
        return _first(self.checks)

    def find_further(self) -> Finding | None:
        return _first(self.further)


def _first(checks: Iterable[tuple[str, Callable[[], None]]]) -> Finding | None:
    for by, check in checks:
        if found := failure(check):
            return Finding(*found, by)
    return None


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


def _integers(sizes, arch: int, schedules=triton.SCHEDULES):
    return functools.partial(triton.check_integers, sizes, arch, schedules=_limited(schedules))


def _dropped(sizes, arch: int, schedules=triton.SCHEDULES[2:4], dtype=torch.bfloat16):
    return functools.partial(triton.check_dropout, sizes, dtype, arch, schedules=_limited(schedules))


def _limited(schedules):
    """A kernel that hangs is given up soon."""
    return tuple(dataclasses.replace(options, timeout_s=60.0) for options in schedules)


def _with_mutant(mutant: mutants.Mutant, place: str, checks: Iterable[tuple[str, Callable]]) -> Defect:
    kernels = functools.cache(lambda: mutants.load(mutant))
    return Defect(mutant.name, place, tuple((name, lambda c=check: c(kernels=kernels())) for name, check in checks))


def triton_planted() -> list[Defect]:
    """Under every schedule."""
    checks = {
        "integers": ("sm_80 integers", _integers((136, 72, 80, 8), 80)),
        "dropout": ("sm_80 dropout", _dropped((75, 48, 64, 8), 80, triton.SCHEDULES)),
        "float16": ("sm_80 float16 range", functools.partial(triton.check_float16_range, -100.7, 0.0, 80)),
        "infinities": ("sm_90 infinities", functools.partial(triton.check_infinities, 90)),
        "segments": ("sm_80 segments", functools.partial(segment_checks.check_layout, "ragged", 80)),
        "segments, dropout": ("sm_80 segments, dropout", functools.partial(segment_checks.check_way, "dropout", 80)),
        "bad ends": ("sm_80 bad ends", functools.partial(segment_checks.check_bad_ends, 80)),
    }
    return [_with_mutant(mutant, f"{mutant.module}.py", [checks[mutant.shows]]) for mutant in mutants.MUTANTS]


def triton_deletions() -> list[Defect]:
    """In the sources, so in every kernel that is compiled from them."""
    checks = [
        each
        for arch in triton.ARCHITECTURES
        for each in (
            *((f"sm_{arch} integers {sizes}", _integers(sizes, arch)) for sizes in triton.INTEGER_SIZES),
            *((f"sm_{arch} dropout {sizes}", _dropped(sizes, arch, dtype=dtype)) for sizes, dtype in triton.DROPPED),
        )
    ]
    checks += [
        (f"sm_{arch} segments, {name}", functools.partial(check, name, arch))
        for arch in triton.ARCHITECTURES
        for check, names in (
            (segment_checks.check_layout, ("ragged",)),
            (segment_checks.check_way, segment_checks.WAYS),
        )
        for name in names
    ]
    # The smallest tiles first: they are the quickest.
    checks += [
        (each.id, functools.partial(triton.check_shipped, *each.values)) for each in reversed([*triton.shipped()])
    ]
    return [_with_mutant(mutant, f"{mutant.module}.py", checks) for mutant in deletions.in_triton()]


def triton_compiled() -> list[Defect]:
    """In the PTX, instruction by instruction: mostly the compiler's."""
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
    return [
        Defect(name, "csrc", (("planted", functools.partial(cuda_bugs.check_seeded, name)),))
        for name in cuda_bugs.SEEDED_BUGS
    ]


def _kernels_of(tile, dropout: bool, rank: int) -> set[str]:
    """Names of the forward and the backward kernel."""
    return {variant["name"] for variant in variants_for(tile, dropout, rank)}


def _cuda_checks():
    """(name, kernels that run, check). Rank 40, whose kernels hold most statements, goes first, and small tiles do."""

    def order(layer):
        tile, _, rank = layer
        return rank != 40, tile.block_m * tile.block_n

    for tile, dropout, rank in sorted(cuda_checks.EVERY_KERNEL, key=order):
        name = f"integers {cuda_checks.describe(tile)} R={rank} {cuda_checks.describe(dropout)}"
        options = _limited([cuda_checks.schedule_of(tile, dropout, rank)])[0]
        check = functools.partial(cuda_checks.check_integers, tile, dropout, rank, options)
        yield name, _kernels_of(tile, dropout, rank), check
    for needs in cuda_checks.SUBSETS:
        name = "gradients " + "+".join(n for n, wanted in needs._asdict().items() if wanted)
        yield name, _kernels_of(cuda_checks.LARGE, False, 16), functools.partial(cuda_checks.check_needs, needs)
    for tile, sizes in reversed(cuda_checks.LAYERS):
        for dropout_p in (0.0, 0.3):
            name = f"schedules {cuda_checks.describe(tile)} {sizes} p={dropout_p}"
            schedules = _limited(cuda_checks.SCHEDULES)
            check = functools.partial(cuda_checks.check_schedules, tile, sizes, dropout_p, schedules=schedules)
            yield name, _kernels_of(tile, dropout_p > 0, sizes[3]), check


@functools.cache
def _cuda_sites() -> dict[tuple[str, str], dict[str, list[deletions.Deletion]]]:
    """For each statement that waits, fences or synchronises: its instructions, by kernel."""
    sites: dict[tuple[str, str], dict[str, list[deletions.Deletion]]] = {}
    for variant in cuda_checks.variants():
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
    every = list(_cuda_checks())

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
