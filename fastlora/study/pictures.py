"""The study's figures."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from fastlora.analysis import random_similarity
from fastlora.analysis.plots import amplification_png, png_bytes, similarity_png
from fastlora.study.plan import BUDGET, RANKS


def study_pictures(report: dict) -> dict[str, bytes]:
    """PNG files by name; those that the report has data for."""
    files = {"budget.png": budget_png(report), "ranks.png": ranks_png(report)}
    directions = report["directions"]
    for name in ("ranks", "seeds"):
        compared = directions[name]
        if compared is None:
            continue
        for kind, tables in compared["types"].items():
            middle = tables["middle"]
            panels = [(f"A of layer {middle['layer']}", middle["a"]), (f"B of layer {middle['layer']}", middle["b"])]
            panels += [(f"A, mean over {tables['layers']} layers", tables["mean"]["a"])]
            chance = random_similarity(len(middle["a"]), len(middle["a"][0]), tables["sizes"]["a"])
            panels += [("A, independent random directions", chance.tolist())]
            title = f"φ(i, j) of {kind}: {compared['i']} (i) against {compared['j']} (j)"
            files[f"similarity_{name}_{kind}.png"] = similarity_png(title, panels)
    if directions["amplification"]:
        files["amplification.png"] = _amplification(directions["amplification"])
    return files


def budget_png(report: dict) -> bytes:
    """Experiment (a): every seed's held-out loss, and the mean, for each way to spend the budget."""
    entries = report["experiments"][BUDGET]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for place, entry in enumerate(entries):
        losses = list(entry["losses"].values())
        axes.plot([place] * len(losses), losses, "o", color="tab:blue", alpha=0.5)
        if entry["mean"] is not None:
            axes.plot([place - 0.25, place + 0.25], [entry["mean"]] * 2, color="black")
    names = [f"{entry['label']}\nr = {entry['rank']}\n{entry['parameters']:,}" for entry in entries]
    axes.set_xticks(range(len(names)), names, fontsize="x-small")
    axes.set(ylabel="held-out loss (nats per token)", title=f"{_size(report)}\n{report['budget']:,} parameters")
    axes.grid(axis="y", alpha=0.3)
    return png_bytes(figure)


def ranks_png(report: dict) -> bytes:
    """Experiment (b): held-out loss over the rank, a line a group, with the spread over seeds."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    entries = report["experiments"][RANKS]
    for label in dict.fromkeys(entry["label"] for entry in entries):
        chosen = [entry for entry in entries if entry["label"] == label and entry["mean"] is not None]
        ranks = [entry["rank"] for entry in chosen]
        spreads = [entry["spread"] or 0.0 for entry in chosen]
        axes.errorbar(ranks, [entry["mean"] for entry in chosen], spreads, marker="o", capsize=3, label=label)
    ranks = sorted({entry["rank"] for entry in entries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, list(map(str, ranks)))
    axes.set(xlabel="rank", ylabel="held-out loss (nats per token)", title=_size(report))
    axes.grid(alpha=0.3)
    axes.legend()
    return png_bytes(figure)


def _size(report: dict) -> str:
    s = report["settings"]
    return f"{report['model']}, {s['steps']} steps of {s['batch_size']}×{s['block_size']} tokens, seeds: {s['seeds']}"


def _amplification(entries: Sequence[dict]) -> bytes:
    """The bars of `fastlora analyze`, a bar group a rank instead of a layer."""
    rows = [
        {"type": entry["type"], "path": f"r = {entry['rank']}", "layer": None, "amplification": entry["middle"]}
        for entry in entries
    ]
    return amplification_png(f"What W has where ΔW acts, layer {entries[0]['layer']}", rows, along="adapter")
