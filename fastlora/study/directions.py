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


def measure_directions(store: RunStore, plan: Plan, ranks: tuple[int, ...], base: nn.Module, tick: Callable) -> dict:
    """The paper's section 7.2 and 7.3 on the adapters of Wq and Wv.

    Args:
        ranks: those of the second experiment; φ compares the two largest.
        tick: called after each part, of `parts`.

    Returns:
        "ranks": φ of the two largest ranks, the mean over seeds; "seeds": φ of two seeds at the largest rank; each by
        matrix type, as `_compare` gives it, or None where there are too few adapters. "amplification": rows of the
        middle layer and means over layers, by matrix type and rank, for the first seed.

    Raises:
        CommandError: an adapter of a finished run cannot be read.
    """
    adapters = {
        (spec.rank, spec.seed): _read(store, spec)
        for spec in plan.runs
        if spec.group == KEPT_GROUP and spec.rank in ranks and _trained(store, spec)
    }
    found: dict = {"ranks": None, "seeds": None, "amplification": []}
    pair = sorted(set(ranks))[-2:]
    seeds = [seed for seed in range(plan.seeds) if all((rank, seed) in adapters for rank in pair)]
    if len(pair) == 2 and seeds:
        found["ranks"] = _compare([(adapters[pair[0], seed], adapters[pair[1], seed]) for seed in seeds])
        found["ranks"] |= {"i": f"r = {pair[0]}", "j": f"r = {pair[1]}", "pairs": len(seeds)}
    tick()
    top = [seed for seed in range(plan.seeds) if (pair[-1], seed) in adapters]
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


def parts(plan: Plan, ranks: tuple[int, ...]) -> int:
    """How often `measure_directions` calls tick, at most."""
    return 2 + len({spec.rank for spec in plan.runs if spec.group == KEPT_GROUP and spec.rank in ranks})


def _trained(store: RunStore, spec: RunSpec) -> bool:
    result = store.result(spec)
    return result is not None and result["failure"] is None


def _read(store: RunStore, spec: RunSpec) -> Adapter:
    try:
        return read_adapter(store.adapter(spec))
    except (OSError, ValueError) as error:
        path = store.adapter(spec)
        raise CommandError(f"cannot read {path}: {first_line(error)}; delete it and {path}.json") from error


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
