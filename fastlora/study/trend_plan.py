"""The runs of a study of trends: a few adapters of Wq and Wv, trained long and looked at on the way."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from fastlora.study.plan import KEPT_GROUP, RunSpec, StudySettings

TREND_RANKS = (4, 8, 64)
LEARNING_RATES = (5e-4, 2e-3, 8e-3)
FIRST_KEPT, KEPT_RATIO = 16, 4
_PAIR = 2


@dataclass(frozen=True)
class TrendPlan:
    """Every rank from the first seed, and the largest from the others, at the learning rate that serves best.

    The second largest rank is trained at each candidate. The one with the lowest held-out loss decides the rate of all
    other runs, which are known only then.

    Attributes:
        costs: parameters that one rank adds to each projection, over all layers.
        ranks: in rising order.
        seeds: runs of the largest rank.
        learning_rates: the candidates.
    """

    costs: tuple[int, ...]
    ranks: tuple[int, ...]
    seeds: int
    learning_rates: tuple[float, ...]

    @property
    def count(self) -> int:
        return len(self.learning_rates) + len(self.others(0.0))

    @property
    def aim(self) -> str:
        """What the runs share, in words."""
        return f"the best of the learning rates {', '.join(f'{rate:g}' for rate in self.learning_rates)}"

    @property
    def pilot_rank(self) -> int:
        """The rank that is trained at every candidate."""
        return self.ranks[-_PAIR:][0]

    @property
    def runs(self) -> list[RunSpec]:
        """One for each candidate."""
        return [RunSpec(KEPT_GROUP, self.pilot_rank, 0, rate) for rate in self.learning_rates]

    def others(self, rate: float) -> list[RunSpec]:
        """The other runs, the largest rank first: it takes longest and is compared most."""
        first = [rank for rank in reversed(self.ranks) if rank != self.pilot_rank]
        seeds = range(1, self.seeds)
        return [RunSpec(KEPT_GROUP, rank, 0, rate) for rank in first] + [
            RunSpec(KEPT_GROUP, self.ranks[-1], seed, rate) for seed in seeds
        ]

    def chosen_rate(self, result: Callable[[RunSpec], dict | None]) -> float | None:
        """The candidate with the lowest held-out loss; None before all have ended, or if every one diverged."""
        losses = {}
        for spec in self.runs:
            found = result(spec)
            if found is None:
                return None
            loss = found["held_out_loss"]
            losses[spec.learning_rate] = math.inf if loss is None else loss
        best = min(losses, key=lambda rate: losses[rate])
        return best if losses[best] < math.inf else None

    def further_runs(self, result: Callable[[RunSpec], dict | None]) -> list[RunSpec]:
        """Those that the candidates' results decide."""
        rate = self.chosen_rate(result)
        return [] if rate is None else self.others(rate)

    def kept_steps(self, steps: int) -> list[int]:
        """After which of its steps a run is measured and its adapter kept: 16, then four times as many, the last."""
        kept, step = [], FIRST_KEPT
        while step < steps:
            kept.append(step)
            step *= KEPT_RATIO
        return [*kept, steps]


def make_trend_plan(settings: StudySettings, costs: tuple[int, ...]) -> TrendPlan:
    """The runs of settings with candidate learning rates."""
    return TrendPlan(costs, tuple(sorted(settings.ranks)), settings.seeds, settings.learning_rates)
