"""Several active adapters of a patched model: one fused call for them all, gradients in each one's own factors."""

import copy

import pytest
import torch

import fastlora

peft = pytest.importorskip("peft")

from fastlora.integrations.peft import patch, unserved  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    add_adapter,
    assert_same_training_step,
    fallbacks,
    fused_calls,
    gradients,
    layer_of,
    make_stock,
)

PATH = "base_model.model.q_proj"


def make_pair(dtype=torch.float32, second=None, names=("default", "second"), change=lambda model: None, **first):
    """A model with two active adapters on q_proj and one on down, stock and patched, both factors as large as W."""
    stock = make_stock(dtype=dtype, **first)
    add_adapter(stock, "second", **{"r": 5, "lora_alpha": 3, "target_modules": ["q_proj"], **(second or {})})
    stock.base_model.set_adapter(list(names))
    change(stock)
    fused = copy.deepcopy(stock)
    patch(fused)
    fastlora.reset_dispatch_counts()
    return stock, fused


def set_scales(*scales):
    def change(model):
        for name, scale in zip(("default", "second"), scales, strict=True):
            layer_of(model).scaling[name] = scale

    return change


def freeze(name):
    return lambda model: [p.requires_grad_(False) for n, p in model.named_parameters() if f".{name}." in n]


def cast(name, dtype):
    def change(model):
        for factors in (layer_of(model).lora_A, layer_of(model).lora_B):
            factors[name].to(dtype)

    return change


SERVED = {
    "two ranks, two scalings": {},
    "one scaling": {"second": {"r": 3, "lora_alpha": 7}},
    "lora_bias in one": {"lora_bias": True},
    "lora_bias in both": {"lora_bias": True, "second": {"lora_bias": True}},
    "in eval's reach": {"second": {"lora_dropout": 0.5}, "change": lambda model: model.eval()},
    "the other order": {"names": ("second", "default")},
    "named twice": {"names": ("default", "second", "default")},
    "a negative scale": {"change": set_scales(0.5, -3.0)},
    "a scale of 0": {"change": set_scales(0.0, 2)},
    "no scale but 0": {"change": set_scales(0, 0.0)},
    "scalings that hotswap made tensors": {"change": set_scales(torch.tensor(0.5), 3.0)},
    "one adapter frozen": {"change": freeze("default")},
}


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("name", SERVED)
def test_one_fused_call_with_the_numbers_of_stock(name):
    stock, fused = make_pair(**SERVED[name])
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()
    assert unserved(fused) == {}


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_bases_and_adapters_of_two_dtypes(dtype, lora_bias, mixed):
    change = cast("second", dtype) if mixed else lambda model: None
    stock, fused = make_pair(dtype, change=change, lora_bias=lora_bias)
    assert_same_training_step(stock, fused, dtype)
    assert fused_calls() == 4 and not fallbacks()
    layer = layer_of(fused)
    assert layer.lora_A["second"].weight.grad.dtype == (dtype if mixed else torch.float32)
    assert layer.lora_A["default"].weight.grad.dtype == torch.float32


def error(values, exact):
    """Largest error relative to the largest value."""
    return ((values.double() - exact).abs().max() / exact.abs().max()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_adapters_are_as_exact_as_stock(dtype):
    """Against fp64 on the same rounded values: B is rounded once more, by its factor; Y, S and the rest less often."""
    stock, fused = make_pair(dtype, change=lambda m: [cast(n, dtype)(m) for n in ("default", "second")])
    torch.manual_seed(1)
    x = torch.randn(64, 18, dtype=dtype)

    def values(model, x):
        layer = layer_of(model)
        layer.zero_grad()
        leaf = x.clone().requires_grad_(True)
        y = layer(leaf)
        (y * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)).sum().backward()
        factors = [f[n].weight.grad for n in ("default", "second") for f in (layer.lora_A, layer.lora_B)]
        return [y.detach(), leaf.grad, *factors]

    exact = values(copy.deepcopy(stock).double(), x.double())
    ours, theirs = values(fused, x), values(stock, x)
    for own, other, truth in zip(ours, theirs, exact, strict=True):
        assert error(own, truth) <= max(1.25 * error(other, truth), torch.finfo(dtype).eps)
    assert not fallbacks()


UNSERVED = {
    "2 active adapters with dropout": {"second": {"lora_dropout": 0.5}},
    "2 active adapters with DoRA": {"second": {"use_dora": True}},
    "2 active adapters of torch.bfloat16, torch.float32": {"change": cast("second", torch.bfloat16)},
    "hooks on lora_B": {"change": lambda m: layer_of(m).lora_B["second"].register_forward_hook(lambda *_: None)},
    "3 active adapters with dropout": {"second": {"lora_dropout": 0.5}, "names": ("default", "second", "second")},
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_cannot_be_stacked_is_stocks_and_counted(reason):
    stock, fused = make_pair(**UNSERVED[reason])
    assert unserved(fused) == {PATH: reason}
    torch.manual_seed(3)
    expected, wanted = gradients(stock)
    torch.manual_seed(3)
    output, got = gradients(fused)
    torch.testing.assert_close(output, expected)
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], msg=name)
    assert fallbacks() == {reason: 1} and fused_calls() == 2


def test_a_factor_of_another_dtype_raises_as_in_stock():
    _, fused = make_pair(torch.bfloat16, change=lambda m: layer_of(m).lora_B["second"].bfloat16())
    with pytest.raises(RuntimeError, match="dtype"):
        fused(IDS)
    assert fallbacks() == {"lora_A and lora_B differ in dtype": 1}


def test_adapters_are_looked_up_at_every_call():
    """Set again and again, added, weighted and deleted between calls: never those of an earlier call."""
    stock, fused = make_pair()
    for names in (["second"], ["default", "second"], ["default"], ["second", "default"]):
        for model in (stock, fused):
            model.base_model.set_adapter(names)
        assert_same_training_step(stock, fused)
    for model in (stock, fused):
        add_adapter(model, "third", r=2, target_modules=["q_proj", "down"])
        model.add_weighted_adapter(["default", "third"], [0.5, 2.0], "mix", combination_type="cat")
        model.base_model.set_adapter(["default", "second", "third", "mix"])
        with torch.no_grad():
            layer_of(model).lora_B["third"].weight.mul_(2)
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()
    for model in (stock, fused):
        model.delete_adapter("second")
    assert_same_training_step(stock, fused)
    assert not fallbacks()


def test_a_trained_step_moves_each_adapter_as_in_stock():
    stock, fused = make_pair()
    for model in (stock, fused):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS).pow(2).mean().backward()
            optimizer.step()
    for (name, got), wanted in zip(fused.state_dict().items(), stock.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)
    start, _ = make_pair()
    moved = [not torch.equal(p, q) for p, q in zip(fused.parameters(), start.parameters(), strict=True)]
    assert sum(moved) == 6 and not fallbacks()


def test_autocast_checkpointing_and_compile():
    stock, fused = make_pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_training_step(stock, fused, torch.bfloat16)
    x = torch.randn(4, 18, requires_grad=True)
    layer = layer_of(fused)
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).pow(2).mean().backward()
    checkpointed = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    layer(x).pow(2).mean().backward()
    assert len(checkpointed) == 4
    for name, gradient in checkpointed.items():
        assert torch.equal(gradient, layer.get_parameter(name).grad), name
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, compiled._orig_mod)
    torch.testing.assert_close(compiled(IDS), stock(IDS))
    assert not fallbacks()
