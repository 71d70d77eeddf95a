"""Mutants made by rule, and what looks for each: the mutation score (benchmarks.mutation).

The checks are those of ``make test``, the quickest first. In one process they run with a mutant's own copy of the
kernels; what survives them all meets the tests themselves, in a copy of the repository.
"""

import contextlib
import dataclasses
import functools
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import triton

from tests.support import mutants, python_mutations
from tests.support import triton_checks as checks
from tests.support.defects import Finding, failure
from tests.support.python_mutations import Mutation

ROOT = Path(__file__).resolve().parents[2]
_LIMIT_S = 40.0  # of a processor, for a launch
_TEST_LIMIT_S = 3600


@dataclass(frozen=True)
class Generated:
    """A mutation of a module of the Triton kernels or of their launcher; takes the place of a mutants.Mutant."""

    module: str
    mutation: Mutation

    @property
    def name(self) -> str:
        """For example "tiles.py:41 comparison: < -> <= (character 2012)"."""
        line = self.mutation.line(mutants.source(self.module))
        old, new = (" ".join(text.split()) for text in (self.mutation.old, self.mutation.new))
        return f"{self.module}.py:{line} {self.mutation.rule}: {old} -> {new} (character {self.mutation.start})"

    def apply(self, text: str) -> str:
        return self.mutation.apply(text)


class Stillborn(Exception):
    """The compiler refuses the mutant."""


def of_triton() -> list[Generated]:
    """Every mutation of the Triton kernels and of their launcher."""
    return [
        Generated(module, mutation)
        for module in mutants.MODULES
        for mutation in python_mutations.find(mutants.source(module))
    ]


def in_order(seed: int, everything: list) -> list:
    """A random order, of which as many are taken from the front as are wanted."""
    shuffled = list(everything)
    random.Random(seed).shuffle(shuffled)
    return shuffled


# Survivors that are the same function, or as right as the original: (file, rule, old, new) and why.
EQUIVALENT: dict[tuple[str, str, str, str], str] = {}


def look_for(generated: Generated) -> Finding | None:
    """What finds a mutant.

    Raises:
        Stillborn: the compiler refuses it.
    """
    kernels = functools.cache(lambda: mutants.load(generated))
    path = f"fastlora/backends/triton/{generated.module}.py"
    quick = ((name, functools.partial(_on, kernels, check)) for name, check in _triton_checks())
    for by, check in (*quick, ("tests", functools.partial(_tests, path, generated.mutation))):
        try:
            found = failure(check)
        except Stillborn:
            raise
        except Exception as error:  # a mutant of the launcher may raise anything
            found = type(error).__name__, str(error)
        if found:
            return Finding(*found, by)
    return None


def _on(kernels: Callable, check: Callable) -> None:
    try:
        with _quiet():
            check(kernels=kernels())
    except (triton.CompilationError, triton.runtime.errors.PTXASError) as error:
        raise Stillborn(str(error).splitlines()[0]) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Triton prints the whole kernel where the compiler fails."""
    with open("/dev/null", "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        yield


@functools.cache
def _triton_checks() -> tuple[tuple[str, Callable], ...]:
    limited = tuple(dataclasses.replace(options, timeout_s=_LIMIT_S) for options in checks.SCHEDULES)

    def integers(sizes, arch):
        return f"sm_{arch} integers {sizes}", functools.partial(checks.check_integers, sizes, arch, schedules=limited)

    def dropped(sizes, arch, dtype=torch.bfloat16):
        check = functools.partial(checks.check_dropout, sizes, dtype, arch, schedules=limited[2:4])
        return f"sm_{arch} dropout {sizes} {dtype}", check

    first = [
        integers((264, 136, 200, 8), 80), dropped((139, 136, 200, 40), 80), integers(checks.FUSED_SIZES[0], 90),
        integers(checks.SEPARATE_SIZES[0], 80), dropped(checks.MASKED_SIZES[0], 90),
        ("sm_80 float16 range", functools.partial(checks.check_float16_range, 3000.3, 0.3, 80)),
        ("sm_90 infinities", functools.partial(checks.check_infinities, 90)),
    ]  # fmt: skip
    dtypes = (torch.bfloat16, torch.float16)
    rest = [
        each
        for arch in checks.ARCHITECTURES
        for each in (
            *(integers(sizes, arch) for sizes in checks.INTEGER_SIZES),
            *(dropped(sizes, arch, dtype) for sizes in checks.DROPPED_SIZES for dtype in dtypes),
        )
    ]
    known = {name for name, _ in first}
    shipped = [(each.id, functools.partial(checks.check_shipped, *each.values)) for each in checks.shipped()]
    return (*first, *(each for each in rest if each[0] not in known), *reversed(shipped))


def _tests(path: str, mutation: Mutation) -> None:
    """The tests of ``make test`` that concern the Triton backend, in a copy of the repository with the mutation."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "copy")
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        for library in (ROOT / "fastlora").glob("_C*.so"):
            shutil.copy(library, copy / "fastlora")
        (copy / path).write_text(mutation.apply((copy / path).read_text()))
        for environment, arguments in _TRITON_TESTS:
            command = [
                "env",
                *environment,
                f"PYTHONPATH={copy}",
                sys.executable,
                "-m",
                "pytest",
                "-x",
                "-q",
                *arguments,
            ]
            done = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=_TEST_LIMIT_S)
            assert done.returncode == 0, next(
                (line for line in done.stdout.splitlines()[::-1] if line.startswith(("FAILED", "ERROR"))), done.stdout
            )


_TRITON_TESTS = (
    ((), ("tests/kernels/test_queue.py", "tests/kernels/test_triton_launch.py", "tests/kernels/test_configs.py")),
    (("TRITON_INTERPRET=1",), ("tests/values",)),
    ((), ("tests/kernels/test_triton_ptx.py", "tests/kernels/test_triton_compile.py", "tests/kernels/test_warming.py",
          "tests/kernels/test_traffic.py", "tests/kernels/test_triton_driver.py")),
)  # fmt: skip
