"""Pictures of a report: ratio to the frozen layer over M, roofline, memory."""

from pathlib import Path
from statistics import geometric_mean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from fastlora.bench.tables import case_label
from fastlora.tables import MIB

SIZE = (8.0, 5.0)
DPI = 120
MEMORY_BARS = 12
COLOURS = 10  # matplotlib's own, which come again from then on
MAX_LINES = 16
# What tells the lines of a picture apart, and in which order it is averaged over.
LABELS = (
    lambda row: f"{row['n']}×{row['k']}",
    lambda row: row["dtype"],
    lambda row: f"p {row['dropout']:g}" if row["dropout"] else "",
    lambda row: f"R {row['r']}",
)


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def ratio_lines(rows: list[dict]) -> dict[str, list[tuple[int, float]]]:
    """Label -> (M, fastlora's step over the frozen layer's): a line per layer shape, rank, dropout and dtype, or, where
    those are too many to tell apart, geometric means over the first of these until they are few."""
    steps = [row for row in rows if row["variant"] == "fastlora" and row["pass"] == "step"]
    for averaged in range(len(LABELS)):
        lines: dict[str, dict[int, list[float]]] = {}
        for row in steps:
            label = " ".join(filter(None, (part(row) for part in LABELS[averaged:])))
            lines.setdefault(label, {}).setdefault(row["m"], []).append(row["ratio_to_frozen"])
        if len(lines) <= MAX_LINES:
            break
    return {
        label: sorted((m, geometric_mean(ratios)) for m, ratios in points.items()) for label, points in lines.items()
    }


def ratio_over_tokens(rows: list[dict], title: str, path: Path) -> Path | None:
    """fastlora's step over the frozen layer's, over M; None without such rows."""
    lines = ratio_lines(rows)
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=SIZE)
    for index, (label, points) in enumerate(lines.items()):
        style = "o-" if index < COLOURS else "s:"
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label="frozen layer")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens M", ylabel="step time ÷ frozen layer's", title=title)
    axes.legend(fontsize="x-small", ncols=2 if len(lines) > 8 else 1)
    return _save(figure, path)


def roofline(report: dict, path: Path) -> Path | None:
    """Measured TFLOP/s of fastlora and the frozen layer over FLOP per byte, under the measured peaks."""
    rows = [r for r in report["layer"] if r["variant"] in ("fastlora", "frozen") and r["pass"] != "step"]
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=SIZE)
    intensities = [row["tflops"] / row["gbs"] * 1e3 for row in rows]
    low, high = min(intensities) / 2, max(intensities) * 2
    bandwidth = report["peaks"]["copy_gbs"]
    for dtype, peak in report["peaks"]["matmul_tflops"].items():
        corner = peak / bandwidth * 1e3
        xs = sorted({low, min(max(corner, low), high), high})
        axes.plot(xs, [min(peak, x * bandwidth / 1e3) for x in xs], label=f"measured peaks, {dtype}")
    for variant, marker in (("frozen", "x"), ("fastlora", "o")):
        for which in ("forward", "backward"):
            chosen = [row for row in rows if (row["variant"], row["pass"]) == (variant, which)]
            axes.scatter(
                [row["tflops"] / row["gbs"] * 1e3 for row in chosen],
                [row["tflops"] for row in chosen],
                marker=marker,
                label=f"{variant}, {which}",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set(xlabel="FLOP per byte of compulsory traffic", ylabel="TFLOP/s", title="Roofline")
    axes.legend(fontsize="small")
    return _save(figure, path)


def memory_bars(rows: list[dict], path: Path) -> Path | None:
    """Bytes kept for backward by each variant, at the case with the most variants."""
    steps = [row for row in rows if row["pass"] == "step" and row["saved_bytes"] is not None]
    if not steps:
        return None
    labels = [case_label(row) for row in steps]
    label = max(dict.fromkeys(labels), key=labels.count)
    chosen = [row for row in steps if case_label(row) == label][:MEMORY_BARS]
    figure, axes = plt.subplots(figsize=SIZE)
    names = [row["variant"] for row in chosen]
    axes.barh(names, [row["peak_bytes"] / MIB for row in chosen], color="lightgrey", label="peak of the step")
    axes.barh(names, [row["saved_bytes"] / MIB for row in chosen], height=0.4, label="kept for backward")
    axes.invert_yaxis()
    axes.set(xlabel="MiB", title=f"Memory besides the parameters: {label}")
    axes.legend()
    return _save(figure, path)


def draw_all(report: dict, directory: Path) -> list[Path]:
    """Draws what the report has rows for; returns the files."""
    name = report["environment"]["device_name"]
    drawn = [
        ratio_over_tokens(report["layer"], f"One LoRA layer on {name}", directory / "ratio.png"),
        roofline(report, directory / "roofline.png"),
        memory_bars(report["layer"], directory / "memory.png"),
    ]
    return [path for path in drawn if path is not None]
