"""The figures of a study of trends: φ, the amplification factor and ‖UᵀWV‖ over the steps of training."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fastlora.analysis.plots import png_bytes
from fastlora.study.trend_tables import PAPER_AMPLIFICATION, PAPER_SIMILARITY

_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")
_PAIRS = {"ranks": "-", "seeds": ":"}
_SIDES = {"a": "A", "b": "B"}
# What ‖UᵀWV‖ is taken along: key, name, colour, the place of the paper's value.
_PROJECTIONS = (
    ("delta_projection", "ΔW's directions", "tab:red", 0),
    ("weight_projection", "W's own", "tab:blue", 1),
    ("random_projection", "random ones", "0.5", 2),
)


def trend_pictures(report: dict) -> dict[str, bytes]:
    """PNG files by name."""
    return {"trends.png": trends_png(report), "projections.png": projections_png(report)}


def trends_png(report: dict) -> bytes:
    """φ(1, 1) of A and of B, and the amplification factor, at each kept step, beside the paper's values."""
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 3)
    points, directions = report["trends"]["points"], report["directions"]
    for axis, (side, name) in zip(axes, _SIDES.items(), strict=False):
        rows = [(index, row) for index, row in enumerate(points[-1]["similarity"]) if row["side"] == side]
        for colour, (index, row) in zip(_COLOURS, rows, strict=False):
            compared = directions[row["pair"]]
            values = [point["similarity"][index]["first"] for point in points]
            label = f"{row['type']}, {compared['i']} and {compared['j']}"
            axis.plot(_steps(points), values, _PAIRS[row["pair"]], marker="o", color=colour, label=label)
        axis.axhline(PAPER_SIMILARITY, color="0.3", linestyle="--", label=f"the paper: > {PAPER_SIMILARITY:g}")
        axis.set(ylim=(0, 1), ylabel="φ(1, 1), mean over the layers", title=f"{name}: is the first direction shared?")
        _finish(axis, points)
    axis = axes[-1]
    ranks = sorted({row["rank"] for row in points[-1]["amplification"]})
    for index, row in enumerate(points[-1]["amplification"]):
        values = [point["amplification"][index]["mean"]["factor"] for point in points]
        colour = _COLOURS[ranks.index(row["rank"]) % len(_COLOURS)]
        style = "-" if row["type"] == points[-1]["amplification"][0]["type"] else ":"
        axis.plot(_steps(points), values, style, marker="o", color=colour, label=f"{row['type']}, r = {row['rank']}")
    for rank, values in PAPER_AMPLIFICATION.items():
        axis.axhline(values[-1], color="0.3", linestyle="--")
        axis.text(
            _steps(points)[0], values[-1], f"the paper, r = {rank}: {values[-1]:g}", va="bottom", fontsize="small"
        )
    axis.set(yscale="log", ylabel="‖ΔW‖ / ‖UᵀWV‖, mean over the layers", title="How far ΔW amplifies what W has")
    _finish(axis, points)
    figure.suptitle(_size(report))
    return png_bytes(figure)


def projections_png(report: dict) -> bytes:
    """‖UᵀWV‖ of the middle layer with the top r directions of ΔW, of W and random ones: a panel a type and rank."""
    points = report["trends"]["points"]
    entries = [(i, row) for i, row in enumerate(points[-1]["amplification"]) if row["rank"] in PAPER_AMPLIFICATION]
    entries = entries or list(enumerate(points[-1]["amplification"]))
    figure = Figure(figsize=(4.2 * len(entries), 4.4), layout="constrained")
    for axis, (index, row) in zip(figure.subplots(1, len(entries), squeeze=False)[0], entries, strict=True):
        for key, name, colour, place in _PROJECTIONS:
            values = [point["amplification"][index]["middle"][key] for point in points]
            axis.plot(_steps(points), values, marker="o", color=colour, label=name)
            if row["rank"] in PAPER_AMPLIFICATION:
                paper = PAPER_AMPLIFICATION[row["rank"]][place]
                axis.axhline(paper, color=colour, linestyle="--", linewidth=0.8)
        axis.set(yscale="log", ylabel="‖UᵀWV‖ along", title=f"{row['type']}, r = {row['rank']}, layer {row['layer']}")
        _finish(axis, points)
    figure.suptitle(f"How much of W lies along ΔW's directions; dashed: the paper's Wq\n{_size(report)}")
    return png_bytes(figure)


def _steps(points: list[dict]) -> list[int]:
    return [point["step"] for point in points]


def _finish(axis: Axes, points: list[dict]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(_steps(points), list(map(str, _steps(points))))
    axis.set_xlabel("training steps")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="x-small")


def _size(report: dict) -> str:
    settings = report["settings"]
    tokens = f"{settings['batch_size']}×{settings['block_size']} tokens"
    return f"{report['model']}, adapters of Wq+Wv, {tokens} a step, learning rate {report['trends']['rate']:g}"
