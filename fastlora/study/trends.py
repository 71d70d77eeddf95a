"""What adapters learn through their training: φ, amplification, held-out loss after 16, 64, 256, ... steps."""

from collections.abc import Callable

from torch import nn

from fastlora.analysis import random_similarity
from fastlora.study.directions import compare_adapters, parts, read_adapters
from fastlora.study.plan import RunSpec
from fastlora.study.store import RunStore
from fastlora.study.trend_plan import TrendPlan


def trend_parts(plan: TrendPlan, steps: int) -> int:
    """How often `measure_trends` calls tick, at most."""
    return len(plan.kept_steps(steps)) * parts(plan.ranks)


def measure_trends(store: RunStore, plan: TrendPlan, steps: int, base: nn.Module, tick: Callable) -> dict:
    """Every kept step of a finished study of trends.

    Returns:
        "rates": a dictionary a candidate: learning_rate, rank, states (of the run, as stored), failure; "rate": the
        one that was chosen. "runs": rank, seed and states of each run at that rate. "points": a dictionary a kept step:
        step, "similarity", φ as numbers (see `_similarity_rows`), "amplification" as in `compare_adapters`.
        "directions": `compare_adapters` of the last step.

    Raises:
        CommandError: an adapter of a finished run cannot be read.
    """
    rate = plan.chosen_rate(store.result)
    specs = [spec for spec in plan.runs + plan.further_runs(store.result) if spec.learning_rate == rate]
    points, directions = [], {}
    for step in plan.kept_steps(steps):
        directions = compare_adapters(read_adapters(store, specs, None if step == steps else step), base, tick)
        points.append(
            {
                "step": step,
                "similarity": _similarity_rows(directions),
                "amplification": directions["amplification"],
            }
        )
    results = {spec: store.result(spec) or {} for spec in plan.runs + specs}
    return {
        "rates": [_rate(spec, results[spec]) for spec in plan.runs],
        "rate": rate,
        "runs": [{"rank": spec.rank, "seed": spec.seed, "states": results[spec]["states"]} for spec in specs],
        "points": points,
        "directions": directions,
    }


def _rate(spec: RunSpec, result: dict) -> dict:
    names = ("states", "failure")
    return {"learning_rate": spec.learning_rate, "rank": spec.rank, **{name: result[name] for name in names}}


def _similarity_rows(directions: dict) -> list[dict]:
    """One entry a pair of adapters, matrix type and factor: φ(1, 1) and φ(r, r), r the smaller rank, as means over the
    layers and in the middle layer, and what independent random directions give."""
    rows = []
    for pair in ("ranks", "seeds"):
        compared = directions[pair]
        for kind, tables in (compared or {"types": {}})["types"].items():
            for side in "ab":
                mean, middle = tables["mean"][side], tables["middle"][side]
                last = min(len(mean), len(mean[0])) - 1
                chance = random_similarity(len(mean), len(mean[0]), tables["sizes"][side])
                rows.append(
                    {
                        "pair": pair,
                        "type": kind,
                        "side": side,
                        "first": mean[0][0],
                        "first_middle": middle[0][0],
                        "first_chance": chance[0, 0].item(),
                        "all": mean[last][last],
                        "all_chance": chance[last, last].item(),
                    }
                )
    return rows
