"""Runs the schedule model over shapes and schedules, and writes which schedule suits which shape class."""

import json
import math
from collections import defaultdict
from dataclasses import asdict, replace
from functools import lru_cache
from pathlib import Path

from tqdm import tqdm

from benchmarks.schedule.fit import Fit, as_launched
from benchmarks.schedule.model import LABEL, Machine, Problem, frozen_baseline, simulate
from benchmarks.schedule.queue_order import Schedule
from fastlora.backends.configs import TILE_TABLES
from fastlora.backends.cuda.tiles import group_size

# (N, K): the projections of Llama-3.1-8B, the square ones of 70B, and a small square.
LAYERS = ((1024, 1024), (4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
TOKENS = (512, 2048, 8192)
RANKS = (16, 64)
COLUMNS = (
    "kernel",
    "direction",
    "m",
    "n",
    "k",
    "r",
    "schedule",
    "ratio",
    "ratio_at_m",
    "makespan_us",
    "stall_us",
    "dram_bytes",
    "frozen_dram_bytes",
)
# A single M makes the last wave's luck look like a property of the schedule: average over neighbours.
NEIGHBOURS = (0.85, 1.0, 1.1)
KERNELS = {
    "overlapped stores, multicast": Schedule(),
    "serial tiles": Schedule(overlap=False, cluster=1),
}
SHIPPED = {"overlapped stores, multicast": "CUDA", "serial tiles": "Triton"}  # which of our kernels are so


def schedules(kernel: Schedule) -> list[Schedule]:
    """Group sizes, and at the middle ones separate shrink tiles."""
    groups = [replace(kernel, group_m=g) for g in (4, 8, 16, 32)]
    return groups + [replace(kernel, group_m=g, fused=False) for g in (8, 16)]


def default_schedule(kernel: str, problem: Problem, machine: Machine) -> Schedule:
    """What our kernels of this kind are launched with, where their tile is the model's: their very own rules."""
    clusters = KERNELS[kernel].cluster
    group_m = group_size(clusters, problem.m) if SHIPPED[kernel] == "CUDA" else TILE_TABLES["hopper"][0].group_m
    return as_launched(problem, replace(KERNELS[kernel], group_m=group_m), machine)


def neighbours(tokens: int) -> list[int]:
    """Token counts around ``tokens``, in whole row blocks of 128."""
    return sorted({max(128, round(tokens * factor / 128) * 128) for factor in NEIGHBOURS})


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def sweep(machine: Machine, layers=LAYERS, tokens=TOKENS, ranks=RANKS, progress: bool = True) -> list[dict]:
    """One row per kernel, direction, layer, M, R and schedule: ratio to the frozen GEMM (mean over neighbouring M),
    stall in µs and DRAM bytes (at M itself)."""
    baseline = lru_cache(maxsize=None)(lambda problem, kernel: frozen_baseline(problem, kernel, machine))
    points = [
        (name, backward, layer, m, r)
        for name in KERNELS
        for backward in (False, True)
        for layer in layers
        for m in tokens
        for r in ranks
    ]
    rows = []
    for name, backward, (n, k), m, r in tqdm(points, disable=not progress, unit="point"):
        kernel = KERNELS[name]
        for schedule in schedules(kernel):
            ratios = []
            for tokens_near in neighbours(m):
                problem = Problem(tokens_near, n, k, r, backward)
                found, base = simulate(problem, schedule, machine), baseline(problem.frozen, kernel)
                ratios.append(found.makespan / base.makespan)
                if tokens_near == m:
                    at_m, base_at_m = found, base
            rows.append(
                {
                    "kernel": name,
                    "direction": "backward" if backward else "forward",
                    **{"m": m, "n": n, "k": k, "r": r},
                    "schedule": asdict(schedule),
                    "ratio": geometric_mean(ratios),
                    "ratio_at_m": at_m.makespan / base_at_m.makespan,
                    "makespan_us": at_m.makespan,
                    "stall_us": at_m.stall,
                    "dram_bytes": at_m.dram_bytes,
                    "frozen_dram_bytes": base_at_m.dram_bytes,
                }
            )
    return rows


def describe(schedule: dict) -> str:
    """The schedule's parameters in words."""
    return f"GROUP_M {schedule['group_m']}" + ", separate shrink" * (not schedule["fused"])


def best_by_class(rows: list[dict]) -> dict[tuple, list[tuple[float, dict]]]:
    """(kernel, direction, M, R) -> schedules by mean ratio over the layers, best first."""
    ratios: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["kernel"], row["direction"], row["m"], row["r"])
        ratios[key][json.dumps(row["schedule"])].append(row["ratio"])
    return {
        key: sorted(((geometric_mean(v), json.loads(s)) for s, v in found.items()), key=lambda item: item[0])
        for key, found in ratios.items()
    }


def defaults_table(rows: list[dict], machine: Machine) -> list[str]:
    """Markdown lines: what the kernels do by default in each class, and how far that is from the best of the sweep."""
    found: dict[tuple, list[tuple[Schedule, float, float]]] = defaultdict(list)
    by_problem: dict[tuple, list[dict]] = defaultdict(list)
    for row in rows:
        by_problem[tuple(row[name] for name in ("kernel", "direction", "m", "n", "k", "r"))].append(row)
    for (kernel, direction, m, n, k, r), candidates in by_problem.items():
        default = default_schedule(kernel, Problem(m, n, k, r, direction == "backward"), machine)
        (ratio,) = (row["ratio"] for row in candidates if row["schedule"] == asdict(default))
        best = min(row["ratio"] for row in candidates)
        found[kernel, direction, m, r].append((default, ratio, best))
    lines = [
        "| kernels | direction | M | R | GROUP_M | fused shrink | ratio | best of each layer | gap |",
        "|" + "---|" * 9,
    ]
    for (kernel, direction, m, r), layers in found.items():
        beside = f"{sum(default.fused for default, *_ in layers)} of {len(layers)} layers"
        name, group = SHIPPED[kernel], layers[0][0].group_m
        ratio, best = (geometric_mean([layer[i] for layer in layers]) for i in (1, 2))
        gap = f"{100 * (ratio / best - 1):.1f}%"
        lines.append(f"| {name} | {direction} | {m} | {r} | {group} | {beside} | {ratio:.3f} | {best:.3f} | {gap} |")
    return lines


def _mean_of(ranked: list[tuple[float, dict]], **wanted) -> str:
    """The best mean ratio among schedules with these fields, as text."""
    found = [ratio for ratio, schedule in ranked if all(schedule[name] == value for name, value in wanted.items())]
    return f"{min(found):.3f}" if found else "–"


def to_markdown(rows: list[dict], machine: Machine, fitted: Fit | None, command: str) -> str:
    """The tables of schedule.md."""
    lines = [
        f"# Row groups and who makes S ({LABEL})",
        "",
        f"Written by `{command}`. Ratios are the launch's makespan over that of the same GEMM without the branch at",
        f"its own best group size: geometric mean over {len(LAYERS)} layers and over M × {NEIGHBOURS}.",
        "",
        calibration_text(fitted),
        "",
        "Machine: " + ", ".join(f"{name} {value:g}" for name, value in asdict(machine).items()) + ".",
        "",
        f"## Defaults ({LABEL})",
        "",
        "What the kernels are launched with: their group size, and S by the rule of",
        "`fastlora.backends.configs.fuses_shrink`, against the best schedule of the sweep for each layer by itself.",
        "",
        *defaults_table(rows, machine),
    ]
    for kernel in KERNELS:
        for direction in ("forward", "backward"):
            lines += ["", f"## {kernel}, {direction} ({LABEL})", ""]
            lines += [
                "| M | R | best | ratio | 2nd | fused shrink | separate shrink | G 4 | G 8 | G 16 | G 32 |",
                "|" + "---|" * 11,
            ]
            for (name, way, m, r), ranked in best_by_class(rows).items():
                if (name, way) == (kernel, direction):
                    cells = [_mean_of(ranked, fused=fused) for fused in (True, False)]
                    cells += [_mean_of(ranked, group_m=group, fused=True) for group in (4, 8, 16, 32)]
                    first, second = ranked[:2]
                    cells = [describe(first[1]), f"{first[0]:.3f}", f"{describe(second[1])}: {second[0]:.3f}", *cells]
                    lines.append(f"| {m} | {r} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def calibration_text(fitted: Fit | None) -> str:
    """Which measurements stand behind the machine's numbers, and how far the model is from them."""
    if fitted is None:
        return "Calibration: none; no measured times were given, so the machine's numbers are those of its docstring."
    return (
        f"Calibration: flops, DRAM bandwidth and tile overhead fitted to {len(fitted.frozen)} measured times of the "
        f"frozen layer (RMS error after the fit {fitted.frozen_error:.1f}%); {len(fitted.fused)} fused rows predicted "
        f"with RMS error {fitted.fused_error:.1f}%."
    )


def _compact(row: dict) -> list:
    """A row as a list in the order of COLUMNS, times in µs to two decimals, ratios to four."""
    digits = {"ratio": 4, "ratio_at_m": 4, "makespan_us": 2, "stall_us": 2}
    values = {**row, "schedule": describe(row["schedule"])}
    return [round(values[name], digits[name]) if name in digits else values[name] for name in COLUMNS]


def write_sweep(directory: Path, rows: list[dict], machine: Machine, fitted: Fit | None, command: str) -> list[Path]:
    """Writes schedule.json and schedule.md; returns their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    report = {
        "label": LABEL,
        "command": command,
        "machine": asdict(machine),
        "calibration": calibration_text(fitted),
        "columns": list(COLUMNS),
        "rows": [_compact(row) for row in rows],
    }
    paths = [directory / "schedule.json", directory / "schedule.md"]
    paths[0].write_text(json.dumps(report, separators=(",", ":")).replace("],[", "],\n[") + "\n")
    paths[1].write_text(to_markdown(rows, machine, fitted, command))
    return paths
