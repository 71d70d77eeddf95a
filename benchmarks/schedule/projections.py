"""Projections that share an input, in one launch and in one each; ``python -m benchmarks.schedule --projections``
writes results/projection_schedule.*.

By the same model as one layer. Forward, each projection's first column makes its S, and its others wait for that one;
backward, dX contracts all columns of dY, and column 0 makes every dS. Beside it: a launch of ours for each, and each
frozen, whose dX autograd adds up. An addition is the time that DRAM takes for its two reads and its write; what passes
between two launches is left out, of all. Loads are modelled in chunks of one depth, for long ones delay a launch.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from benchmarks.schedule.fit import as_launched
from benchmarks.schedule.machine import Machine
from benchmarks.schedule.model import LABEL, Outcome, Problem, Simulation
from benchmarks.schedule.queue_order import Schedule, Tile, build_queue, cdiv
from fastlora.tables import Table

K, RANK = 4096, 16
GROUPS = {"q, k, v": (4096, 1024, 1024), "gate, up": (14336, 14336)}  # of Llama-3.1-8B
ROWS = (512, 2048, 8192)
CHUNK = 512  # of K


class SharedSimulation(Simulation):
    """One launch of projections of ``ns`` columns each, which are whole tiles."""

    def __init__(self, problem: Problem, ns: tuple[int, ...], schedule: Schedule, machine: Machine):
        """
        Raises:
            ValueError: a projection's columns are no whole tiles, or not those of the problem together.
        """
        if sum(ns) != problem.n or any(n % size for n in ns for size in (schedule.block_n, schedule.grad_columns)):
            raise ValueError(f"columns {ns} must be whole tiles, {problem.n} together")
        super().__init__(problem, schedule, machine)
        self.ns, count, backward = ns, len(ns), problem.backward
        self.shrink = 1 if backward and schedule.fused else count
        self.rank = self.sum_rank * (count if backward else 1)
        gradients = cdiv(problem.k, schedule.grad_columns) * count
        grads = (cdiv(problem.n, schedule.grad_columns), gradients) if backward else (0, 0)
        rows, columns = len(self.row_map.blocks), cdiv(problem.width, schedule.block_n)
        parts = len(self.row_map.chunks)
        self.queue = build_queue(rows, columns, self.shrink, grads, schedule, machine.sm_count, parts)

    def _slice_width(self, tile: Tile) -> int:
        return cdiv(self.problem.r, 8) * 8 if tile.kind == "shrink" else 0

    def _steps(self, tile: Tile) -> list[tuple[int, int]]:
        """A separate tile of dS contracts its own projection's columns of dY."""
        steps = super()._steps(tile)
        if not self.problem.backward or self.schedule.fused or tile.kind != "shrink":
            return steps
        first = sum(self.ns[: tile.column])
        end = first + self.ns[tile.column]
        starts = ((chunk, chunk * self.chunk, depth) for chunk, depth in steps)
        overlaps = ((chunk, min(start + depth, end) - max(start, first)) for chunk, start, depth in starts)
        return [(chunk, depth) for chunk, depth in overlaps if depth > 0]

    def _made(self, tile: Tile) -> int:
        """Each column makes its projection's; a fused one of the backward, all."""
        return (
            self._extent(tile)[0] * self.rank * 2 // (1 if self.shrink == 1 else len(self.ns) ** self.problem.backward)
        )

    def _awaited(self, tile: Tile) -> Iterable[int]:
        if self.problem.backward:
            if tile.kind == "dA" and self.shrink > 1:
                return (tile.column // cdiv(self.problem.k, self.schedule.grad_columns),)
            return range(self.shrink)
        if self.schedule.fused and tile.column < len(self.ns):
            return (tile.column,)
        # Behind the first columns of all come the others, projection by projection.
        column = tile.column - len(self.ns) if self.schedule.fused else tile.column
        for index, n in enumerate(self.ns):
            others = n // self.schedule.block_n - self.schedule.fused
            if column < others:
                return (index,)
            column -= others
        raise AssertionError("a column of no projection")

    def _gradient_width(self, tile: Tile) -> int:
        if tile.kind == "dA":
            tile = tile._replace(column=tile.column % cdiv(self.problem.k, self.schedule.grad_columns))
        return super()._gradient_width(tile)


def addition(m: int, k: int, machine: Machine) -> float:
    """Microseconds in which autograd adds one dX [m, k] to another: two reads and a write."""
    return 3e6 * 2 * m * k / machine.dram_bandwidth


class Row(NamedTuple):
    """Microseconds of one direction: in one launch, in one each, and frozen, the last two with the additions of dX."""

    group: str
    m: int
    backward: bool
    together: Outcome
    each: float
    frozen: float
    additions: float


def _run(simulation: Simulation) -> Outcome:
    simulation.chunk = CHUNK
    return simulation.run()


def _frozen(problem: Problem, schedule: Schedule, machine: Machine) -> float:
    """As model.frozen_baseline: by the group size that suits it best."""
    groups = (replace(schedule, group_m=group_m) for group_m in (4, 8, 16, 32))
    return min(_run(Simulation(problem, each, machine)).makespan for each in groups)


def _row(group: str, m: int, backward: bool, schedule: Schedule, machine: Machine) -> Row:
    ns = GROUPS[group]
    problem = Problem(m, sum(ns), K, RANK, backward)
    together = _run(SharedSimulation(problem, ns, as_launched(problem, schedule, machine), machine))
    alone = [replace(problem, n=n) for n in ns]
    each = sum(_run(Simulation(one, as_launched(one, schedule, machine), machine)).makespan for one in alone)
    frozen = sum(_frozen(one.frozen, schedule, machine) for one in alone)
    additions = (len(ns) - 1) * addition(m, K, machine) * backward
    return Row(group, m, backward, together, each + additions, frozen + additions, additions)


def sweep(schedule: Schedule | None = None, machine: Machine | None = None) -> list[Row]:
    """Every group, number of rows and direction."""
    schedule, machine = schedule or Schedule(), machine or Machine()
    return [_row(g, m, way, schedule, machine) for g in GROUPS for m in ROWS for way in (False, True)]


def report(rows: list[Row]) -> dict:
    """As JSON; times in µs, bytes of DRAM."""
    return {
        "command": "python -m benchmarks.schedule --projections",
        "label": LABEL,
        "rows": [
            {
                "group": row.group, "m": row.m, "backward": row.backward,
                "together_us": round(row.together.makespan, 2),
                "each_us": round(row.each, 2), "frozen_us": round(row.frozen, 2),
                "additions_us": round(row.additions, 2), "dram_bytes": row.together.dram_bytes,
            }
            for row in rows
        ],
    }  # fmt: skip


def projection_table(found: dict) -> Table:
    """A line for a group and a number of rows; ratios to the frozen layers."""
    lines = []
    for forward, backward in zip(found["rows"][::2], found["rows"][1::2], strict=True):
        cells = [forward["group"], str(forward["m"])]
        both = {name: forward[name] + backward[name] for name in ("together_us", "each_us", "frozen_us")}
        for row in (forward, backward, both):
            cells += [f"{row['frozen_us']:.0f}"]
            cells += [f"{row[name] / row['frozen_us']:.3f}" for name in ("each_us", "together_us")]
        lines.append([*cells, f"{backward['additions_us']:.0f}"])
    each = ("frozen, µs", "a launch each", "one launch")
    columns = ["projections", "M", *(f"{way}: {name}" for way in ("forward", "backward", "both") for name in each)]
    note = (
        f"Llama-3.1-8B, rank {RANK}, bf16, H200; {LABEL}. Frozen: cuBLAS's products as the model has them, with"
        " autograd's additions of dX (the last column), which a launch each pays as well; ratios to it."
    )
    return Table("Projections that share an input, by the schedule model", note, [*columns, "additions, µs"], lines)
