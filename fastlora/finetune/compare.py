"""Whether two runs from the same start, over the same batches, gave the same losses."""

import math
from dataclasses import dataclass

from fastlora.finetune.settings import Settings

LOSS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Agreement:
    """Two loss curves side by side.

    Attributes:
        max_difference: largest |difference| over all steps, reached at `worst_step` (from 1).
        same_seed_start: both drew the same initial adapter from the seed; otherwise one was copied to the other.
        not_expected: why the curves need not agree, or None where they must within LOSS_TOLERANCE.
    """

    max_difference: float
    worst_step: int
    steps: int
    same_seed_start: bool
    not_expected: str | None

    @property
    def failed(self) -> bool:
        return self.not_expected is None and not self.max_difference <= LOSS_TOLERANCE

    def describe(self) -> str:
        """One sentence for the user."""
        difference = f"largest loss difference {self.max_difference:.2e} at step {self.worst_step} of {self.steps}"
        if self.not_expected:
            return f"{difference}; agreement is not expected: {self.not_expected}"
        verdict = "DISAGREE" if self.failed else "agree"
        return f"the curves {verdict} within {LOSS_TOLERANCE:g} at every step: {difference}"


def compare_losses(first: list[float], second: list[float], settings: Settings, same_seed_start: bool) -> Agreement:
    """Compares curves of equal length, at least one step.

    Raises:
        ValueError: the lengths differ or are 0.
    """
    differences = [abs(a - b) for a, b in zip(first, second, strict=True)]
    if not differences:
        raise ValueError("no steps to compare")
    worst = max(range(len(differences)), key=lambda step: (math.isnan(differences[step]), differences[step]))
    return Agreement(differences[worst], worst + 1, len(differences), same_seed_start, _not_expected(settings))


def _not_expected(settings: Settings) -> str | None:
    if settings.dropout > 0:
        return "the two draw different dropout masks"
    if settings.dtype != "float32":
        return f"in {settings.dtype} the two round at different places"
    return None
