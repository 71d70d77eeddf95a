"""Which runs a study consists of, and how large they are."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields

BUDGET, RANKS = "budget", "ranks"
# The matrix types of each experiment, as indices into the projections Wq, Wk, Wv, Wo.
BUDGET_GROUPS = ((0,), (1,), (2,), (3,), (0, 1), (0, 2), (0, 1, 2, 3))
RANK_GROUPS = ((0,), (0, 2), (0, 1, 2, 3))
# Its adapters are kept: the paper looks at the directions of Wq and Wv.
KEPT_GROUP = (0, 2)
SYMBOLS = ("Wq", "Wk", "Wv", "Wo")
FIRST_RANKS = range(8, 17)
_SEED_STRIDE = 1000


@dataclass(frozen=True)
class Preset:
    """Sizes of one run and the number of seeds."""

    steps: int
    batch_size: int
    block_size: int
    held_out: int
    seeds: int


PRESETS = {
    "quick": Preset(steps=16, batch_size=1, block_size=128, held_out=16, seeds=3),
    "standard": Preset(steps=200, batch_size=4, block_size=256, held_out=64, seeds=3),
    "full": Preset(steps=1000, batch_size=16, block_size=512, held_out=128, seeds=5),
}


@dataclass(frozen=True)
class StudySettings:
    """Everything that decides what a study computes.

    Attributes:
        model, text: as for fine-tuning; None and empty for the demo's.
        projections: names of the layers that are Wq, Wk, Wv, Wo.
        ranks: those of the second experiment.
        budget: trainable parameters of the first experiment; None to choose one that integer ranks meet well.
        steps, batch_size, block_size, held_out: of each run; seeds: runs of each configuration.
        alpha: the branch is scaled by alpha / rank.
        learning_rates: candidates of a study of trends, which trains at the best of them; empty for the other
            experiments, which train at learning_rate.
    """

    model: str | None = None
    text: tuple[str, ...] = ()
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    ranks: tuple[int, ...] = (1, 2, 4, 8, 64)
    budget: int | None = None
    seeds: int = PRESETS["quick"].seeds
    steps: int = PRESETS["quick"].steps
    batch_size: int = PRESETS["quick"].batch_size
    block_size: int = PRESETS["quick"].block_size
    held_out: int = PRESETS["quick"].held_out
    learning_rate: float = 2e-3
    alpha: float = 16.0
    dtype: str = "float32"
    learning_rates: tuple[float, ...] = ()

    def to_dict(self) -> dict:
        """As JSON would give it back."""
        return json.loads(json.dumps(asdict(self)))

    def differences(self, stored: dict) -> list[str]:
        """What stored runs were begun with where that is something else, as "--option value".

        Ranks, seeds and budget choose among runs and change none, so that a study may grow.
        """
        own, stored = self.to_dict(), {**StudySettings().to_dict(), **stored}
        names = [field.name for field in fields(self) if field.name not in ("ranks", "seeds", "budget")]
        return [
            f"--{name.replace('_', '-')} {_option_text(stored[name])}" for name in names if own[name] != stored[name]
        ]


def _option_text(value: object) -> str:
    if isinstance(value, list):
        return ",".join(map(str, value)) or "(none)"
    return "(none)" if value is None else str(value)


@dataclass(frozen=True)
class RunSpec:
    """One training run: LoRA of one rank on some of the projections, from one seed.

    Attributes:
        learning_rate: the run's own, where it is not the study's.
    """

    group: tuple[int, ...]
    rank: int
    seed: int
    learning_rate: float | None = None

    @property
    def label(self) -> str:
        return group_label(self.group)

    @property
    def key(self) -> str:
        """A file name."""
        rate = "" if self.learning_rate is None else f"-lr{self.learning_rate:g}"
        return f"{self.label}-r{self.rank}-s{self.seed}{rate}"

    @property
    def data_seed(self) -> int:
        """Decides the batches, the same for every configuration. Far apart, since each epoch adds one."""
        return self.seed * _SEED_STRIDE

    @property
    def start_seed(self) -> int:
        """Decides the initial A, another for every configuration: equal starts would look alike after training."""
        mask = sum(1 << index for index in self.group)
        return (self.seed * _SEED_STRIDE + self.rank) * len(SYMBOLS) ** 2 + mask + 1

    @property
    def kept(self) -> bool:
        """Whether its adapter is stored."""
        return self.group == KEPT_GROUP


@dataclass(frozen=True)
class Plan:
    """A study's runs.

    Attributes:
        costs: parameters that one rank adds to each projection, over all layers.
        budget: trainable parameters that the first experiment aims at.
        experiments: the (group, rank) pairs of each experiment.
        seeds: runs of each pair.
    """

    costs: tuple[int, ...]
    budget: int
    experiments: dict[str, list[tuple[tuple[int, ...], int]]]
    seeds: int

    @property
    def count(self) -> int:
        return len(self.runs)

    @property
    def aim(self) -> str:
        """What the runs share, in words."""
        return f"budget {self.budget:,} parameters"

    @property
    def runs(self) -> list[RunSpec]:
        """Each run once, one seed after the other: what an interrupted study has is complete for the first seeds."""
        pairs = dict.fromkeys(pair for experiment in self.experiments.values() for pair in experiment)
        return [RunSpec(group, rank, seed) for seed in range(self.seeds) for group, rank in pairs]

    def further_runs(self, result: Callable[[RunSpec], dict | None]) -> list[RunSpec]:
        """Those that the first ones' results decide: none."""
        return []

    def kept_steps(self, steps: int) -> list[int]:
        """After which of its steps a run is measured and its adapter kept: the last."""
        return [steps]

    def parameters(self, group: tuple[int, ...], rank: int) -> int:
        return rank * group_cost(self.costs, group)


def make_plan(settings: StudySettings, costs: tuple[int, ...]) -> Plan:
    """The two experiments of the paper's sections 7.1 and 7.2 on a model whose projections cost this much a rank."""
    budget = settings.budget or default_budget(costs)
    return Plan(
        costs,
        budget,
        {
            BUDGET: [(group, rank_for(budget, group_cost(costs, group))) for group in BUDGET_GROUPS],
            RANKS: [(group, rank) for group in RANK_GROUPS for rank in settings.ranks],
        },
        settings.seeds,
    )


def group_label(group: tuple[int, ...]) -> str:
    """What the paper calls the group, Wq+Wv say."""
    return "+".join(SYMBOLS[index] for index in group)


def group_cost(costs: tuple[int, ...], group: tuple[int, ...]) -> int:
    """Parameters that one rank adds to these projections."""
    return sum(costs[index] for index in group)


def rank_for(budget: int, cost: int) -> int:
    """The rank, at least 1, whose parameters come closest to the budget; the smaller of two equally close ones."""
    below = max(1, budget // cost)
    return below if abs(budget - below * cost) <= abs((below + 1) * cost - budget) else below + 1


def default_budget(costs: tuple[int, ...]) -> int:
    """The budget of Wq at a rank from 8 (the paper's) to 16 that the other groups' integer ranks meet most closely."""

    def misfit(rank: int) -> float:
        budget = rank * costs[0]
        spent = [rank_for(budget, cost) * cost for cost in (group_cost(costs, group) for group in BUDGET_GROUPS)]
        return max(abs(value / budget - 1) for value in spent)

    return min(FIRST_RANKS, key=misfit) * costs[0]
