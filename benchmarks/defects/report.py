"""The findings as Markdown: ``results/defects.md``."""

from collections import Counter
from itertools import groupby

from fastlora.tables import Table


def report(rows: list[dict]) -> str:
    """The results as Markdown."""
    lines = [
        "# Which check finds which defect",
        "",
        "`python -m benchmarks.defects`: the defects of `tests/support/defects.py` by the checks of `make test`. A",
        "launch is a layer of one size under one schedule. The search for a defect ends with the second launch that",
        "finds it; of the compiler's own instructions, of which there are hundreds, with the first.",
        "",
        "| defects | all | found | by two launches | redundant | missed |",
        "|---|---|---|---|---|---|",
    ]
    by_group = {group: list(each) for group, each in groupby(rows, key=lambda row: row["group"])}
    for group, each in by_group.items():
        found = sum(row["found"] is not None for row in each)
        redundant = sum(row["found"] is None and row["reason"] is not None for row in each)
        twice = sum(row["ways"] > 1 for row in each) if each[0]["wanted"] > 1 else ""
        lines.append(f"| {group} | {len(each)} | {found} | {twice} | {redundant} | {len(each) - found - redundant} |")
    lines += ["", "What found them:", ""]
    for group, each in by_group.items():
        counts = Counter(row["found"] for row in each if row["found"]).most_common()
        lines.append(f"- {group}: " + ", ".join(f"{check} {n}" for check, n in counts))
    for group, each in by_group.items():
        lines += ["", f"## {group}", ""]
        lines += _compiled(each) if "compiled" in group else _table(each)
    return "\n".join(lines) + "\n"


def readme_report(rows: list[dict]) -> dict:
    """With the command that made it, as the pages have it."""
    return {"rows": rows, "command": "python -m benchmarks.defects"}


def readme_table(report: dict) -> Table:
    """What was planted and deleted, by group, and apart what is of rows in segments."""
    groups: dict[str, list[dict]] = {}
    for row in report["rows"]:
        of_segments = row["place"].startswith("segment") and row["group"] != "CUDA: planted"
        groups.setdefault(row["group"] + (", rows in segments" if of_segments else ""), []).append(row)
    lines = []
    for group, rows in sorted(groups.items()):
        found = sum(row["found"] is not None for row in rows)
        redundant = sum(row["found"] is None and row["reason"] is not None for row in rows)
        kinds = Counter(row["found"] for row in rows if row["found"]).most_common(3)
        by = ", ".join(f"{name} {count}" for name, count in kinds)
        lines.append([group, *map(str, (len(rows), found, redundant, len(rows) - found - redundant)), by])
    note = "Bugs planted in the sources, and every wait, release, acquire, barrier and fence deleted in turn."
    columns = ["defects", "all", "found", "redundant", "missed", "mostly by"]
    return Table("Planted defects", note, columns, lines)


def _cell(text: str) -> str:
    return "`" + text.replace("|", "\\|").replace("`", "'") + "`"


def _table(rows: list[dict]) -> list[str]:
    lines = ["| defect | where | found by | in | and in |", "|---|---|---|---|---|"]
    for row in rows:
        found = row["found"] or ("nothing: " + row["reason"] if row["reason"] else "**nothing**")
        launches = row.get("by", ""), ", ".join(row.get("also", ()))
        lines.append(f"| {_cell(row['defect'])} | {row['place']} | {found} | {launches[0]} | {launches[1]} |")
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
