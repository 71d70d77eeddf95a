"""A rank and targets for a budget, from the losses that a study has measured."""

from fastlora.errors import CommandError
from fastlora.study.results import gap_text, loss_text, paired_difference
from fastlora.tables import Table

SHOWN = 6


def rank_by_loss(summary: list[dict], budget: int) -> list[dict]:
    """The configurations within the budget, the lowest mean held-out loss first.

    Only configurations with as many seeds as the best measured one count: the others are still being trained.

    Raises:
        CommandError: there is none.
    """
    if not summary:
        raise CommandError("no finished runs to suggest from: run fastlora study first")
    seeds = max(len(entry["losses"]) for entry in summary)
    measured = [entry for entry in summary if entry["mean"] is not None and len(entry["losses"]) == seeds]
    if not measured:
        raise CommandError("every run diverged: nothing to suggest; run a study with a lower --learning-rate")
    affordable = [entry for entry in measured if entry["parameters"] <= budget]
    if not affordable:
        cheapest = min(measured, key=lambda entry: entry["parameters"])
        raise CommandError(
            f"no run fits {budget:,} trainable parameters: the smallest, {cheapest['label']} at rank "
            f"{cheapest['rank']}, has {cheapest['parameters']:,}"
        )
    return sorted(affordable, key=lambda entry: (entry["mean"], entry["parameters"]))


def indistinguishable(ordered: list[dict]) -> list[dict]:
    """Cheaper configurations that the seeds cannot tell from the best: behind it by less than their spread."""
    best = ordered[0]
    found = []
    for entry in ordered[1:]:
        gap, spread = paired_difference(entry, best)
        if spread is not None and gap < spread and entry["parameters"] < best["parameters"]:
            found.append(entry)
    return sorted(found, key=lambda entry: entry["parameters"])


def suggestion_lines(ordered: list[dict], budget: int, source: str) -> list[str]:
    """What to tell the user.

    Args:
        ordered: as `rank_by_loss` returns them.
        source: which runs they are, in words.
    """
    best = ordered[0]
    lines = [_table(ordered, budget).to_markdown()]
    lines.append(
        f"For at most {budget:,} trainable parameters: --rank {best['rank']} --targets {','.join(best['targets'])} "
        f"({best['parameters']:,} parameters), held-out loss {loss_text(best)}"
    )
    for entry in indistinguishable(ordered)[:1]:
        lines.append(
            f"Not told apart from it by these seeds, and the cheapest such: --rank {entry['rank']} "
            f"--targets {','.join(entry['targets'])} ({entry['parameters']:,} parameters), "
            f"held-out loss {loss_text(entry)}, {gap_text(entry, best)} seed by seed"
        )
    lines.append(f"Measured in {source}")
    return lines


def _table(ordered: list[dict], budget: int) -> Table:
    rows = [
        [entry["label"], str(entry["rank"]), f"{entry['parameters']:,}", loss_text(entry), str(len(entry["losses"]))]
        for entry in ordered[:SHOWN]
    ]
    note = f"The best {len(rows)} of {len(ordered)} configurations within {budget:,} trainable parameters."
    columns = ["on", "r", "parameters", "held-out loss", "seeds"]
    return Table("Measured losses", note, columns, rows)
