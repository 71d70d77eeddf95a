"""Pictures of a report: every variant against the frozen layer, ratio over M, roofline, memory.

A picture is drawn where the report has what it shows, and each begins with what is to be seen.
"""

from pathlib import Path
from statistics import geometric_mean

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from fastlora.bench.tables import case_label
from fastlora.bench.verdict import headline_case, means_over_cases, percent
from fastlora.tables import MIB

WIDTH = 9.0
DPI = 110
MEMORY_BARS = 12
COLOURS = 10  # matplotlib's own, which come again from then on
MAX_LINES = 16
OURS, OTHERS, PALE = "tab:blue", "0.55", "0.85"
# What tells the lines of a picture apart, and in which order it is averaged over.
LABELS = (
    lambda row: f"{row['n']}×{row['k']}",
    lambda row: row["dtype"],
    lambda row: f"p {row['dropout']:g}" if row["dropout"] else "",
    lambda row: f"R {row['r']}",
)


def _save(figure, path: Path) -> Path:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def _colour(variant: str) -> str:
    return OURS if variant.startswith("fastlora") else OTHERS


def ratio_bars(rows: list[dict], device: str, path: Path) -> Path | None:
    """A bar for each variant: its step over the frozen layer's, which is 1.00. At the left, the case that most
    variants serve, with the quartiles of the times; at the right, geometric means over all cases, of those that serve
    all."""
    headline = headline_case(rows)
    steps = {row["variant"]: row for row in headline}
    if len(steps) < 2:
        return None
    names = sorted(steps, key=lambda name: steps[name]["ratio_to_frozen"])
    means, cases = means_over_cases(rows)
    panels = 2 if cases > 1 else 1
    figure, grid = plt.subplots(
        1, panels, figsize=(WIDTH, 1.6 + 0.3 * len(names)), sharey=True, squeeze=False, layout="constrained"
    )
    left = grid[0][0]
    ratios = [steps[name]["ratio_to_frozen"] for name in names]
    _draw_bars(left, names, ratios, [_quartile_ratios(steps[name]) for name in names])
    left.set(title=case_label(headline[0]), xlabel="step time ÷ frozen layer's; lower is better")
    if panels == 2:
        _draw_bars(grid[0][1], names, [means.get(name) for name in names], None)
        grid[0][1].set(title=f"geometric mean of {cases} cases", xlabel="step time ÷ frozen layer's; lower is better")
    left.invert_yaxis()
    figure.suptitle(_bars_title(steps, device))
    return _save(figure, path)


def _quartile_ratios(row: dict) -> tuple[float, float]:
    frozen = row["median_us"] / row["ratio_to_frozen"]
    return row["q25_us"] / frozen, row["q75_us"] / frozen


def _bars_title(steps: dict[str, dict], device: str) -> str:
    adds = [f"{name} {percent(steps[name]['ratio_to_frozen'])}" for name in ("fastlora", "peft") if name in steps]
    return f"Time that LoRA adds to one frozen layer on {device}" + (f": {', '.join(adds)}" if adds else "")


def _draw_bars(axes, names: list[str], ratios: list[float | None], spreads: list[tuple[float, float]] | None) -> None:
    """Bars from 1.00, the frozen layer, to each ratio; None: the variant lacks a case."""
    known = [ratio for ratio in ratios if ratio is not None]
    low, high = min([1.0, *known]), max([1.0, *known])
    room = max(high - low, 0.01)
    for place, (name, ratio) in enumerate(zip(names, ratios, strict=True)):
        if ratio is None:
            axes.text(1.0, place, "  not in every case", va="center", fontsize="small", color="0.4")
            continue
        axes.barh(place, ratio - 1.0, left=1.0, color=_colour(name))
        if spreads is not None:
            axes.plot(spreads[place], [place, place], color="black", linewidth=1)
        end = ratio if spreads is None else max(ratio, spreads[place][1])
        axes.text(end + 0.02 * room, place, f"{ratio:.2f}", va="center", fontsize="small")
    ends = [end for spread in spreads or () for end in spread]
    axes.set_xlim(min([low, *ends]) - 0.02 * room, max([high, *ends]) + 0.17 * room)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(names)), names)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


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


