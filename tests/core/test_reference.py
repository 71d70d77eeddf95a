"""The reference layer: its mathematics in fp64, its accuracy in every dtype."""

import itertools

import pytest
import torch

import fastlora
from fastlora.backends import reference
from fastlora.philox import keep_mask
from fastlora.problem import Needs
from tests.support import numerics

pytestmark = pytest.mark.usefixtures("poisoned")


def run(case: numerics.Case) -> dict[str, torch.Tensor]:
    c = case
    y, s = reference.lora_forward(c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)
    needs = Needs(True, True, True, c.bias is not None)
    gradients = reference.lora_backward(
        c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, needs
    )
    return {"y": y, **{n: g for n, g in gradients._asdict().items() if g is not None}}


@pytest.mark.parametrize("dropout_p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m, n, k, r", [(33, 24, 40, 8), (1, 7, 5, 1), (16, 3, 17, 20)])
def test_accuracy(m, n, k, r, dtype, dropout_p):
    case = numerics.draw_case(m, n, k, r, dtype, dropout_p=dropout_p, bias=r != 1)
    numerics.assert_accurate(run(case), case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_integers_are_exact(dtype):
    case = numerics.draw_integer_case(40, 24, 48, 6, dtype)
    numerics.assert_exact(run(case), case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("wanted", [w for n in range(1, 5) for w in itertools.combinations(range(4), n)], ids=str)
def test_gradcheck_of_every_subset_of_inputs(wanted, dropout_p):
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 3, 5), (2, 5), (4, 2), (4,))  # x, lora_a, lora_b, bias
    inputs = [torch.randn(z, dtype=torch.float64, generator=generator) for z in shapes]
    for i in wanted:
        inputs[i].requires_grad_()
    weight = torch.randn(4, 5, dtype=torch.float64, generator=generator)

    def layer(x, lora_a, lora_b, bias):
        torch.manual_seed(0)
        return fastlora.lora_linear(x, weight, lora_a, lora_b, 1.7, bias, dropout_p=dropout_p)

    assert torch.autograd.gradcheck(layer, inputs)


def test_full_dropout_leaves_the_frozen_layer():
    case = numerics.draw_case(6, 5, 4, 2, torch.float64, dropout_p=1.0)
    results = run(case)
    assert torch.equal(results["y"], torch.nn.functional.linear(case.x, case.weight, case.bias))
    assert torch.equal(results["dx"], case.dy @ case.weight)
    assert not results["da"].any() and not results["db"].any()


def test_dropped_infinities_do_not_become_nan():
    case = numerics.draw_case(8, 5, 16, 2, torch.float64, dropout_p=0.5)
    mask = keep_mask(case.seed, 0.5, 8, 16)
    x = case.x.masked_fill(~mask, float("inf"))
    _, s = reference.lora_forward(x, case.weight, case.lora_a, case.lora_b, None, 1.0, 0.5, case.seed)
    assert s.isfinite().all()
