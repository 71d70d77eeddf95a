"""Pictures of a report: ratio to the frozen layer over M, roofline, memory."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from fastlora.bench.tables import MIB, case_label

SIZE = (8.0, 5.0)
DPI = 120
MEMORY_BARS = 12


def _save(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def ratio_over_tokens(rows: list[dict], title: str, path: Path) -> Path | None:
    """fastlora's step over the frozen layer's, one line per layer shape, rank and dropout; None without such rows."""
    lines: dict[str, list] = {}
    for row in rows:
        if row["variant"] == "fastlora" and row["pass"] == "step":
            dropout = f" p {row['dropout']:g}" if row["dropout"] else ""
            label = f"{row['n']}×{row['k']} R {row['r']}{dropout} {row['dtype']}"
            lines.setdefault(label, []).append((row["m"], row["ratio_to_frozen"]))
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=SIZE)
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=label)
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