def ratio_over_tokens(rows: list[dict], device: str, path: Path) -> Path | None:
    """fastlora's step over the frozen layer's, over M; None where no line would have a second point."""
    lines = ratio_lines(rows)
    if not any(len(points) > 1 for points in lines.values()):
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 5.0), layout="constrained")
    for index, (label, points) in enumerate(lines.items()):
        style = "o-" if index < COLOURS else "s:"
        axes.plot(*zip(*points, strict=True), style, label=label)
    axes.axhline(1.0, color="black", linewidth=1, linestyle="--", label="frozen layer")
    axes.set_xscale("log", base=2)
    title = f"fastlora against the frozen layer on {device}, by tokens of a step"
    axes.set(xlabel="tokens M", ylabel="step time ÷ frozen layer's; lower is better", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small", ncols=2 if len(lines) > 8 else 1)
    return _save(figure, path)


def has_roofline(report: dict, rows: list[dict]) -> bool:
    """Whether rows of one dtype lie on both sides of the corner of its roof: elsewhere one straight line bounds all."""
    sides: dict[str, set[bool]] = {}
    for row in rows:
        corner = report["peaks"]["matmul_tflops"][row["dtype"]] / report["peaks"]["copy_gbs"]
        sides.setdefault(row["dtype"], set()).add(row["tflops"] / row["gbs"] > corner)
    return any(len(found) == 2 for found in sides.values())


def roofline(report: dict, path: Path) -> Path | None:
    """Measured TFLOP/s of fastlora and the frozen layer over FLOP per byte, under the measured peaks; None where
    arithmetic alone, or memory alone, bounds every row."""
    rows = [r for r in report["layer"] if r["variant"] in ("fastlora", "frozen") and r["pass"] != "step"]
    if not has_roofline(report, rows):
        return None
    figure, axes = plt.subplots(figsize=(WIDTH, 5.0), layout="constrained")
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
    title = "How near to the machine's own limits: the lines are what it can do"
    axes.set(xlabel="FLOP per byte of compulsory traffic", ylabel="TFLOP/s; higher is better", title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _save(figure, path)


def memory_bars(rows: list[dict], path: Path) -> Path | None:
    """Bytes kept for backward by each variant, and its peak, at the case with the most variants."""
    chosen = [row for row in headline_case(rows) if row["saved_bytes"] is not None][:MEMORY_BARS]
    if not chosen:
        return None
    chosen = sorted(chosen, key=lambda row: row["peak_bytes"])
    figure, axes = plt.subplots(figsize=(WIDTH, 1.6 + 0.3 * len(chosen)), layout="constrained")
    for place, row in enumerate(chosen):
        peak, saved = row["peak_bytes"] / MIB, row["saved_bytes"] / MIB
        axes.barh(place, peak, color=PALE, label="peak of a step" if place == 0 else None)
        kept = {"color": _colour(row["variant"]), "height": 0.45}
        axes.barh(place, saved, **kept, label="kept for backward" if row["variant"] == "fastlora" else None)
        axes.text(peak, place, f" {saved:.1f} / {peak:.1f}", va="center", fontsize="small")
    axes.set_xlim(right=1.25 * max(row["peak_bytes"] for row in chosen) / MIB)
    axes.set_yticks(range(len(chosen)), [row["variant"] for row in chosen])
    axes.invert_yaxis()
    peaks = {row["variant"]: row["peak_bytes"] / MIB for row in chosen}
    said = ", ".join(f"{name} {peaks[name]:.1f}" for name in ("fastlora", "peft") if name in peaks)
    title = f"MiB that a step takes at its peak, besides the parameters: {said}\n{case_label(chosen[0])}"
    axes.set(xlabel="MiB kept for backward / at the peak; lower is better", title=title)
    axes.legend(fontsize="small", loc="upper right")
    return _save(figure, path)


def draw_all(report: dict, directory: Path) -> list[Path]:
    """Draws what the report has rows for, the comparison first; returns the files."""
    name = report["environment"]["device_name"]
    drawn = [
        ratio_bars(report["layer"], name, directory / "variants.png"),
        ratio_over_tokens(report["layer"], name, directory / "ratio.png"),
        memory_bars(report["layer"], directory / "memory.png"),
        roofline(report, directory / "roofline.png"),
    ]
    return [path for path in drawn if path is not None]
