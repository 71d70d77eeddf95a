"""Times configurations of the Triton kernels against the table's own choice, on the machine at hand."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastlora.backends import reference
from fastlora.backends.configs import FEW_ROWS, TILE_TABLES, TileConfig, choose_config, over_packed, table_for
from fastlora.bench.cases import LayerCase
from fastlora.bench.correctness import TOLERANCE, WrongResult
from fastlora.bench.packed import decoded, sets_of
from fastlora.bench.peers import SCALING, LayerTensors
from fastlora.bench.timing import EventClock, time_rounds
from fastlora.dispatch import launch_backward, launch_forward
from fastlora.problem import BackwardOperands, ForwardOperands, Needs

# What is tried around the best tile of the table, one field at a time.
NEIGHBOURS = {
    "group_m": (4, 8, 16, 32),
    "num_stages": (2, 3, 4, 5),
    "num_warps": (4, 8),
    "fused": (True, False),
}
SURVIVORS = 3  # go on to the last, longer round
QUICK_ROUNDS, FINAL_ROUNDS = 5, 30
MIN_GAIN = 0.02  # a choice that wins by less than this is noise: the table's own stays


@dataclass(frozen=True)
class Measured:
    """A configuration, its median time in µs, or why it did not run."""

    config: TileConfig
    median_us: float | None
    error: str | None = None


@dataclass(frozen=True)
class Choice:
    """The outcome for one case and direction; ``best`` is ``table`` where nothing beat it by MIN_GAIN."""

    table: Measured
    best: Measured
    tried: int
    failed: int

    @property
    def gain(self) -> float:
        return 1 - self.best.median_us / self.table.median_us


def around(config: TileConfig) -> list[TileConfig]:
    """Configurations that differ from this one in a single field of NEIGHBOURS."""
    changed = [replace(config, **{name: value}) for name, values in NEIGHBOURS.items() for value in values]
    return [other for other in dict.fromkeys(changed) if other != config]


def make_call(backend, direction: str, tensors: LayerTensors, dropout_p: float, **config) -> Callable[[], tuple]:
    """One launch of a direction over one set of inputs; ``config=``, and over a packed weight ``in_loop=``, where it is
    not the backend's own choice."""
    t = tensors
    seed = torch.tensor(1, dtype=torch.int64) if dropout_p else None
    shared = (SCALING, dropout_p, seed)
    forward = ForwardOperands(t.x, t.weight, t.lora_a, t.lora_b, None, *shared)
    if direction == "forward":
        return lambda: launch_forward(backend, forward, **config)
    _, s = launch_forward(backend, forward)
    backward = BackwardOperands(t.dy, t.x, t.weight, t.lora_a, t.lora_b, s, *shared)
    return lambda: launch_backward(backend, backward, Needs(True, True, True, False), **config)


def check_results(found: tuple, wanted: tuple, dtype: torch.dtype) -> None:
    """Every result of a launch agrees with the reference's.

    Raises:
        WrongResult: one does not.
    """
    for value, right in zip(found, wanted, strict=True):
        if right is None:
            continue
        error = ((value.double() - right.double()).norm() / right.double().norm()).item()
        if not error <= TOLERANCE[dtype]:
            raise WrongResult(f"a result is off by {error:.2e} of its norm; rounding explains {TOLERANCE[dtype]:.0e}")


def tune_case(
    case: LayerCase, direction: str, target, backend, seconds: float, clock=None, in_loop: bool | None = None
) -> Choice:
    """Finds the fastest configuration of one case: quick rounds over the table and then around its best, and a
    longer interleaved one over the best of all. A configuration whose results are wrong counts as one that fails.

    Args:
        case: the layer, with aligned rows; direction: "forward" or "backward".
        target: compute capability and multiprocessors of the GPU (``arch``, ``n_sms``).
        backend: a module whose ``prepare`` takes ``config``.
        seconds: stop trying new configurations after this long.
        clock: EventClock by default.
        in_loop: over a packed weight, the way that decodes it; None over a dense one.

    Raises:
        RuntimeError: the table's own choice does not run.
    """
    clock = clock or EventClock()
    sets = sets_of(case, "cuda" if isinstance(clock, EventClock) else "cpu")
    size, way = case.torch_dtype.itemsize, {} if in_loop is None else {"in_loop": in_loop}
    table = choose_config(
        direction, case.m, case.n, case.k, case.r,
        arch=target.arch, n_sms=target.n_sms, element_size=size, aligned=True, dropout=case.dropout > 0,
        one_row_block=bool(in_loop),
    )  # fmt: skip
    table = table if in_loop is None else over_packed(table, size)
    wanted = make_call(reference, direction, decoded(sets[0]), case.dropout)()
    started = time.perf_counter()
    quick: dict[TileConfig, Measured] = {}

    def try_all(configs) -> list[Measured]:
        for config in configs:
            if config not in quick and (not quick or time.perf_counter() - started < seconds):
                quick[config] = _measure_one(backend, direction, sets, config, case, wanted, clock, way)
        ran = (entry for entry in quick.values() if entry.error is None)
        return sorted(ran, key=lambda entry: entry.median_us)

    ran = try_all([table, *TILE_TABLES[table_for(target.arch, case.r, size, True, case.m <= FEW_ROWS)]])
    if quick[table].error:
        raise RuntimeError(f"the table's choice for {case.label} {direction} does not run: {quick[table].error}")
    ran = try_all(around(ran[0].config))
    finalists = list(dict.fromkeys([table, *(entry.config for entry in ran[:SURVIVORS])]))
    final = _measure_together(backend, direction, sets, finalists, case.dropout, clock, way)
    best = min(final, key=lambda entry: entry.median_us)
    if best.median_us > final[0].median_us * (1 - MIN_GAIN):
        best = final[0]
    return Choice(final[0], best, len(quick), sum(entry.error is not None for entry in quick.values()))


def _measure_one(backend, direction, sets, config, case, wanted, clock, way) -> Measured:
    try:
        found = make_call(backend, direction, sets[0], case.dropout, config=config, **way)()
        check_results(found, wanted, case.torch_dtype)
        return _measure_together(backend, direction, sets, [config], case.dropout, clock, way, QUICK_ROUNDS)[0]
    except Exception as error:  # too many registers, too much shared memory: each compiler version says it differently
        return Measured(config, None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _measure_together(backend, direction, sets, configs, dropout_p, clock, way, rounds=FINAL_ROUNDS) -> list[Measured]:
    """Medians of several configurations, in turn on rotating inputs."""
    calls = [
        [make_call(backend, direction, tensors, dropout_p, config=config, **way) for tensors in sets]
        for config in configs
    ]
    times = time_rounds(calls, clock, rounds, warm_up=1)
    return [Measured(config, timing.median_us) for config, timing in zip(configs, times, strict=True)]
