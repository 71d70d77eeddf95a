"""What the study's kept adapters learned: φ between ranks and between seeds, and the amplification table."""

from collections.abc import Callable

import numpy as np
from torch import nn

from fastlora.adapters.files import AdapterLayer, read_adapter
from fastlora.analysis import subspace_similarity
from fastlora.analysis.layers import analyze_layers, layer_number, matrix_type
from fastlora.analysis.tables import mean_of, middle, types_of
from fastlora.errors import CommandError, first_line
from fastlora.study.plan import KEPT_GROUP, Plan, RunSpec
from fastlora.study.store import RunStore

DIGITS = 5  # that similarities are stored to

Adapter = dict[str, AdapterLayer]
Adapters = dict[tuple[int, int], Adapter]  # by rank and seed


def measure_directions(store: RunStore, plan: Plan, ranks: tuple[int, ...], base: nn.Module, tick: Callable) -> dict:
    """The paper's section 7.2 and 7.3 on the adapters of Wq and Wv.

    Args:
        ranks: those of the second experiment; φ compares the two largest.
        tick: called after each part, of `parts`.

    Returns:
        As `compare_adapters`.

    Raises:
        CommandError: an adapter of a finished run cannot be read.
    """
    chosen = [spec for spec in plan.runs if spec.group == KEPT_GROUP and spec.rank in ranks]
    return compare_adapters(read_adapters(store, chosen), base, tick)


def read_adapters(store: RunStore, specs: list[RunSpec], step: int | None = None) -> Adapters:
    """The adapters of those runs that did not diverge, by rank and seed; with a step, as they were after so many.

    Raises:
        CommandError: one of them cannot be read.
    """
    return {(spec.rank, spec.seed): _read(store, spec, step) for spec in specs if _trained(store, spec)}


def compare_adapters(adapters: Adapters, base: nn.Module, tick: Callable) -> dict:
    """φ between ranks and between seeds, and the amplification.

    Args:
        base: the model whose weights were frozen.
        tick: called after each part, of `parts`.

    Returns:
        "ranks": φ of the two largest ranks, the mean over seeds that have both; "seeds": φ of two seeds at the largest
        rank; each by matrix type, as `_compare` gives it, or None where there are too few adapters. "amplification":
        rows of the middle layer and means over layers, by matrix type and rank, for the first seed.
    """
    found: dict = {"ranks": None, "seeds": None, "amplification": []}
    pair = sorted({rank for rank, _ in adapters})[-2:]
    seeds = sorted({seed for _, seed in adapters})
    both = [seed for seed in seeds if all((rank, seed) in adapters for rank in pair)]
    if len(pair) == 2 and both:
        found["ranks"] = _compare([(adapters[pair[0], seed], adapters[pair[1], seed]) for seed in both])
        found["ranks"] |= {"i": f"r = {pair[0]}", "j": f"r = {pair[1]}", "pairs": len(both)}
    tick()
    top = [seed for seed in seeds if pair and (pair[-1], seed) in adapters]
    if len(top) >= 2:
        found["seeds"] = _compare([(adapters[pair[-1], top[0]], adapters[pair[-1], top[1]])])
        found["seeds"] |= {"i": f"r = {pair[-1]}, seed {top[0]}", "j": f"r = {pair[-1]}, seed {top[1]}", "pairs": 1}
    tick()
    modules = dict(base.named_modules())
    for (rank, seed), layers in sorted(adapters.items()):
        if seed == 0:
            weights = {path: modules[path].weight.detach().to(layer.lora_a.device) for path, layer in layers.items()}
            found["amplification"] += _amplification(rank, analyze_layers(layers, weights))
            tick()
    return found


def parts(ranks: tuple[int, ...]) -> int:
    """How often `compare_adapters` calls tick, at most."""
    return 2 + len(ranks)


def _trained(store: RunStore, spec: RunSpec) -> bool:
    result = store.result(spec)
    return result is not None and result["failure"] is None


def _read(store: RunStore, spec: RunSpec, step: int | None) -> Adapter:
    path = store.adapter(spec, step)
    try:
        return read_adapter(path)
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read {path}: {first_line(error)}; delete {store.adapter(spec)}.json") from error


def _compare(pairs: list[tuple[Adapter, Adapter]]) -> dict:
    """φ of A and of B by matrix type: in the middle layer, and the mean over all layers; means over the pairs.

    "sizes" are the dimensions of the spaces that A's and B's directions lie in, for `random_similarity`.
    """
    by_type: dict[str, list[str]] = {}
    for path in pairs[0][0]:
        by_type.setdefault(matrix_type(path), []).append(path)
    types = {}
    for kind, paths in by_type.items():
        tables = {path: _mean_similarity([(x[path], y[path]) for x, y in pairs]) for path in paths}
        central = paths[len(paths) // 2]
        layer = pairs[0][0][central]
        types[kind] = {
            "middle": {"path": central, "layer": layer_number(central), **_listed(tables[central])},
            "mean": _listed({side: np.mean([table[side] for table in tables.values()], axis=0) for side in "ab"}),
            "sizes": {"a": layer.lora_a.shape[1], "b": layer.lora_b.shape[0]},
            "layers": len(paths),
        }
    return {"types": types}


def _mean_similarity(pairs: list[tuple[AdapterLayer, AdapterLayer]]) -> dict[str, np.ndarray]:
    a = [subspace_similarity(x.lora_a, y.lora_a).numpy() for x, y in pairs]
    b = [subspace_similarity(x.lora_b, y.lora_b, side="left").numpy() for x, y in pairs]
    return {"a": np.mean(a, axis=0), "b": np.mean(b, axis=0)}


def _listed(tables: dict[str, np.ndarray]) -> dict[str, list]:
    return {side: np.round(table, DIGITS).tolist() for side, table in tables.items()}


def _amplification(rank: int, rows: list[dict]) -> list[dict]:
    """One entry a matrix type."""
    entries = []
    for kind, members in types_of(rows).items():
        fields = members[0]["amplification"]
        entries.append(
            {
                "type": kind,
                "rank": rank,
                "layer": middle(members)["layer"],
                "middle": middle(members)["amplification"],
                "mean": {name: mean_of([row["amplification"][name] for row in members]) for name in fields},
                "effective_rank": mean_of([row["effective_rank"] for row in members]),
            }
        )
    return entries
