"""Which check finds which defect: ``python -m benchmarks.defects [--jobs N] [--only TEXT] [--output DIR]``.

Planted bugs and single deletions of waits, fences and barriers (tests/support/defects.py) are run through the
tests' checks in the emulator. Writes ``defects.json`` and ``defects.md``, and fails where a defect is found by nothing
and no reason for that is on record, or where one is on record and the defect is found, by a test or by launches beyond
the tests'.
"""

import functools
import json
import multiprocessing
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import click
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results"


def _defects(group: str) -> list:
    """Made anew in each process: the checks are closures."""
    from tests.support import defects

    if group not in _defects.made:
        _defects.made[group] = defects.GROUPS[group]()
    return _defects.made[group]


_defects.made = {}


def _find(item: tuple[str, int]) -> tuple[int, dict]:
    group, number = item
    defect = _defects(group)[number]
    start = time.monotonic()
    finding = defect.find()
    row = {"group": group, "defect": defect.name, "place": defect.place, "reason": defect.redundant}
    row["seconds"] = round(time.monotonic() - start, 1)
    if finding:
        row |= {"found": finding.check, "by": finding.by, "message": finding.message.split("\n")[0][:300]}
    else:
        row |= {"found": None, "checks": len(defect.checks), "further": len(defect.further)}
        if missed := defect.find_further():
            row |= {"reason": None, "missed": missed.check, "by": missed.by, "message": missed.message[:300]}
    return number, row


def report(rows: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        "# Which check finds which defect",
        "",
        "`python -m benchmarks.defects`: the defects of `tests/support/defects.py` by the checks of `make test`.",
        "",
        "| defects | all | found | redundant | missed |",
        "|---|---|---|---|---|",
    ]
    by_group = {group: list(each) for group, each in groupby(rows, key=lambda row: row["group"])}
    for group, each in by_group.items():
        found = sum(row["found"] is not None for row in each)
        redundant = sum(row["found"] is None and row["reason"] is not None for row in each)
        lines.append(f"| {group} | {len(each)} | {found} | {redundant} | {len(each) - found - redundant} |")
    lines += ["", "What found them:", ""]
    for group, each in by_group.items():
        counts = Counter(row["found"] for row in each if row["found"]).most_common()
        lines.append(f"- {group}: " + ", ".join(f"{check} {n}" for check, n in counts))
    for group, each in by_group.items():
        lines += ["", f"## {group}", ""]
        lines += _compiled(each) if "compiled" in group else _table(each)
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def _table(rows: list[dict]) -> list[str]:
    lines = ["| defect | where | found by | in |", "|---|---|---|---|"]
    for row in rows:
        found = row["found"] or ("nothing: " + row["reason"] if row["reason"] else "**nothing**")
        lines.append(f"| {_cell(row['defect'])} | {row['place']} | {found} | {row.get('by', '')} |")
    return lines


_REDUNDANT = """\
Single instructions out of the PTX that Triton makes of bf16 layers in multiples of 16. What the sources ask for is
found (their barrier in `gradient_tile` in other kernels than these, see "Triton: deletions"). Of what the compiler
adds, some is redundant: it runs, and without it no test fails, nor any of further launches at random sizes and
under random schedules. The race detector compares every access with all those before it, so what such an
instruction orders others order as well. Most are barriers in a row, one before each step that a single thread takes
(a TMA copy, an mbarrier's initialisation or its end); the rest are a wgmma.fence for registers that nothing has
touched since the last wgmma, a wait for groups that have been waited for, or the end of a group that is waited for
together with the next."""


def _compiled(rows: list[dict]) -> list[str]:
    """By kernel and kind of instruction: hundreds, most of them the compiler's."""
    lines = [_REDUNDANT, "", "| kernel | deleted | all | found | redundant | found by |", "|---|---|---|---|---|---|"]

    def key(row):
        kernel, _, rest = row["defect"].partition(": ")
        return kernel, rest.partition(", PTX line")[0]

    for (kernel, what), each in groupby(sorted(rows, key=key), key=key):
        each = list(each)
        counts = Counter(row["found"] or "**nothing**" for row in each if row["found"] or not row["reason"])
        found = sum(row["found"] is not None for row in each)
        redundant = sum(row["found"] is None and row["reason"] is not None for row in each)
        names = ", ".join(f"{check} {n}" for check, n in counts.most_common())
        lines.append(f"| {kernel} | `{what}` | {len(each)} | {found} | {redundant} | {names} |")
    return lines


def _run(group: str, jobs: int, done: dict, save) -> list[dict]:
    """The rows of one group; those in ``done`` stay as they are. ``save`` gets what there is after every defect."""
    defects = _defects(group)
    rows = [done.get((group, defect.name, defect.place)) for defect in defects]
    items = [(group, number) for number, row in enumerate(rows) if row is None]
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(items)) or 1) as pool:
        for number, row in tqdm(pool.imap_unordered(_find, items), total=len(items), desc=group):
            rows[number] = row
            save([row for row in rows if row])
    return rows


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
            save(group, _run(group, jobs, done, functools.partial(save, group)))
    wrong = [row for rows in by_group.values() for row in rows if _is_wrong(row)]
    for row in wrong:
        found = f"found by {row['found']}, though" if row["found"] else "found by nothing, and not"
        click.echo(f"{found} on record as redundant: {row['group']}: {row['defect']} ({row['place']})")
    sys.exit(bool(wrong))


def _is_wrong(row: dict) -> bool:
    """Missed, or recorded as redundant although it is not. Of the compiler's instructions the reason is the same for
    all, the needed ones included."""
    if row["found"] is None:
        return row["reason"] is None
    return row["reason"] is not None and "compiled" not in row["group"]


if __name__ == "__main__":
    main()
