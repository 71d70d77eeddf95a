"""Fits the schedule model's machine to measured times of the frozen layer, and computes the error that remains."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import Problem, Schedule, frozen_baseline, simulate
from benchmarks.schedule.queue_order import cdiv
from fastlora.backends.configs import FUSED_RANK, fuses_shrink, gradients_last
from fastlora.backends.cuda.tiles import fuses_drawn

FITTED = ("flops", "dram_bandwidth", "tile_overhead")
MIN_ROWS = 3


@dataclass(frozen=True)
class Measured:
    """One timed pass of ``fastlora bench``: sizes, direction, rank (0 for the frozen layer) and the median in µs."""

    problem: Problem
    microseconds: float


@dataclass(frozen=True)
class Fit:
    """The fitted machine, and model / measured of every frozen row (fitted) and every fused row (predicted)."""

    machine: Machine
    frozen: list[tuple[Measured, float]]
    fused: list[tuple[Measured, float]]

    @property
    def frozen_error(self) -> float:
        return rms_percent([ratio for _, ratio in self.frozen])

    @property
    def fused_error(self) -> float:
        return rms_percent([ratio for _, ratio in self.fused])


def rms_percent(ratios: list[float]) -> float:
    """Root mean square of log(model / measured), in percent."""
    return 100 * math.sqrt(sum(math.log(ratio) ** 2 for ratio in ratios) / len(ratios)) if ratios else math.nan


def read_measured(path: Path) -> list[Measured]:
    """The 16-bit GPU rows of a ``fastlora bench`` JSON file whose model this is: the frozen layer and fastlora's own.

    Raises:
        ValueError: the file has no such row.
    """
    report = json.loads(Path(path).read_text())
    if not isinstance(report, dict):
        raise ValueError("it is not a report of fastlora bench")
    rows = []
    for row in report.get("layer", []):
        fused = row["variant"] == "fastlora"
        if row["device"] != "cuda" or row["dtype"] not in ("bfloat16", "float16") or row["dropout"]:
            continue
        if row["pass"] in ("forward", "backward") and (fused or row["variant"] == "frozen"):
            problem = Problem(row["m"], row["n"], row["k"], row["r"] if fused else 0, row["pass"] == "backward")
            rows.append(Measured(problem, row["median_us"]))
    if not rows:
        raise ValueError(f"{path} holds no forward or backward row measured on a GPU in a 16-bit dtype")
    return list(dict.fromkeys(rows))


def as_launched(problem: Problem, schedule: Schedule, machine: Machine) -> Schedule:
    """The schedule with a fused or a separate shrink, and the gradient tiles between the others or last, as our kernels
    decide it for this problem."""
    rows = cdiv(problem.m, schedule.block_m)
    n_tiles, draws = rows * cdiv(problem.width, schedule.block_n), problem.dropout and not problem.backward
    sizes = (problem.m, problem.width, problem.reduction, schedule.block_m, schedule.block_n)
    hides_generator = problem.dropout and schedule.overlap
    last = problem.backward and not hides_generator and gradients_last(*sizes)
    if draws and schedule.overlap:
        fused = problem.r <= FUSED_RANK and fuses_drawn(rows, n_tiles, machine.sm_count)
    else:
        fused = fuses_shrink(problem.r, schedule.block_n, n_tiles, machine.sm_count, draws=draws)
    return replace(schedule, fused=fused, gradients_last=last)


def fit(measured: list[Measured], schedule: Schedule, machine: Machine | None = None, rounds: int = 3) -> Fit:
    """Coordinate descent over FITTED on the frozen rows alone, so that the fused rows stay a test of the model. Whether
    these fuse the shrink is what the kernels decide, and not ``schedule``.

    Raises:
        ValueError: fewer than MIN_ROWS frozen rows.
    """
    machine = machine or Machine()
    frozen = [row for row in measured if row.problem.r == 0]
    if len(frozen) < MIN_ROWS:
        raise ValueError(f"calibration needs at least {MIN_ROWS} measured frozen rows, got {len(frozen)}")

    def ratio(row: Measured, candidate: Machine) -> float:
        if row.problem.r:
            found = simulate(row.problem, as_launched(row.problem, schedule, candidate), candidate)
        else:
            found = frozen_baseline(row.problem, schedule, candidate)
        return found.makespan / row.microseconds

    def error(candidate: Machine) -> float:
        return rms_percent([ratio(row, candidate) for row in frozen])

    best, step = error(machine), 1.3
    for _ in range(rounds):
        for name in FITTED:
            for factor in (step, 1 / step):
                while True:
                    candidate = replace(machine, **{name: getattr(machine, name) * factor})
                    found = error(candidate)
                    if found >= best:
                        break
                    machine, best = candidate, found
        step = math.sqrt(step)
    return Fit(
        machine,
        [(row, ratio(row, machine)) for row in frozen],
        [(row, ratio(row, machine)) for row in measured if row.problem.r],
    )
