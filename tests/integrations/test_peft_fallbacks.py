"""PEFT layers that cannot be fused: PEFT's own forward runs, counted by reason; strict patching refuses them."""

import copy

import pytest
import torch
from torch import nn

import fastlora

peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import Linear as StockLinear  # noqa: E402

from fastlora.integrations.peft import patch, unserved  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    Base,
    assert_same_training_step,
    fallbacks,
    layer_of,
    make_pair,
    make_stock,
)


def hook(module):
    module.register_forward_pre_hook(lambda *_: None)


def replace_forward(module):
    forward = module.forward
    module.forward = lambda *args: forward(*args)


UNSERVED = {
    "hooks on base_layer": lambda layer: hook(layer.base_layer),
    "hooks on lora_A": lambda layer: hook(layer.lora_A["default"]),
    "hooks on lora_B": lambda layer: replace_forward(layer.lora_B["default"]),
    "hooks on lora_dropout": lambda layer: hook(layer.lora_dropout["default"]),
    "the base weight trains": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "lora_A and lora_B differ in dtype": lambda layer: layer.lora_A["default"].double(),
    "lora_dropout is a Dropout1d": lambda layer: layer.lora_dropout.update({"default": nn.Dropout1d(0.0)}),
    "lora_A is a Sub": lambda layer: setattr(layer.lora_A["default"], "__class__", type("Sub", (nn.Linear,), {})),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_cannot_be_served_runs_as_in_peft(reason):
    stock = make_stock()
    fused = copy.deepcopy(stock)
    patch(fused)
    for model in (stock, fused):
        UNSERVED[reason](layer_of(model))
    fastlora.reset_dispatch_counts()
    if "dtype" in reason:  # so for stock, too
        for model in (stock, fused):
            with pytest.raises(RuntimeError, match="dtype"):
                model(IDS)
    else:
        assert_same_training_step(stock, fused)
    assert fallbacks() == {reason: 1}
    assert unserved(fused) == {"base_model.model.q_proj": reason}


def test_input_casting_disabled():
    from peft.helpers import disable_input_dtype_casting

    stock, fused = make_pair(dtype=torch.bfloat16)
    with disable_input_dtype_casting(fused), pytest.raises(RuntimeError):
        fused(IDS)
    assert fallbacks() == {"input casting disabled": 1}
    with disable_input_dtype_casting(stock), pytest.raises(RuntimeError):
        stock(IDS)


def test_dtypes_that_do_not_fit_raise_what_stock_raises():
    stock, fused = make_pair(dtype=torch.bfloat16)
    x = torch.randn(2, 18)
    for model in (stock, fused):
        with pytest.raises(RuntimeError, match="dtype"):
            layer_of(model)(x)
    assert fallbacks() == {"torch.float32 input, torch.bfloat16 base, torch.float32 adapter": 1}


def test_functorch_transforms():
    stock, fused = make_pair()
    x = torch.randn(4, 18)
    per_sample = [
        torch.func.vmap(torch.func.grad(lambda v, model=model: layer_of(model)(v).pow(2).sum()))(x)
        for model in (stock, fused)
    ]
    torch.testing.assert_close(*per_sample)
    assert fallbacks() == {"torch.func transform": 1}


def test_strict_raises_with_the_list():
    model = make_stock(target_modules=["q_proj", "down", "embed"])
    hook(layer_of(model).base_layer)
    message = (
        r"2 of 3 LoRA layers cannot be served fused: base_model.model.embed: a peft.tuners.lora.layer.Embedding, "
        r"not a stock lora.Linear; base_model.model.q_proj: hooks on base_layer"
    )
    with pytest.raises(ValueError, match=message):
        patch(model, strict=True)
    assert type(layer_of(model)) is StockLinear
    assert patch(model) == ["base_model.model.down"]
    assert len(patch(make_stock(), strict=True)) == 2


def test_patching_what_has_no_lora_or_a_replaced_forward():
    with pytest.raises(ValueError, match="Base has no PEFT LoRA layer; call peft.get_peft_model first"):
        patch(Base())
    model = make_stock()
    replace_forward(layer_of(model))
    assert patch(model) == ["base_model.model.down"]
    with pytest.raises(ValueError, match="q_proj: its forward was replaced on the instance"):
        patch(model, strict=True)
