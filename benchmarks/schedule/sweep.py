"""Runs the schedule model over shapes and schedules, and writes which schedule suits which shape class."""

import json
import math
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from tqdm import tqdm

from benchmarks.schedule.fit import Fit, as_launched
from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import LABEL, Problem, frozen_baseline, simulate
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
    "dropout",
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
# (backward, dropout), in the order of the tables.
WAYS = {
    "forward": (False, False),
    "forward with dropout": (False, True),
    "backward": (True, False),
    "backward with dropout": (True, True),
}
SHIPPED = {"overlapped stores, multicast": "CUDA", "serial tiles": "Triton"}  # which of our kernels are so


def schedules(kernel: Schedule, backward: bool) -> list[Schedule]:
    """Group sizes, and at the middle ones separate shrink tiles and, in a backward, gradient tiles last."""
    groups = [replace(kernel, group_m=g) for g in (4, 8, 16, 32)]
    middle = [replace(kernel, group_m=g, fused=fused) for g in (8, 16) for fused in (False, True)]
    groups += [schedule for schedule in middle if not schedule.fused]
    return groups + [replace(schedule, gradients_last=True) for schedule in middle if backward]


def default_schedule(kernel: str, problem: Problem, machine: Machine) -> Schedule:
    """What our kernels of this kind are launched with, where their tile is the model's: their very own rules."""
    draws_over = problem.reduction if problem.dropout and problem.backward else None
    of_cuda = group_size(KERNELS[kernel].cluster, problem.m, draws_over=draws_over)
    group_m = of_cuda if SHIPPED[kernel] == "CUDA" else TILE_TABLES["hopper"][0].group_m
    return as_launched(problem, replace(KERNELS[kernel], group_m=group_m), machine)


def neighbours(tokens: int) -> list[int]:
    """Token counts around ``tokens``, in whole row blocks of 128."""
    return sorted({max(128, round(tokens * factor / 128) * 128) for factor in NEIGHBOURS})


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(math.log(value) for value in values) / len(values))


def sweep(machine: Machine, layers=LAYERS, tokens=TOKENS, ranks=RANKS, progress: bool = True) -> list[dict]:
    """One row per kernel, way, layer, M, R and schedule: ratio to the frozen GEMM (mean over neighbouring M), stall in
    µs and DRAM bytes (at M itself)."""
    points = [
        (name, backward, layer, m, machine, ranks)
        for name in KERNELS
        for backward in (False, True)
        for layer in layers
        for m in tokens
    ]
    with ProcessPoolExecutor() as pool:
        found = tqdm(pool.map(_sweep_point, points), total=len(points), disable=not progress, unit="point")
        rows = [row for rows in found for row in rows]
    return sorted(rows, key=lambda row: (list(KERNELS).index(row["kernel"]), list(WAYS).index(way_of(row))))


def _sweep_point(point: tuple) -> list[dict]:
    """With dropout and without, whose baseline is the same."""
    name, backward, (n, k), m, machine, ranks = point
    kernel, near, rows = KERNELS[name], neighbours(m), []
    baselines = {t: frozen_baseline(Problem(t, n, k, 0, backward), kernel, machine) for t in near}
    for dropout, r in product((False, True), ranks):
        for schedule in schedules(kernel, backward):
            found = {t: simulate(Problem(t, n, k, r, backward, dropout), schedule, machine) for t in near}
            ratios = {t: found[t].makespan / baselines[t].makespan for t in near}
            rows.append(
                {
                    "kernel": name,
                    "direction": "backward" if backward else "forward",
                    **{"dropout": dropout, "m": m, "n": n, "k": k, "r": r},
                    "schedule": asdict(schedule),
                    "ratio": geometric_mean(list(ratios.values())),
                    "ratio_at_m": ratios[m],
                    "makespan_us": found[m].makespan,
                    "stall_us": found[m].stall,
                    "dram_bytes": found[m].dram_bytes,
                    "frozen_dram_bytes": baselines[m].dram_bytes,
                }
            )
    return rows


def describe(schedule: dict) -> str:
    """The schedule's parameters in words."""
    text = f"GROUP_M {schedule['group_m']}" + ", separate shrink" * (not schedule["fused"])
    return text + ", gradients last" * schedule["gradients_last"]


def way_of(row: dict) -> str:
    """One of WAYS."""
    return row["direction"] + " with dropout" * row["dropout"]


def best_by_class(rows: list[dict]) -> dict[tuple, list[tuple[float, dict]]]:
    """(kernel, way, M, R) -> schedules by mean ratio over the layers, best first."""
    ratios: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        key = (row["kernel"], way_of(row), row["m"], row["r"])
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
        by_problem[(row["kernel"], way_of(row), *(row[name] for name in ("m", "n", "k", "r")))].append(row)
    for (kernel, way, m, n, k, r), candidates in by_problem.items():
        problem = Problem(m, n, k, r, *WAYS[way])
        default = default_schedule(kernel, problem, machine)
        (ratio,) = (row["ratio"] for row in candidates if row["schedule"] == asdict(default))
        best = min(row["ratio"] for row in candidates)
        found[kernel, way, m, r].append((default, ratio, best))
    lines = [
        "| kernels | way | M | R | GROUP_M | fused shrink | gradients last | ratio | best of each layer | gap |",
        "|" + "---|" * 10,
    ]
    for (kernel, way, m, r), layers in found.items():
        fused = f"{sum(default.fused for default, *_ in layers)} of {len(layers)} layers"
        last = f"{sum(default.gradients_last for default, *_ in layers)} of {len(layers)} layers"
        name, group = SHIPPED[kernel], layers[0][0].group_m
        ratio, best = (geometric_mean([layer[i] for layer in layers]) for i in (1, 2))
        gap = f"{100 * (ratio / best - 1):.1f}%"
        last = last if WAYS[way][0] else "–"
        lines.append(f"| {name} | {way} | {m} | {r} | {group} | {fused} | {last} | {ratio:.3f} | {best:.3f} | {gap} |")
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
        "What the kernels are launched with: their group size, S by `fastlora.backends.configs.fuses_shrink` (the CUDA",
        "forward with dropout by `fastlora.backends.cuda.tiles.fuses_drawn`), the gradient tiles by `gradients_last`,",
        "against the best schedule of the sweep for each layer by itself.",
        "",
        *defaults_table(rows, machine),
    ]
    for kernel in KERNELS:
        for way in WAYS:
            lines += ["", f"## {kernel}, {way} ({LABEL})", ""]
            lines += [
                "| M | R | best | ratio | 2nd | fused shrink | separate shrink | gradients between | gradients last |"
                " G 4 | G 8 | G 16 | G 32 |",
                "|" + "---|" * 13,
            ]
            for (name, other, m, r), ranked in best_by_class(rows).items():
                if (name, other) == (kernel, way):
                    cells = [_mean_of(ranked, fused=fused) for fused in (True, False)]
                    cells += [_mean_of(ranked, gradients_last=last) for last in (False, True)]
                    between = {"fused": True, "gradients_last": False}
                    cells += [_mean_of(ranked, group_m=group, **between) for group in (4, 8, 16, 32)]
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
