"""Which check finds which defect: ``python -m benchmarks.defects [--jobs N] [--only TEXT] [--output DIR]``.

Planted bugs and single deletions of waits, fences and barriers (tests/support/defects.py) are run through the tests'
checks in the emulator, until two of their launches (a size under a schedule) have found it. Writes ``defects.json`` and
``defects.md``. Fails where fewer find a defect and no reason for that is on record, or where a reason is on record and
a test, or a launch beyond the tests', finds the defect.
"""

import functools
import json
import sys
from pathlib import Path

import click

from benchmarks import RESULTS
from benchmarks.defects.report import report
from benchmarks.defects.search import run_group, what_is_wrong


@click.command()
@click.option("--jobs", default=2, show_default=True, help="Processes.")
@click.option("--only", default="", help="Groups whose name contains this; the others' results are kept.")
@click.option("--resume", is_flag=True, help="Keep what an interrupted run has found.")
@click.option("--output", type=click.Path(path_type=Path), default=RESULTS, help="Folder of defects.json and .md.")
def main(jobs: int, only: str, resume: bool, output: Path) -> None:
    """Looks for every defect, and writes what found it."""
    from tests.support import defects

    output.mkdir(parents=True, exist_ok=True)
    path = output / "defects.json"
    old = json.loads(path.read_text()) if (only or resume) and path.exists() else []
    by_group = {group: [row for row in old if row["group"] == group] for group in defects.GROUPS}

    def save(group: str, rows: list[dict]) -> None:
        by_group[group] = rows
        everything = [row for each in by_group.values() for row in each]
        path.write_text(json.dumps(everything, indent=1) + "\n")
        (output / "defects.md").write_text(report(everything))

    done = {(row["group"], row["defect"], row["place"]): row for row in old} if resume else {}
    for group in defects.GROUPS:
        if only in group:
            save(group, run_group(group, jobs, done, functools.partial(save, group)))
    wrong = [(row, why) for rows in by_group.values() for row in rows if (why := what_is_wrong(row))]
    for row, why in wrong:
        click.echo(f"{why}: {row['group']}: {row['defect']} ({row['place']})")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
