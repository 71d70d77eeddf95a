"""Times configurations of the Triton kernels against the table's own choice, on the machine at hand."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastlora.bench.cases import LayerCase
from fastlora.bench.layer import input_sets
from fastlora.bench.peers import SCALING, LayerTensors
from fastlora.bench.timing import EventClock, summarise
from fastlora.configs import TileConfig, choose_config

TILES = ((128, 256, 64), (128, 128, 64), (256, 128, 64), (64, 256, 64), (128, 64, 64), (64, 128, 64), (64, 64, 64))
SMALL_TILES = ((16, 64, 128), (16, 128, 128), (32, 64, 128), (32, 128, 64))
SMALL_M = 64
GROUPS = (4, 8, 16)
SURVIVORS = 3  # go on to the second, longer round
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


def candidates(table: TileConfig, m: int) -> list[TileConfig]:
    """The table's choice first, then tiles, warps and stages around it, then its own tile with other groups."""
    tiles = SMALL_TILES + TILES[3:] if m <= SMALL_M else TILES
    found = [table]
    for (block_m, block_n, block_k), stages in itertools.product(tiles, (3, 4)):
        warps = 8 if block_m * block_n >= 128 * 128 else 4
        tile = replace(table, block_m=block_m, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages)
        found.append(tile)
    found += [replace(table, group_m=group) for group in GROUPS]
    return list(dict.fromkeys(found))


def make_call(
    launchers, direction: str, tensors: LayerTensors, config: TileConfig, dropout_p: float
) -> Callable[[], None]:
    """One launch of a direction over one set of inputs."""
    from fastlora.reference import Needs

    t = tensors
    seed = torch.tensor(1, dtype=torch.int64) if dropout_p else None
    if direction == "forward":
        return lambda: launchers.lora_forward(
            t.x, t.weight, t.lora_a, t.lora_b, None, SCALING, dropout_p, seed, config=config
        )
    _, s = launchers.lora_forward(t.x, t.weight, t.lora_a, t.lora_b, None, SCALING, dropout_p, seed)
    needs = Needs(True, True, True, False)
    return lambda: launchers.lora_backward(
        t.dy, t.x, t.weight, t.lora_a, t.lora_b, s, SCALING, dropout_p, seed, needs, config=config
    )


def tune_case(case: LayerCase, direction: str, arch: int, launchers, seconds: float, clock=None) -> Choice:
    """Finds the fastest configuration of one case: a quick round over all, a longer interleaved one over the best.

    Args:
        case: the layer; direction: "forward" or "backward"; arch: compute capability as 90.
        launchers: a module with lora_forward and lora_backward that take ``config``.
        seconds: stop trying new configurations after this long.
        clock: EventClock by default.

    Raises:
        RuntimeError: the table's own choice does not run.
    """
    clock = clock or EventClock()
    sets = input_sets(case, "cuda" if isinstance(clock, EventClock) else "cpu")
    m, n, k, r = case.m, case.n, case.k, case.r
    table = choose_config(direction, arch, m, n, k, r, case.torch_dtype, case.dropout > 0)
    started, quick = time.perf_counter(), []
    for config in candidates(table, m):
        if quick and time.perf_counter() - started > seconds:
            break
        quick.append(_measure_one(launchers, direction, sets, config, case.dropout, clock))
    if quick[0].error:
        raise RuntimeError(f"the table's choice for {case.label} {direction} does not run: {quick[0].error}")
    ran = sorted((entry for entry in quick if entry.error is None), key=lambda entry: entry.median_us)
    finalists = list(dict.fromkeys([table, *(entry.config for entry in ran[:SURVIVORS])]))
    final = _measure_together(launchers, direction, sets, finalists, case.dropout, clock)
    best = min(final, key=lambda entry: entry.median_us)
    if best.median_us > final[0].median_us * (1 - MIN_GAIN):
        best = final[0]
    return Choice(final[0], best, len(quick), sum(entry.error is not None for entry in quick))


def _measure_one(launchers, direction, sets, config, dropout_p, clock) -> Measured:
    try:
        return _measure_together(launchers, direction, sets, [config], dropout_p, clock, QUICK_ROUNDS)[0]
    except Exception as error:  # too many registers, too much shared memory: each compiler version says it differently
        return Measured(config, None, f"{type(error).__name__}: {' '.join(str(error).split())[:160]}")


def _measure_together(launchers, direction, sets, configs, dropout_p, clock, rounds=FINAL_ROUNDS) -> list[Measured]:
    """Medians of several configurations, in turn on rotating inputs."""
    calls = [[make_call(launchers, direction, tensors, config, dropout_p) for tensors in sets] for config in configs]
    samples: list[list] = [[] for _ in configs]
    for index in range(rounds + 1):
        for which, versions in enumerate(calls):
            start = clock.mark()
            versions[index % len(sets)]()
            samples[which].append((start, clock.mark()))
    clock.finish()
    times = [[clock.elapsed_us(*marks) for marks in spans[1:]] for spans in samples]
    return [
        Measured(config, summarise(values, clock.method).median_us)
        for config, values in zip(configs, times, strict=True)
    ]
