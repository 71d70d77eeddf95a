"""The mutation score as Markdown: ``results/mutation.md``."""

from collections import Counter


def report(seed: int, wanted: int, rows: list[dict]) -> str:
    """The results as Markdown."""
    living = [row for row in rows if not row["stillborn"]]
    found = [row for row in living if row["found"]]
    excused = [row for row in living if not row["found"] and row["reason"]]
    missed = [row for row in living if not row["found"] and not row["reason"]]
    lines = [
        "# Mutation score",
        "",
        f"`python -m benchmarks.mutation --seed {seed} --triton {wanted}`: mutants made by the rules of",
        "`tests/support/python_mutations.py`, by the checks of `make test`.",
        "",
        f"{len(living)} mutants: {len(found)} found, {len(excused)} that change nothing, {len(missed)} missed; besides",
        f"{len(rows) - len(living)} that the compiler refused. Found of those that change something:"
        f" {_score(len(found), len(living) - len(excused))}.",
        "",
        "| rule | mutants | found | change nothing | missed |",
        "|---|---|---|---|---|",
    ]
    for rule, count in sorted(Counter(row["rule"] for row in living).items()):
        of_rule = [sum(row["rule"] == rule for row in each) for each in (found, excused, missed)]
        lines.append(f"| {rule} | {count} | {of_rule[0]} | {of_rule[1]} | {of_rule[2]} |")
    lines += ["", "What found them:", ""]
    lines += [f"- {check}: {count}" for check, count in Counter(row["found"] for row in found).most_common()]
    lines += ["", "Where:", ""]
    lines += [f"- {by}: {count}" for by, count in Counter(row["by"] for row in found).most_common()]
    for title, some in (("Missed", missed), ("Change nothing", excused)):
        lines += ["", f"## {title}", ""] if some else []
        lines += [f"- `{row['mutant']}`{': ' + row['reason'] if row['reason'] else ''}" for row in some]
    return "\n".join(lines) + "\n"


def _score(found: int, all_: int) -> str:
    return f"{100 * found / all_:.1f} %" if all_ else "none yet"
