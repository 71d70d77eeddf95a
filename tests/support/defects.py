"""Every defect that the tests of the protocol are known to find, and what finds each.

A defect is a planted bug, or one wait, fence or barrier less. Each is looked for by the checks of ``make test`` alone
(support/check_lists.py), at their own shapes and schedules.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch

from fastlora.backends import workspace
from tests.emulator import EmulatorError, LaunchOptions, TrapError
from tests.support import check_lists, cuda_bugs, deletions, mutants
from tests.support import cuda_checks as cuda
from tests.support import triton_checks as triton
from tests.support.cuda_emulation import ptx_of
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
    return functools.partial(triton.check_integers, sizes, arch, schedules=check_lists.limited(schedules))


def _dropped(sizes, arch: int, schedules=triton.DROPPED_SCHEDULES, dtype=torch.bfloat16):
    return functools.partial(triton.check_dropout, sizes, dtype, arch, schedules=check_lists.limited(schedules))


def _with_mutant(mutant: mutants.Mutant, place: str, checks: Iterable[check_lists.Check]) -> Defect:
    kernels = functools.cache(lambda: mutants.load(mutant))
    return Defect(mutant.name, place, tuple((name, lambda c=check: c(kernels=kernels())) for name, check in checks))


def triton_planted() -> list[Defect]:
    """By the checks of what each changes."""
    checks = {
        name: [check for arch in triton.ARCHITECTURES for check in checks_of(arch)]
        for name, checks_of in (
            ("integers", check_lists.triton_integers),
            ("dropout", check_lists.triton_dropped),
            ("float16", check_lists.triton_float16),
            ("infinities", check_lists.triton_infinities),
            ("segments", check_lists.triton_segments),
            ("segments, dropout", check_lists.triton_segments_dropped),
            ("bad ends", check_lists.triton_bad_ends),
            ("projections", check_lists.triton_projections),
            ("projections, dropout", check_lists.triton_projections_dropped),
        )
    }
    checks["packed values"] = [*check_lists.triton_packed_formats()]
    checks["scaled"] = [*check_lists.triton_scaled()]
    checks["quantised"] = [*check_lists.triton_packed_integers()]
    return [_with_mutant(mutant, f"{mutant.module}.py", checks[mutant.shows]) for mutant in mutants.MUTANTS]


def triton_deletions() -> list[Defect]:
    """In the sources, so in every kernel that is compiled from them."""
    return [
        _with_mutant(each, f"{each.module}.py", check_lists.triton_checks(each.module))
        for each in deletions.in_triton()
    ]


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
    every = list(check_lists.cuda_checks())

    def defect(name: str) -> Defect:
        broken, edit = cuda_bugs.SEEDED_BUGS[name]

        def ptx(kernel: str) -> str:
            return edit(ptx_of(kernel)) if kernel == broken.kernel else ptx_of(kernel)

        checks = [(by, functools.partial(check, ptx=ptx)) for by, kernels, check in every if broken.kernel in kernels]
        # The mask's single bits are seen by few.
        checks.sort(key=lambda each: broken.masks and not each[0].startswith("mask"))
        return Defect(name, broken.kernel, tuple(checks))

    return [defect(name) for name in cuda_bugs.SEEDED_BUGS]


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
    ("wait for an mbarrier", "wait_slot(i + 1);"): (
        "keeps a CTA from claiming a tile that another may take sooner; the next turn waits for the slot all the same"
    ),
}


def cuda_deletions() -> list[Defect]:
    """A statement, in every kernel that has it."""
    every = list(check_lists.cuda_checks())

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
