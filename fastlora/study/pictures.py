"""The study's figures."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from fastlora.analysis import random_similarity
from fastlora.analysis.plots import amplification_png, png_bytes, similarity_png
from fastlora.study.plan import BUDGET, RANKS

LOSS = "held-out loss (nats per token); lower is better"


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
            title = (
                f"Do two adapters learn the same directions? {kind}, {compared['i']} (i) against {compared['j']} (j)"
            )
            files[f"similarity_{name}_{kind}.png"] = similarity_png(title, panels)
    if directions["amplification"]:
        files["amplification.png"] = _amplification(directions["amplification"])
    return files


def budget_png(report: dict) -> bytes:
    """Experiment (a): every seed's held-out loss, and the mean, for each way to spend the budget, below the untrained
    model's."""
    entries = report["experiments"][BUDGET]
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    known = [entry["mean"] for entry in entries if entry["mean"] is not None]
    best = min(known, default=None)
    for place, entry in enumerate(entries):
        losses = list(entry["losses"].values())
        axes.plot(
            [place] * len(losses), losses, "o", color="tab:blue", alpha=0.5, label="one seed" if not place else None
        )
        if entry["mean"] is not None:
            colour = "tab:red" if entry["mean"] == best else "black"
            axes.plot([place - 0.3, place + 0.3], [entry["mean"]] * 2, color=colour, linewidth=2)
            axes.text(place + 0.32, entry["mean"], f"{entry['mean']:.3f}", color=colour, va="center", fontsize="small")
    _draw_untrained(axes, report)
    axes.set_xlim(-0.6, len(entries) - 0.2)
    names = [f"{entry['label']}\nr = {entry['rank']}" for entry in entries]
    axes.set_xticks(range(len(names)), names, fontsize="small")
    lowest = [entry["label"] for entry in entries if entry["mean"] is not None and entry["mean"] == best]
    found = f": lowest loss on {lowest[0]}" if lowest else ""
    axes.set(
        ylabel=LOSS,
        title=f"About {report['budget']:,} trainable parameters, spent in {len(entries)} ways{found}\n{_size(report)}",
    )
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize="small", loc="center left")
    return png_bytes(figure)


def ranks_png(report: dict) -> bytes:
    """Experiment (b): held-out loss over the rank, a line a group, with the spread over seeds."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.add_subplot()
    entries = report["experiments"][RANKS]
    labels = list(dict.fromkeys(entry["label"] for entry in entries))
    for index, label in enumerate(labels):
        chosen = [entry for entry in entries if entry["label"] == label and entry["mean"] is not None]
        # Side by side, so that the spreads of neighbouring lines are told apart.
        ranks = [entry["rank"] * 1.04 ** (index - (len(labels) - 1) / 2) for entry in chosen]
        spreads = [entry["spread"] or 0.0 for entry in chosen]
        axes.errorbar(ranks, [entry["mean"] for entry in chosen], spreads, marker="o", capsize=3, label=label)
    _draw_untrained(axes, report)
    ranks = sorted({entry["rank"] for entry in entries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, list(map(str, ranks)))
    axes.set(xlabel="rank; the bars are the standard deviation over seeds", ylabel=LOSS)
    axes.set_title(f"What a higher rank gains, and what more matrices gain\n{_size(report)}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="center right")
    return png_bytes(figure)


def _draw_untrained(axes, report: dict) -> None:
    """The level that training starts from."""
    axes.axhline(report["base_loss"], color="0.3", linestyle="--", label=f"untrained: {report['base_loss']:.3f}")


def _size(report: dict) -> str:
    s = report["settings"]
    return f"{report['model']}, {s['steps']} steps of {s['batch_size']}×{s['block_size']} tokens, seeds: {s['seeds']}"


def _amplification(entries: Sequence[dict]) -> bytes:
    """The bars of `fastlora analyze`, a bar group a rank instead of a layer."""
    rows = [
        {"type": entry["type"], "path": f"r = {entry['rank']}", "layer": None, "amplification": entry["middle"]}
        for entry in entries
    ]
    return amplification_png(f"How far ΔW amplifies what W has, layer {entries[0]['layer']}", rows, along="adapter")
