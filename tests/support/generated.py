"""Mutants made by rule, and what looks for each: the mutation score (benchmarks.mutation).

The checks are those of ``make test``, the quickest first. In one process they run with a mutant's own kernels; what
survives them all meets the tests themselves, in a copy of the repository.
"""

import random
import re
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support import check_lists, defects, equivalents
from tests.support.defects import Finding
from tests.support.mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]
# What these rules change is the protocol (waits, flags, fences), whose finds should not hang on one launch.
_PROTOCOL_RULES = ("removed", "moved", "relaxed")
_TESTS_LIMIT_S = 3600
_TESTS_MOST_BYTES = 256 << 30  # of address space: some have operands that lie 4 GiB apart


@dataclass(frozen=True)
class Generated:
    """A mutation of a file, whose path is the repository's."""

    path: str
    mutation: Mutation

    @property
    def module(self) -> str:
        """The name without its ending, as mutants.load has it."""
        return Path(self.path).stem

    @property
    def name(self) -> str:
        """For example "tiles.py:41 comparison: < -> <= (character 2012)"."""
        line = self.mutation.line((ROOT / self.path).read_text())
        old, new = (" ".join(text.split()) for text in (self.mutation.old, self.mutation.new))
        return f"{Path(self.path).name}:{line} {self.mutation.rule}: {old} -> {new} (character {self.mutation.start})"

    @property
    def ways(self) -> int:
        """How many checks should find it."""
        return 2 if self.mutation.rule in _PROTOCOL_RULES else 1

    def apply(self, text: str) -> str:
        return self.mutation.apply(text)

    @property
    def mutated_lines(self) -> str:
        """The lines that are changed, as they are then, without comments and in one."""
        text = self.apply((ROOT / self.path).read_text())
        first = text.rfind("\n", 0, self.mutation.start) + 1
        last = text.find("\n", self.mutation.start + len(self.mutation.new))
        return " ".join(line.split("  #")[0].strip() for line in text[first:last].splitlines())


class Stillborn(Exception):
    """The compiler refuses the mutant."""


class FaultySearch(Exception):
    """A test fails without the mutation as well: it says nothing of the mutant."""


def why_equivalent(generated: Generated) -> str | None:
    """Why nothing need find a mutant, or None."""
    return equivalents.REASONS.get((Path(generated.path).name, generated.mutated_lines))


def in_order(seed: int, everything: Iterable[Generated]) -> list[Generated]:
    """A random order, of which as many are taken from the front as are wanted."""
    shuffled = list(everything)
    random.Random(seed).shuffle(shuffled)
    return shuffled


# The quick checks, which find most mutants, and all others of ``make test``.
Checks = tuple[list[check_lists.Check], list[check_lists.Check]]


def findings(checks: Iterable[check_lists.Check], ways: int, must_compile: bool) -> list[Finding]:
    """Of the first ``ways`` checks that fail, whatever they raise: a mutant may raise anything.

    Args:
        must_compile: a kernel that the compiler refuses is a finding.

    Raises:
        Stillborn: as a check does, unless that is a finding.
        FaultySearch: what failed does so without the mutation.
    """

    def failure(check: Callable[[], None]) -> tuple[str, str] | None:
        try:
            return defects.failure(check)
        except FaultySearch:
            raise
        except Exception as error:
            if isinstance(error, Stillborn) and not must_compile:
                raise
            return type(error).__name__, str(error)

    return defects.first_findings(checks, ways, failure)


def run_tests(generated: Generated, *runs: tuple[tuple[str, ...], tuple[str, ...]]) -> None:
    """Tests in a copy of the repository that has the mutation.

    Args:
        runs: (environment, what pytest is given) of each run of pytest.

    Raises:
        AssertionError: a test fails.
        FaultySearch: it fails without the mutation, too.
    """
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory, "copy")
        names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        for library in (ROOT / "fastlora").glob("_C*.so"):
            shutil.copy(library, copy / "fastlora")
        changed = copy / generated.path
        text = changed.read_text()
        changed.write_text(generated.apply(text))
        for environment, arguments in runs:
            failed = _failed_test(copy, environment, arguments)
            if failed is None:
                continue
            changed.write_text(text)
            test = re.match(r"(?:FAILED|ERROR) (.*?)(?: - .*)?$", failed)
            if _failed_test(copy, environment, (test.group(1),) if test else arguments) is not None:
                raise FaultySearch(failed)
            raise AssertionError(failed)


def _failed_test(copy: Path, environment: Iterable[str], arguments: Iterable[str]) -> str | None:
    """What pytest says of the first test that fails in a copy of the repository, or None."""
    command = ["env", *environment, f"PYTHONPATH={copy}", sys.executable, "-m", "pytest", "-x", "-q", *arguments]
    done = subprocess.run(
        command, cwd=copy, capture_output=True, text=True, timeout=_TESTS_LIMIT_S, preexec_fn=_with_more_addresses
    )
    lines = done.stdout.splitlines()
    named = (line for line in reversed(lines) if line.startswith(("FAILED", "ERROR")))
    return None if done.returncode == 0 else next(named, "\n".join(lines[-3:]))


def _with_more_addresses() -> None:
    """The search leaves its own processes fewer."""
    limit, hard = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        most = _TESTS_MOST_BYTES if hard == resource.RLIM_INFINITY else min(_TESTS_MOST_BYTES, hard)
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
