"""The mutation score: ``python -m benchmarks.mutation [--seed N] [--triton N] [--jobs N] [--resume] [--output DIR]``.

Mutants of the Triton kernels and their launcher, made by rule (tests/support/python_mutations.py), in a random order
of the seed; as many from its front as are wanted, without those that the compiler refuses. Each meets the checks of
``make test`` until one fails. Writes ``mutation.json`` and ``mutation.md``. Fails where a mutant survives and no reason
for that is on record.
"""

import json
import sys
from pathlib import Path

import click

from benchmarks import RESULTS
from benchmarks.mutation.report import report
from benchmarks.mutation.search import run


@click.command()
@click.option("--seed", default=1, show_default=True, help="Of the order.")
@click.option("--triton", "count", default=200, show_default=True, type=click.IntRange(1), help="Triton mutants.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--resume", is_flag=True, help="Keep what an interrupted run of this seed has found.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Folder of mutation.json and .md.")
def main(seed: int, count: int, jobs: int, resume: bool, output: Path) -> None:
    """Looks for every mutant, and writes what found it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "mutation.json"
    old = json.loads(path.read_text()) if resume and path.exists() else {}
    done = {row["mutant"]: row for row in old.get("rows", [])} if old.get("seed") == seed else {}

    def save(rows: list[dict]) -> None:
        path.write_text(json.dumps({"seed": seed, "wanted": count, "rows": rows}, indent=1) + "\n")
        (output / "mutation.md").write_text(report(seed, count, rows))

    rows = run(seed, count, jobs, done, save)
    survivors = [row for row in rows if row["found"] is None and not row["stillborn"] and row["reason"] is None]
    for row in survivors:
        click.echo(f"found by nothing: {row['mutant']}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
