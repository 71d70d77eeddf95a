"""Discrete-event model of the one-launch schedule: what a group size, or who makes S, should cost.

It models: CTAs that claim tiles in queue order; loads one chunk of K ahead of the product; an LRU L2 over those chunks
with write-back; first-come-first-served DRAM and L2 bandwidth and a per-SM load bandwidth; flags, and the fixed-order
sum of gradient parts. It does not model bank conflicts, clocks that fall under load, or cuBLAS: what it prints is a
model's answer, never a measurement.
"""

import heapq
import math
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import count

from benchmarks.schedule.machine import Machine
from benchmarks.schedule.queue_order import Schedule, Tile, build_queue, cdiv
from benchmarks.schedule.row_map import RowMap, one_segment

LABEL = "model, not a measurement"
MAX_STEPS = 8_000  # K chunks grow until one run has about this many events, so that most shapes take seconds
MAX_TILES = 1_000_000  # a minute
DRAWN_COLUMNS = 16  # of dX, whose mask the CUDA kernels draw in a step of its product


@dataclass(frozen=True)
class Problem:
    """One launch: M tokens, N out_features, K in_features, R rank (0: the frozen GEMM alone), and its direction."""

    m: int
    n: int
    k: int
    r: int
    backward: bool = False
    dropout: bool = False

    def __post_init__(self):
        if min(self.m, self.n, self.k) < 1 or self.r < 0:
            raise ValueError(f"sizes must be positive, got M {self.m}, N {self.n}, K {self.k}, R {self.r}")

    @property
    def reduction(self) -> int:
        return self.n if self.backward else self.k

    @property
    def width(self) -> int:
        return self.k if self.backward else self.n

    @property
    def frozen(self) -> "Problem":
        return replace(self, r=0, dropout=False)


@dataclass(frozen=True)
class Outcome:
    """makespan, stall (mean per SM, waiting on flags) in µs; bytes between DRAM and L2; tiles in the queue."""

    makespan: float
    stall: float
    dram_read: int
    dram_written: int
    tiles: int

    @property
    def dram_bytes(self) -> int:
        return self.dram_read + self.dram_written


class Memory:
    """L2 (least recently used chunks leave first, dirty ones written back) and DRAM, each with a queue of requests."""

    def __init__(self, machine: Machine):
        self.machine = machine
        self.lines: OrderedDict[tuple, tuple[int, bool]] = OrderedDict()
        self.held = self.read = self.written = 0
        self.dram_free = self.l2_free = 0.0

    def access(self, now: float, chunks: list[tuple[tuple, int, bool]], port_bytes: float) -> float:
        """When all of ``chunks`` (key, bytes, is a write) have arrived, asked for at ``now`` through one SM's port."""
        moved = 0
        for key, size, write in chunks:
            known = self.lines.get(key)
            if known is None:
                moved += self._insert(key, size, write)
            else:
                self.lines.move_to_end(key)
                if write and not known[1]:
                    self.lines[key] = (size, True)
        machine = self.machine
        self.l2_free = max(self.l2_free, now) + port_bytes / machine.l2_bandwidth
        done = max(self.l2_free, now + port_bytes / machine.sm_bandwidth)
        if moved:
            self.dram_free = max(self.dram_free, now) + moved / machine.dram_bandwidth
            done = max(done, self.dram_free)
        return done

    def _insert(self, key: tuple, size: int, write: bool) -> int:
        moved = 0 if write else size
        self.read += moved
        self.lines[key] = (size, write)
        self.held += size
        while self.held > self.machine.l2_bytes:
            old, dirty = self.lines.popitem(last=False)[1]
            self.held -= old
            if dirty:
                self.written += old
                moved += old
        return moved

    def flush(self) -> None:
        """Counts what is still dirty; it goes out after the launch, so it takes no time here."""
        self.written += sum(size for size, dirty in self.lines.values() if dirty)
        self.lines.clear()


