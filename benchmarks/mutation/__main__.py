"""The mutation score: ``python -m benchmarks.mutation [--seed N] [--triton N] [--cuda N] [--jobs N] [--resume]``.

Mutants of the Triton kernels and their launcher, and of csrc, made by rule (tests/support/python_mutations.py and
cpp_mutations.py), in a random order of the seed; as many from its front as are wanted, without those that the compiler
refuses. Each meets the checks of ``make test`` until one fails, or two where it changes the protocol. Writes
``mutation.json`` and ``mutation.md``. Fails where a mutant survives and no reason for that is on record, and where the
sources are not those that the rows before are of.
"""

import functools
import json
import sys
from pathlib import Path

import click

from benchmarks import RESULTS
from benchmarks.mutation.report import is_missed, report
from benchmarks.mutation.search import run
from fastlora import environment


def mutated_sources() -> str:
    """Changes with any source that mutants are made of."""
    return environment.source_digest(Path(__file__).resolve().parents[2], ("fastlora", "csrc"))


@click.command()
@click.option("--seed", default=1, show_default=True, help="Of the order.")
@click.option("--triton", default=200, show_default=True, type=click.IntRange(0), help="Mutants.")
@click.option("--cuda", default=100, show_default=True, type=click.IntRange(0), help="Mutants.")
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--resume", is_flag=True, help="Keep what an interrupted run of this seed has found.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Folder of mutation.json and .md.")
def main(seed: int, triton: int, cuda: int, jobs: int, resume: bool, output: Path) -> None:
    """Looks for every mutant, and writes what found it."""
    output.mkdir(parents=True, exist_ok=True)
    path = output / "mutation.json"
    old = json.loads(path.read_text()) if resume and path.exists() else {}
    sources, commit = mutated_sources(), environment.commit()
    if old and old.get("sources") != sources:
        raise click.UsageError(f"{path} is of other sources (commit {old.get('commit')}): leave --resume out")
    kept = old.get("rows", []) if old.get("seed") == seed else []
    wanted = {"triton": triton, "cuda": cuda}
    what = {"seed": seed, "wanted": wanted, "commit": commit, "sources": sources}
    by_language = {language: [row for row in kept if row["language"] == language] for language in wanted}

    def save(language: str, rows: list[dict]) -> None:
        if mutated_sources() != sources:
            raise click.ClickException("the sources have changed during the search, whose mutants are copies of them")
        by_language[language] = rows
        everything = [row for each in by_language.values() for row in each]
        path.write_text(json.dumps({**what, "rows": everything}, indent=1) + "\n")
        (output / "mutation.md").write_text(report(seed, wanted, everything, commit))

    for language, count in wanted.items():
        done = {row["mutant"]: row for row in by_language[language]}
        by_language[language] = run(language, seed, count, jobs, done, functools.partial(save, language))
    missed = [row for rows in by_language.values() for row in rows if is_missed(row)]
    for row in missed:
        click.echo(f"found by nothing: {row['mutant']}")
    sys.exit(bool(missed))


if __name__ == "__main__":
    main()
