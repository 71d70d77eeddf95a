"""From runs to answers: means and spreads, the study's report as a dictionary, and its tables."""

import math
from statistics import mean, stdev

from fastlora.analysis import random_similarity
from fastlora.analysis.tables import NONE, mean_of, number
from fastlora.study.plan import BUDGET, KEPT_GROUP, RANKS, Plan, group_label
from fastlora.tables import Table

FORMAT = "fastlora-study-1"
KEPT_LABEL = group_label(KEPT_GROUP)


def summarize(results: list[dict]) -> list[dict]:
    """One entry for each group and rank that was run: parameters, held-out losses by seed, their mean and spread.

    A configuration of which any run diverged has neither mean nor spread; one with a single seed has no spread.
    """
    found: dict[tuple[str, int], dict] = {}
    for result in sorted(results, key=lambda entry: entry["seed"]):
        entry = found.setdefault(
            (result["label"], result["rank"]),
            {
                "label": result["label"],
                "targets": result["targets"],
                "rank": result["rank"],
                "parameters": result["parameters"],
                "losses": {},
                "diverged": 0,
                "seconds": 0.0,
                "relative_change_of_a": [],
            },
        )
        entry["seconds"] += result["seconds"]
        if result["held_out_loss"] is None:
            entry["diverged"] += 1
        else:
            entry["losses"][str(result["seed"])] = result["held_out_loss"]
            entry["relative_change_of_a"].append(result["relative_change_of_a"])
    for entry in found.values():
        losses = list(entry["losses"].values())
        whole = losses and not entry["diverged"]
        entry["mean"] = mean(losses) if whole else None
        entry["spread"] = stdev(losses) if whole and len(losses) > 1 else None
        changes = entry.pop("relative_change_of_a")
        entry["relative_change_of_a"] = mean(changes) if changes else None
        entry["seconds"] = round(entry["seconds"], 3)
    return list(found.values())


def experiments_of(plan: Plan, summary: list[dict]) -> dict[str, list[dict]]:
    """The summaries of each experiment's configurations, in the plan's order."""
    by_pair = {(entry["label"], entry["rank"]): entry for entry in summary}
    return {
        name: [by_pair[group_label(group), rank] for group, rank in pairs] for name, pairs in plan.experiments.items()
    }


def loss_text(entry: dict, digits: int = 4) -> str:
    """Mean and spread of the held-out loss."""
    if entry["diverged"]:
        return f"diverged in {entry['diverged']} of {entry['diverged'] + len(entry['losses'])}"
    spread = NONE if entry["spread"] is None else f"{entry['spread']:.{digits}f}"
    return f"{entry['mean']:.{digits}f} ± {spread}"


def paired_difference(entry: dict, best: dict) -> tuple[float, float | None]:
    """Mean and standard deviation, over the seeds of both, of how far an entry's loss is above the best one's."""
    gaps = [loss - best["losses"][seed] for seed, loss in entry["losses"].items() if seed in best["losses"]]
    return mean(gaps), stdev(gaps) if len(gaps) > 1 else None


def gap_text(entry: dict, best: dict) -> str:
    """How far an entry's loss is above another's, seed by seed: all runs of a seed see the same batches."""
    if entry["mean"] is None or best["mean"] is None:
        return NONE
    gap, spread = paired_difference(entry, best)
    return f"{gap:+.4f} ± " + (NONE if spread is None else f"{spread:.4f}")


def size_note(report: dict) -> str:
    """How large the runs were, so that nobody takes a quick study for a thorough one."""
    s = report["settings"]
    tokens = s["steps"] * s["batch_size"] * s["block_size"]
    held_out = report["held_out_tokens"]
    return (
        f"{report['model']}, each run {s['steps']} steps of {s['batch_size']} × {s['block_size']} tokens "
        f"({tokens:,} in all), {_seeds_and_rate(report)}alpha {s['alpha']:g}, {s['dtype']}; held-out loss in nats per "
        f"token over {held_out:,} tokens. Without an adapter: {report['base_loss']:.4f}."
    )