class Simulation:
    """One launch over a queue. Every SM is a process that loads, as the loading warp does, and keeps the time at which
    its math warps are free. A process yields a time to sleep until, or a signal to wait for."""

    def __init__(self, problem: Problem, schedule: Schedule, machine: Machine, row_map: RowMap | None = None):
        self.problem, self.schedule, self.machine = problem, schedule, machine
        rows, columns = cdiv(problem.m, schedule.block_m), cdiv(problem.width, schedule.block_n)
        if rows * columns > MAX_TILES:
            raise ValueError(f"{rows} x {columns} tiles are more than the {MAX_TILES} that can be modelled")
        self.row_map = row_map or one_segment(problem.m, schedule)
        if sum(block.rows for block in self.row_map.blocks) != problem.m:
            raise ValueError(f"the row blocks must hold the {problem.m} rows of the problem")
        rows = len(self.row_map.blocks)
        self.shrink_width = problem.r if schedule.fused else min(problem.r, schedule.shrink_width)
        self.shrink = cdiv(problem.r, self.shrink_width) if problem.r else 0
        self.rank = self.sum_rank = cdiv(problem.r, 16) * 16  # of S in a tile; of a gradient tile
        wanted = problem.backward and problem.r
        grads = tuple(cdiv(size, schedule.grad_columns) if wanted else 0 for size in (problem.n, problem.k))
        parts = len(self.row_map.chunks)
        self.queue = build_queue(rows, columns, self.shrink, grads, schedule, machine.sm_count, parts)
        steps = cdiv(problem.reduction, schedule.block_k)
        self.chunk = schedule.block_k * min(max(4, cdiv(rows * columns * steps, MAX_STEPS)), steps)
        self.sm_flops = machine.flops / machine.sm_count
        self.memory = Memory(machine)
        self.now = self.stalled = 0.0
        self.busy = [0.0] * machine.sm_count
        self.claimed = 0
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = count()
        self.signals: dict[tuple, float] = {}
        self.waiting: dict[tuple, list] = defaultdict(list)

    def run(self) -> Outcome:
        for sm in range(self.machine.sm_count):
            self._resume(self._worker(sm))
        while self.events:
            self.now, _, action = heapq.heappop(self.events)
            action()
        if any(self.waiting.values()):
            raise RuntimeError("the queue deadlocks: a tile waits on one that nobody will run")
        self.memory.flush()
        return Outcome(
            makespan=max(self.busy) * 1e6,
            stall=self.stalled / self.machine.sm_count * 1e6,
            dram_read=self.memory.read,
            dram_written=self.memory.written,
            tiles=len(self.queue),
        )

    def _at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.events, (when, next(self.order), action))

    def _resume(self, process: Generator) -> None:
        request = next(process, None)
        if request is None:
            return
        if isinstance(request, float):
            self._at(request, partial(self._resume, process))
        elif request in self.signals:
            self._at(max(self.now, self.signals[request]), partial(self._resume, process))
        else:
            self.waiting[request].append(process)

    def _signal(self, key: tuple, when: float) -> None:
        """From ``when`` on, nobody waits for ``key`` any more."""
        self.signals[key] = when
        for process in self.waiting.pop(key, []):
            self._at(max(self.now, when), partial(self._resume, process))

    def _worker(self, sm: int) -> Generator:
        while self.claimed < len(self.queue):
            tile = self.queue[self.claimed]
            self.claimed += 1
            if tile.kind in ("dA", "dB"):
                yield from self._gradient(sm, tile)
            else:
                yield from self._product(sm, tile)
            if not self.schedule.overlap:
                yield self.busy[sm]

    def _load(self, sm: int, loads: list, port_bytes: float, seconds: float, first: bool = False) -> float:
        """Asks for a chunk now and computes on it after the one before; returns when that computation starts."""
        arrived = self.memory.access(self.now, loads, port_bytes) + (self.machine.load_latency if first else 0.0)
        start = max(arrived, self.busy[sm])
        self.busy[sm] = start + seconds
        return start

    def _product(self, sm: int, tile: Tile) -> Generator:
        schedule, machine, problem = self.schedule, self.machine, self.problem
        width = self._slice_width(tile)
        separate = width > 0 and not schedule.fused
        columns = 0 if separate else schedule.block_n
        columns += max(width, machine.shrink_floor) if width else 0
        block = self.row_map.blocks[tile.block]
        steps = self._steps(tile)
        for chunk, depth in steps:
            act, weight, down = (size * depth * 2 for size in (*self._extent(tile), width))
            loads = [(("act", tile.block, chunk), act, False)]
            if separate:
                weight = 0
            else:
                loads.append((("weight", block.expert, tile.column, chunk), weight, False))
            if width:
                loads.append((("down", block.expert, tile.column, chunk), down, False))
            seconds = 2 * schedule.block_m * columns * depth / self.sm_flops
            if width and problem.dropout and not problem.backward:
                drawn = schedule.block_m * depth * machine.philox
                if not separate and schedule.overlap:  # the base product is in flight meanwhile
                    drawn = max(0.0, drawn - 2 * schedule.block_m * schedule.block_n * depth / self.sm_flops)
                seconds += drawn
            port_bytes = block.loaded * depth * 2 + weight / schedule.cluster + down
            yield self._load(sm, loads, port_bytes, seconds, first=chunk == steps[0][0])
        if width:
            made = self._made(tile)
            self._at(self.busy[sm], partial(self._store, sm, [(("S", tile.block), made, True)], made))
            self._signal(("S", tile.block, tile.column), self.busy[sm] + machine.tile_overhead + machine.flag_latency)
        if separate:
            self.busy[sm] += machine.tile_overhead
            return
        if problem.r:
            if not width:
                for column in self._awaited(tile):
                    yield ("S", tile.block, column)
                self.stalled += max(0.0, self.now - self.busy[sm])
            self._expand(sm, tile, reads_s=not width)
        self.busy[sm] += machine.tile_overhead
        size = 2 * math.prod(self._extent(tile))
        store = partial(self._store, sm, [(("out", tile.block, tile.column), size, True)], size)
        self._at(self.busy[sm], store)
        if not schedule.overlap:
            yield self.busy[sm]

    def _store(self, sm: int, chunks: list, size: int) -> None:
        done = self.memory.access(self.now, chunks, size)
        if not self.schedule.overlap:
            self.busy[sm] = max(self.busy[sm], done)

    def _expand(self, sm: int, tile: Tile, reads_s: bool) -> None:
        schedule = self.schedule
        s, up = (size * self.rank * 2 for size in self._extent(tile))
        seconds = 2 * schedule.block_m * schedule.block_n * self.rank / self.sm_flops
        if self.problem.dropout and self.problem.backward:
            # A call a step, for DRAWN_COLUMNS, is made while products are in flight, which last longer.
            hidden = DRAWN_COLUMNS * cdiv(self.problem.reduction, schedule.block_k) if schedule.overlap else 0
            seconds += schedule.block_m * max(0, schedule.block_n - hidden) * self.machine.philox
        expert = self.row_map.blocks[tile.block].expert
        loads = [(("up", expert, tile.column), up, False)] + [(("S", tile.block), s, False)] * reads_s
        self._load(sm, loads, up + s * reads_s, seconds)

    def _steps(self, tile: Tile) -> list[tuple[int, int]]:
        """The chunks that a tile contracts, and their depths."""
        total = self.problem.reduction
        return [(chunk, min(self.chunk, total - first)) for chunk, first in enumerate(range(0, total, self.chunk))]

    def _made(self, tile: Tile) -> int:
        """Bytes of S that are written with a shrink tile: all of them with the first."""
        return self._extent(tile)[0] * self.rank * 2 if tile.column == 0 else 0

    def _awaited(self, tile: Tile) -> Iterable[int]:
        """The shrink columns whose S a tile reads."""
        return range(self.shrink)

    def _gradient_width(self, tile: Tile) -> int:
        """Columns of X or dY that a gradient tile covers."""
        total, width = self.problem.k if tile.kind == "dA" else self.problem.n, self.schedule.grad_columns
        return min(width, total - tile.column * width)

    def _extent(self, tile: Tile) -> tuple[int, int]:
        """Rows and columns of the output that this tile covers, less at the edges."""
        schedule, problem = self.schedule, self.problem
        rows = self.row_map.blocks[tile.block].rows
        return rows, max(0, min(schedule.block_n, problem.width - tile.column * schedule.block_n))

    def _slice_width(self, tile: Tile) -> int:
        """Columns of S that this tile makes, to a multiple of 8."""
        if tile.kind != "shrink":
            return 0
        return cdiv(min(self.shrink_width, self.problem.r - tile.column * self.shrink_width), 8) * 8

    def _gradient(self, sm: int, tile: Tile) -> Generator:
        """Sums over a part of M, then adds the part to the others'; or stores zeros, over nothing."""
        schedule, machine = self.schedule, self.machine
        chunk = self.row_map.chunks[tile.block]
        width, rank = self._gradient_width(tile), self.sum_rank
        size = width * rank * 4
        if not chunk.blocks:
            self.busy[sm] = max(self.busy[sm], self.now) + machine.tile_overhead
            stored = chunk.zeroed * size
            self._at(self.busy[sm], partial(self._store, sm, [(("zeros", *tile), stored, True)], stored))
            yield self.busy[sm]
            return
        for block in chunk.blocks:
            rows, loaded, summed, _ = self.row_map.blocks[block]
            seconds = 2 * summed * schedule.grad_columns * max(rank, machine.shrink_floor) / self.sm_flops
            if self.problem.dropout and tile.kind == "dA":
                seconds += summed * schedule.grad_columns * machine.philox
            left, right = rows * width * 2, rows * rank * 2
            port_bytes = min(loaded, summed) * (width + rank) * 2
            if tile.kind == "dA":
                before = self.now
                for column in self._awaited(tile):
                    yield ("S", block, column)
                self.stalled += self.now - max(before, min(self.now, self.busy[sm]))
                loads = [(("X", block, tile.column), left, False), (("S", block), right, False)]
            else:  # dY is this launch's act: the same bytes, met again
                loads = [(("act", block, c), rows * self.chunk * 2, False) for c in self._chunks(tile.column)]
                loads.append((("saved S", block), right, False))
            yield self._load(sm, loads, port_bytes, seconds, first=block == chunk.blocks[0])
        yield from self._add_part(sm, ("sum", tile.kind, chunk.expert, tile.column), chunk.place, size)
        self.busy[sm] += machine.tile_overhead

    def _chunks(self, column: int) -> range:
        """The chunks of act that hold a gradient tile's columns of dY."""
        width = self.schedule.grad_columns
        last = min((column + 1) * width, self.problem.reduction) - 1
        return range(column * width // self.chunk, last // self.chunk + 1)

    def _add_part(self, sm: int, key: tuple, place: int, size: int) -> Generator:
        """Adds this part to the running fp32 sum (the first part only writes it), then lets the next part go."""
        if place:
            yield (*key, place - 1)
            self.stalled += max(0.0, self.now - self.busy[sm])
        self.busy[sm] = max(self.busy[sm], self.now)
        yield self.busy[sm]
        for write in (False, True) if place else (True,):
            self.busy[sm] = self.memory.access(self.now, [(key, size, write)], size)
            yield self.busy[sm]
        self._signal((*key, place), self.now + self.machine.flag_latency)


def simulate(
    problem: Problem, schedule: Schedule, machine: Machine | None = None, row_map: RowMap | None = None
) -> Outcome:
    """Runs one launch through the model; without a ``row_map`` its rows are one segment."""
    return Simulation(problem, schedule, machine or Machine(), row_map).run()


def frozen_baseline(problem: Problem, schedule: Schedule, machine: Machine | None = None) -> Outcome:
    """The same GEMM without the branch at the group size that suits it best: what the branch is compared with."""
    groups = (1, 2, 4, 8, 16, 32)
    return min(
        (simulate(problem.frozen, replace(schedule, group_m=g), machine) for g in groups),
        key=lambda outcome: outcome.makespan,
    )
