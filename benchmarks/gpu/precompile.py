"""Compiles the Triton kernels of some tests and of the mark, many at a time, into Triton's cache.

    python -m benchmarks.gpu.precompile --workers 16 -- tests/values -k test_values

The tests run as they will, in as many processes, except that launches are dropped: they fail, and nobody is told.
"""

import json
import os
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.gpu.child import Child
from benchmarks.gpu.worker import FINISHED, run_tests

_for_good = ExitStack()


def _drop_launches() -> None:
    """From here on this process compiles for the GPU at hand and launches nothing."""
    import torch

    from tests.support.compile_target import compile_for

    major, minor = torch.cuda.get_device_capability()
    _for_good.enter_context(compile_for(10 * major + minor))


def _compile_tests(arguments: list[str], journal: Path, share: tuple[int, int]) -> None:
    _drop_launches()
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
    run_tests(arguments, journal, share, set(), 60.0, [])


def _compile_mark(index: int) -> None:
    import torch

    from benchmarks.mark import DIRECTIONS, launch_of, variants
    from fastlora.bench.cases import GPU_HEADLINE
    from fastlora.bench.layer import random_tensors

    _drop_launches()
    case, direction = [(case, direction) for case in GPU_HEADLINE for direction in DIRECTIONS][index]
    tensors = random_tensors(case, "cuda", torch.Generator("cuda").manual_seed(0))
    launch_of(direction, *variants("triton")["triton"])(tensors)


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--workers", default=8, show_default=True, type=click.IntRange(1))
@click.option("--mark/--no-mark", default=True, show_default=True, help="The mark's kernels as well.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(workers: int, mark: bool, arguments: tuple[str, ...]) -> None:
    """Compile the Triton kernels of the tests that ARGUMENTS name to pytest."""
    with TemporaryDirectory() as folder:
        journals = [Path(folder, f"{i}.jsonl") for i in range(workers)]
        children = [Child(lambda i=i: _compile_mark(i), leads=False) for i in range(4 if mark else 0)]
        marks = len(children)
        for i, journal in enumerate(journals):
            journal.touch()
            children.append(
                Child(lambda i=i, to=journal: _compile_tests(list(arguments), to, (i, workers)), leads=False)
            )
        try:
            while any([child.poll() is None for child in children]):
                time.sleep(0.05)
        finally:
            for child in children:
                child.stop(interrupt=False)
        lines = [json.loads(line) for journal in journals for line in journal.read_text().splitlines()]
    failed = sum(child.code != 0 for child in children[:marks])
    tests = sum(line[0] == FINISHED for line in lines)
    click.echo(f"compiled: kernels of {tests} tests, {marks - failed} of the mark's {marks}")
    sys.exit(1 if failed or not lines else 0)


if __name__ == "__main__":
    main()
