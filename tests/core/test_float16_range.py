"""The reference overflows in float16 where the composed layer does, and nowhere else."""

from dataclasses import replace

import pytest
import torch

from fastlora.backends import reference
from fastlora.problem import Needs, split_scaling
from tests.support import float16_range, numerics

ALL = Needs(True, True, True, True)


def run(case: numerics.Case) -> dict[str, torch.Tensor]:
    c = case
    y, s = reference.lora_forward(c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)
    gradients = reference.lora_backward(c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, ALL)
    return {"y": y, **gradients._asdict()}


@pytest.mark.parametrize("dropout_p", (0.0, 0.3))
@pytest.mark.parametrize("m, r", ((97, 5), (70, 24)))  # S as the product of columns, and of rows
@pytest.mark.parametrize("scaling", float16_range.SCALINGS)
@pytest.mark.parametrize("regime", float16_range.REGIMES, ids=lambda regime: regime.name)
def test_overflow_where_the_composed_layer_overflows_and_nowhere_else(regime, scaling, m, r, dropout_p):
    case = float16_range.draw(regime, scaling, m, 40, 136, r, dropout_p)
    float16_range.check(run(case), case)


@pytest.mark.parametrize("regime, name", [*zip(float16_range.REGIMES, ("y", "y", "dx"), strict=True)])
def test_the_regimes_are_at_the_edge(regime, name):
    """Some rows overflow and some do not, at small and at large scalings."""
    for scaling in (0.3, 1.5, -2.0, 32.0, 3000.3):
        case = float16_range.draw(regime, scaling, 97, 40, 136, 5)
        finite, infinite = float16_range.check(run(case), case)[name]
        assert finite > 500 and infinite > 100, (scaling, finite, infinite)


@pytest.mark.parametrize("scaling", (0.4, 2.0, 11.3, -37.0, 1000.0))
def test_as_accurate_as_eager_at_any_scaling(scaling):
    case = numerics.draw_case(64, 48, 72, 8, torch.float64)
    other = abs(scaling) / case.scaling
    case = replace(case, scaling=scaling, lora_b=case.lora_b / other, dy=case.dy / abs(scaling)).to(torch.float16)
    numerics.assert_accurate(run(case), case)


def test_scalings_are_shared_out_exactly():
    for scaling in float16_range.SCALINGS:
        in_s, on_branch = split_scaling(scaling, torch.float16)
        assert in_s * on_branch == scaling and abs(in_s) <= 1.0
        assert split_scaling(scaling, torch.bfloat16) == (scaling, 1.0)
