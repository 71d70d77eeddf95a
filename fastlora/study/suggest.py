"""A rank and targets for a budget, from the losses that a study has measured."""

import shlex

from fastlora.errors import CommandError
from fastlora.study.results import gap_text, loss_text, paired_difference
from fastlora.tables import Table

SHOWN = 6
_SAME = ("alpha", "learning_rate", "steps", "batch_size", "block_size", "held_out", "dtype")  # in both commands


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
    """Configurations that the seeds cannot tell from the best, behind it by less than their spread; the cheapest first.
    With one seed there is no spread: none is told apart, and none is named."""
    best = ordered[0]
    found = []
    for entry in ordered[1:]:
        gap, spread = paired_difference(entry, best)
        if spread is not None and gap < spread:
            found.append(entry)
    return sorted(found, key=lambda entry: entry["parameters"])


def suggestion_lines(ordered: list[dict], budget: int, source: str, settings: dict) -> list[str]:
    """What to tell the user.

    Args:
        ordered: as `rank_by_loss` returns them.
        source: which runs they are, in words.
        settings: the study's, of which a run of fine-tuning is made.
    """
    best = ordered[0]
    lines = [_table(ordered, budget).to_markdown()]
    lines.append(
        f"For at most {budget:,} trainable parameters: --rank {best['rank']} --targets {','.join(best['targets'])} "
        f"({best['parameters']:,} parameters), held-out loss {loss_text(best)}"
    )
    lines += _doubts(ordered)
    lines.append(f"To train it: {finetune_command(best, settings)}")
    lines.append(f"Measured in {source}")
    return lines


def _doubts(ordered: list[dict]) -> list[str]:
    """What the seeds do not say."""
    best = ordered[0]
    if len(best["losses"]) == 1:
        return [
            "By one seed alone: how much another would change is not known, so the order may be chance. "
            "Add --seeds 3 to the study before you rely on it."
        ]
    same = indistinguishable(ordered)
    if not same:
        return []
    cheapest, count = same[0], f"{len(same)} of the {len(ordered) - 1} others"
    than = "the cheapest of them" if cheapest["parameters"] < best["parameters"] else "none of them cheaper; the first"
    return [
        f"Within the spread of the seeds, not told apart from it: {count}; {than}: --rank {cheapest['rank']} "
        f"--targets {','.join(cheapest['targets'])} ({cheapest['parameters']:,} parameters), "
        f"held-out loss {loss_text(cheapest)}, {gap_text(cheapest, best)} seed by seed"
    ]


def finetune_command(entry: dict, settings: dict) -> str:
    """The ``fastlora finetune`` that trains a configuration as the study did."""
    chosen = {"--model": settings["model"], "--rank": entry["rank"], "--targets": ",".join(entry["targets"])}
    chosen |= {f"--{name.replace('_', '-')}": settings[name] for name in _SAME}
    words = ["fastlora", "finetune", *(word for path in settings["text"] for word in ("--text", path))]
    words += [word for name, value in chosen.items() if value is not None for word in (name, str(value))]
    return shlex.join(words)


def _table(ordered: list[dict], budget: int) -> Table:
    rows = [
        [entry["label"], str(entry["rank"]), f"{entry['parameters']:,}", loss_text(entry), str(len(entry["losses"]))]
        for entry in ordered[:SHOWN]
    ]
    note = f"The best {len(rows)} of {len(ordered)} configurations within {budget:,} trainable parameters."
    columns = ["on", "r", "parameters", "held-out loss", "seeds"]
    return Table("Measured losses", note, columns, rows)