def _seeds_and_rate(report: dict) -> str:
    """Not of a study of trends: there each run has its own."""
    s = report["settings"]
    if s.get("learning_rates"):
        return ""
    return f"mean ± standard deviation over {s['seeds']} seeds, learning rate {s['learning_rate']:g}, "


def budget_table(report: dict) -> Table:
    """Experiment (a)."""
    entries = report["experiments"][BUDGET]
    best = min(entries, key=lambda entry: math.inf if entry["mean"] is None else entry["mean"])
    lines = [
        [entry["label"], str(entry["rank"]), f"{entry['parameters']:,}", loss_text(entry), gap_text(entry, best)]
        for entry in entries
    ]
    note = f"{report['budget']:,} trainable parameters, as nearly as integer ranks allow. {size_note(report)}"
    columns = ["on", "r", "parameters", "held-out loss", "above the lowest, seed by seed"]
    return Table("One budget, spent on different matrices", note, columns, lines)


def ranks_table(report: dict) -> Table:
    """Experiment (b): a row a group, a column a rank."""
    entries = report["experiments"][RANKS]
    ranks = sorted({entry["rank"] for entry in entries})
    found = {(entry["label"], entry["rank"]): entry for entry in entries}
    labels = list(dict.fromkeys(entry["label"] for entry in entries))
    lines = []
    for label in labels:
        first, last = found[label, ranks[0]], found[label, ranks[-1]]
        losses = [loss_text(found[label, rank]) for rank in ranks]
        lines.append([label, f"{first['parameters'] // ranks[0]:,}", *losses, gap_text(first, last)])
    gap = f"r = {ranks[0]} above r = {ranks[-1]}, seed by seed"
    columns = ["on", "parameters a rank", *(f"r = {rank}" for rank in ranks), gap]
    return Table("Ranks", size_note(report), columns, lines)


def similarity_table(report: dict) -> Table | None:
    """φ at its ends, beside what chance gives; None where too few adapters were trained."""
    lines = []
    for name in ("ranks", "seeds"):
        compared = report["directions"][name]
        for kind, tables in (compared or {"types": {}})["types"].items():
            for side in "ab":
                table = tables["mean"][side]
                chance = random_similarity(len(table), len(table[0]), tables["sizes"][side]).tolist()
                last = min(len(table), len(table[0])) - 1
                cells = [f"{number(table[i][i])} ({number(chance[i][i])})" for i in (0, last)]
                middle = number(tables["middle"][side][0][0])
                lines.append([f"{compared['i']} against {compared['j']}", kind, side.upper(), middle, *cells])
    if not lines:
        return None
    changes = [e["relative_change_of_a"] for e in report["experiments"][RANKS] if e["label"] == KEPT_LABEL]
    note = (
        "Means over layers and seeds, in brackets what independent random directions give; r the smaller rank. Every "
        f"adapter began with another random A, and training changed A by {number(mean_of(changes), 2)} of its norm."
    )
    columns = ["adapters", "type", "of", "φ(1, 1), middle layer", "φ(1, 1)", "φ(r, r)"]
    return Table("Similarity of the learned directions", note, columns, lines)


def amplification_table(report: dict) -> Table | None:
    """The paper's table 7 for the middle layer; None without adapters."""
    lines = []
    for entry in report["directions"]["amplification"]:
        row = entry["middle"]
        norms = ("delta_projection", "weight_projection", "random_projection", "weight_norm", "delta_norm", "factor")
        cells = [number(row[name]) for name in norms]
        lines.append([entry["type"], str(entry["rank"]), *cells, number(entry["mean"]["factor"])])
    if not lines:
        return None
    layer = report["directions"]["amplification"][0]["layer"]
    note = f"Layer {layer}, adapters of Wq+Wv from the first seed. ‖UᵀWV‖ with the top r directions of ΔW, W, random."
    columns = ["type", "r", "of ΔW", "of W", "of random", "‖W‖", "‖ΔW‖", "factor", "factor, mean over layers"]
    return Table("Amplification", note, columns, lines)


def study_tables(report: dict) -> list[Table]:
    """All tables that the report has."""
    found = [budget_table(report), ranks_table(report), similarity_table(report), amplification_table(report)]
    return [table for table in found if table is not None]
