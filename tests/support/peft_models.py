"""A small PEFT model, stock and patched, and the comparison of their training steps."""

import copy

import peft
import torch
from torch import nn

import fastlora
from fastlora.integrations.peft import patch, register


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(13, 18)
        self.q_proj = nn.Linear(18, 18)
        self.down = nn.Linear(18, 7, bias=False)

    def forward(self, ids):
        return self.down(torch.tanh(self.q_proj(self.embed(ids))))


IDS = torch.arange(26).view(2, 13) % 13


def make_stock(dtype=torch.float32, autocast_adapter_dtype=True, registered=False, seed=0, **config):
    """A PEFT model whose branches are about as large as its frozen products."""
    torch.manual_seed(seed)
    lora_config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down"], **config})
    if registered:
        register(lora_config)
    model = peft.get_peft_model(Base().to(dtype), lora_config, autocast_adapter_dtype=autocast_adapter_dtype)
    return randomise(model)


def randomise(model, adapter="default", seed=5):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f"lora_B.{adapter}" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def add_adapter(model, name, **config):
    torch.manual_seed(8)
    model.add_adapter(name, peft.LoraConfig(**config))
    randomise(model, name, seed=9)


def layer_of(model):
    return model.base_model.model.q_proj


def make_pair(**kwargs):
    """The same model twice: stock, and patched."""
    stock = make_stock(**kwargs)
    fused = copy.deepcopy(stock)
    patched = patch(fused)
    assert sorted([*patched, *patched.unserved]) == ["base_model.model.down", "base_model.model.q_proj"]
    fastlora.reset_dispatch_counts()
    return stock, fused


def fused_calls():
    counts = fastlora.dispatch_counts()
    return counts["cuda"] + counts["triton"] + counts["reference"]


def fallbacks():
    return {name.removeprefix("peft: "): n for name, n in fastlora.dispatch_counts()["fallbacks"].items()}


def on_ids(model):
    return model(IDS)


def gradients(model, forward=on_ids):
    model.zero_grad()
    output = forward(model)
    output.float().pow(2).mean().backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_training_step(stock, fused, dtype=torch.float32, forward=on_ids):
    """Outputs and gradients within a few roundings of each other, relative to the largest value of each tensor."""
    expected, wanted = gradients(stock, forward)
    output, got = gradients(fused, forward)
    slack = 64 * torch.finfo(dtype).eps
    assert output.dtype == expected.dtype and (output - expected).abs().max() <= slack * expected.abs().max()
    assert got.keys() == wanted.keys() and got
    for name, gradient in got.items():
        assert gradient.dtype == wanted[name].dtype, name
        assert (gradient - wanted[name]).abs().max() <= slack * wanted[name].abs().max(), name


def assert_trains_alike(stock, fused, make_optimizer, steps=3):
    """The same parameters after some steps, within a step's slack (assert_same_training_step) for each of them.

    Returns:
        Of the parameters that have moved, "lora_A", "lora_B" and so on.
    """
    start = {name: p.detach().clone() for name, p in stock.named_parameters()}
    for model in (stock, fused):
        optimizer = make_optimizer(model)
        for _ in range(steps):
            optimizer.zero_grad()
            model(IDS).pow(2).mean().backward()
            optimizer.step()
    moved = set()
    slack = steps * 64 * torch.finfo(torch.float32).eps
    for (name, got), wanted in zip(fused.named_parameters(), stock.parameters(), strict=True):
        assert (got - wanted).abs().max() <= slack * wanted.abs().max(), name
        if not torch.equal(got, start[name]):
            moved.add(name.split(".")[-3])
    return moved


def assert_draws_the_projects_mask(stock, fused):
    """A model of lora_dropout=0.5: seeded, as lora_linear drops, and off in eval."""
    torch.manual_seed(1)
    first = fused(IDS)
    torch.manual_seed(1)
    assert torch.equal(fused(IDS), first) and not torch.equal(fused(IDS), first)
    layer, x = layer_of(fused), torch.randn(5, 18)
    base, (a, b) = layer.base_layer, (m["default"].weight for m in (layer.lora_A, layer.lora_B))
    torch.manual_seed(2)
    expected = fastlora.lora_linear(x, base.weight, a, b, layer.scaling["default"], base.bias, dropout_p=0.5)
    torch.manual_seed(2)
    assert torch.equal(layer(x), expected)
    stock.eval(), fused.eval()
    torch.testing.assert_close(fused(IDS), stock(IDS))
    assert not fallbacks()
