"""pytest on a GPU that a test may hang or spoil: a test that hangs, or dies, costs itself and nothing else.

    python -m benchmarks.gpu.supervise --limit 15 -- tests/kernels/test_cuda_device.py -k small_layers

Tests run in a worker process. Where one takes longer than the limit, its stack is printed and the worker exits; where
one leaves the CUDA context unusable, likewise; a new worker runs the rest. The exit code is 0 where every test passed.
A skip is a failure unless --may-skip names its reason: with a GPU, nothing is to be skipped for want of one. Needs
pytest and none of its plugins.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from benchmarks.gpu.child import Child
from benchmarks.gpu.worker import COLLECTED, FINISHED, SPOILED, STARTED, run_tests

START_S = 60.0  # for a worker to import and collect, or to end
BACKSTOP_S = 5.0  # beyond the limit, for a worker whose own watchdog does not end it
MOST_STUCK = 2  # workers that cannot even be killed


@dataclass
class Journal:
    """What workers have written: one JSON list a line, the kind of the event first."""

    path: Path
    collected: list[str] = field(default_factory=list)
    running: str | None = None
    finished: dict[str, tuple[str, str]] = field(default_factory=dict)  # test -> outcome, detail
    spoiled: str | None = None  # why the worker's CUDA context can do no more
    _read: int = 0

    def update(self) -> bool:
        """Reads what is new. Whether there was anything."""
        with open(self.path) as file:
            file.seek(self._read)
            lines = file.readlines()
        whole = [line for line in lines if line.endswith("\n")]
        self._read += sum(len(line.encode()) for line in whole)
        for line in whole:
            kind, *values = json.loads(line)
            if kind == COLLECTED:
                self.collected = values[0]
            elif kind == STARTED:
                self.running = values[0]
            elif kind == FINISHED:
                self.running = None
                self.finished[values[0]] = (values[1], values[2])
            elif kind == SPOILED:
                self.spoiled = values[0]
        return bool(whole)


class Shard:
    """Every n-th test, in one worker after another."""

    def __init__(self, arguments: list[str], journal: Path, share: tuple[int, int], limit: float, may_skip: list[str]):
        self.arguments, self.share, self.limit, self.may_skip = arguments, share, limit, may_skip
        journal.touch()
        self.journal = Journal(journal)
        self.stuck, self.done, self.problem = 0, False, ""
        self._start()

    def _start(self) -> None:
        skip = set(self.journal.finished)
        self.journal.spoiled = None
        self._before = len(skip)
        self.worker = Child(
            lambda: run_tests(self.arguments, self.journal.path, self.share, skip, self.limit, self.may_skip),
            leads=False,
        )
        self._heard = time.monotonic()

    def poll(self) -> None:
        """Looks after the worker once."""
        if self.journal.update():
            self._heard = time.monotonic()
        silent = time.monotonic() - self._heard
        patience = self.limit + BACKSTOP_S if self.journal.running else START_S
        code = self.worker.poll()
        if code is None and silent < patience:
            return
        if code is None:
            self.stuck += not self.worker.stop(interrupt=False)
        self.journal.update()
        culprit = self.journal.running
        if culprit:
            self._lose(culprit, code, time.monotonic() - self._heard)
        elif code is None:
            self.problem = f"between tests the worker did nothing for {START_S:.0f} s"
        left = [test for test in self.journal.collected if test not in self.journal.finished]
        advanced = len(self.journal.finished) > self._before
        if left and advanced and self.stuck < MOST_STUCK:
            self._start()
            return
        if left and not self.problem:
            self.problem = f"the worker ended (exit code {code}) with {len(left)} tests to run"
        if not self.journal.collected and not self.problem and code not in (0, 5):
            self.problem = f"pytest ended with exit code {code} before a test ran"
        self.done = True

    def _lose(self, test: str, code: int | None, silent: float) -> None:
        if self.journal.spoiled:
            outcome, detail = "spoiled", self.journal.spoiled
        elif code is None or silent >= self.limit * 0.9:
            outcome, detail = "hung", f"no end after {self.limit:g} s"
        else:
            outcome, detail = "died", f"the process ended with {'signal' if code < 0 else 'exit code'} {abs(code)}"
        self.journal.finished[test] = (outcome, detail)
        self.journal.running = None
        click.echo(f"\n{test} {outcome.upper()}: {detail}; a new process runs the rest")


def report(shards: list[Shard]) -> bool:
    """Prints what did not pass, and the counts. Whether everything did."""
    finished = {test: found for shard in shards for test, found in shard.journal.finished.items()}
    problems = [shard.problem for shard in shards if shard.problem]
    counts: dict[str, int] = {}
    for test, (outcome, detail) in finished.items():
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome not in ("passed", "skipped"):
            click.echo(f"{outcome.upper()} {test}: {detail}")
    for problem in problems:
        click.echo(f"ERROR: {problem}")
    if not finished and not problems:
        problems = ["no test was found"]
        click.echo("ERROR: no test was found")
    click.echo(f"tests: {', '.join(f'{n} {outcome}' for outcome, n in sorted(counts.items())) or 'none'}")
    return not problems and not counts.keys() - {"passed", "skipped"}


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--limit", default=15.0, show_default=True, type=click.FloatRange(min=0.1), help="Seconds a test.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1))
@click.option("--may-skip", multiple=True, metavar="TEXT", help="Of the reasons of skips that are no failures.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def main(limit: float, workers: int, may_skip: tuple[str, ...], arguments: tuple[str, ...]) -> None:
    """Run pytest with ARGUMENTS; a hang loses one test."""
    with TemporaryDirectory() as folder:
        shards = [
            Shard(list(arguments), Path(folder, f"{i}.jsonl"), (i, workers), limit, list(may_skip))
            for i in range(workers)
        ]
        try:
            while not all(shard.done for shard in shards):
                for shard in shards:
                    if not shard.done:
                        shard.poll()
                time.sleep(0.02)
        except KeyboardInterrupt:
            for shard in shards:
                shard.worker.stop(interrupt=False)
                shard.journal.update()
                left = len(shard.journal.collected) - len(shard.journal.finished)
                shard.problem = shard.problem or f"interrupted with {left} tests to run"
        passed = report(shards)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
