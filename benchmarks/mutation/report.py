"""The mutation score as Markdown: ``results/mutation.md``."""

from collections import Counter

from fastlora.tables import Table


def is_missed(row: dict) -> bool:
    """Nothing found it, and no reason for that is on record."""
    return not (row["stillborn"] or row["found"] or row["reason"])


def is_luck(row: dict) -> bool:
    """Fewer launches found it than should: the next change of a schedule may lose it."""
    return 0 < len(row["by"]) < row["wanted"]


def report(seed: int, wanted: dict[str, int], rows: list[dict], commit: str | None) -> str:
    """The results as Markdown."""
    counts = " ".join(f"--{language} {count}" for language, count in wanted.items())
    lines = [
        "# Mutation score",
        "",
        f"`python -m benchmarks.mutation --seed {seed} {counts}`: mutants made by the rules of",
        "`tests/support/python_mutations.py` and `cpp_mutations.py`, by the checks of `make test`. Those that the",
        "compiler refused do not count; others change nothing, for a reason that is given. What changes the protocol",
        "(removed, moved, relaxed) is looked for until a second launch, of another size or schedule, has found it.",
        f"Commit {commit}.",
        "",
        "| | wanted | mutants | found | change nothing | missed | refused | found of those that change something |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for language, count in wanted.items():
        some = [row for row in rows if row["language"] == language]
        lines.append(f"| {language} | {count} | {_cells(some)} |")
    lines += [
        "",
        "| rule | mutants | found | change nothing | missed | refused | share |",
        "|---|---|---|---|---|---|---|",
    ]
    for rule in sorted({row["rule"] for row in rows}):
        lines.append(f"| {rule} | {_cells([row for row in rows if row['rule'] == rule])} |")
    found = [row for row in rows if row["found"]]
    for title, names in (
        ("What found them", Counter(row["found"] for row in found)),
        ("By which check", Counter(row["by"][0] for row in found)),
    ):
        lines += ["", f"{title}:", "", *(f"- {name}: {count}" for name, count in names.most_common())]
    missed = [row for row in rows if is_missed(row)]
    lines += ["", "## Missed", "", *(f"- `{row['mutant']}`" for row in missed)] if missed else []
    lucky = [row for row in rows if not row["stillborn"] and is_luck(row)]
    if lucky:
        lines += ["", "## Found by one launch alone", "", *(f"- `{row['mutant']}`: {row['by'][0]}" for row in lucky)]
    excused = [row for row in rows if row["reason"] and not row["found"]]
    if excused:
        lines += ["", "## Change nothing", "", *(f"- `{row['mutant']}`: {row['reason']}" for row in excused)]
    return "\n".join(lines) + "\n"


def readme_report(report: dict) -> dict:
    """With the command that made it, as the pages have it."""
    counts = " ".join(f"--{language} {count}" for language, count in report["wanted"].items())
    return {**report, "command": f"python -m benchmarks.mutation --seed {report['seed']} {counts}"}


def readme_table(report: dict) -> Table:
    """The score by part of the sources."""
    columns = ["of", "mutants", "found", "change nothing", "missed", "refused by the compiler", "share"]
    parts = dict.fromkeys(map(_part, report["rows"]))
    lines = [[part, *_cells([r for r in report["rows"] if _part(r) == part]).split(" | ")] for part in sorted(parts)]
    lines.append(["all", *_cells(report["rows"]).split(" | ")])
    note = "Mutants made by rule, by the checks of `make test`; the share is of those that change something."
    return Table("Mutation score", note, columns, lines)


def _part(row: dict) -> str:
    """Which kernels a mutant's file is of."""
    if row["language"] == "cuda":
        return "CUDA"
    family = row["mutant"].partition("_")[0].partition(".")[0]
    names = {"segment": "rows in segments", "segments": "rows in segments", "packed": "packed weights"}
    return f"Triton, {names.get(family, 'packed weights' if family == 'quantised' else 'all kernels')}"


def _cells(rows: list[dict]) -> str:
    living = [row for row in rows if not row["stillborn"]]
    found = sum(row["found"] is not None for row in living)
    missed = sum(map(is_missed, living))
    share = f"{100 * found / (found + missed):.1f} %" if found + missed else ""
    return f"{len(living)} | {found} | {len(living) - found - missed} | {missed} | {len(rows) - len(living)} | {share}"
