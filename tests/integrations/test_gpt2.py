"""GPT-2, whose Conv1D layers keep their weights as [in, out]: patched, injected, saved for PEFT and read from it."""

import copy
import json

import pytest
import torch
from torch import nn

import fastlora
from fastlora.conv1d import LoRAConv1D
from fastlora.model import lora_layers
from tests.support.tiny_gpt2 import IDS, TARGETS, make_gpt2

peft = pytest.importorskip("peft")

from fastlora.integrations.peft import patch, register, unpatch, unserved  # noqa: E402
from tests.support.peft_models import assert_same_training_step, fallbacks, fused_calls, randomise  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out")
LAYERS = 8  # of TARGETS


def make_stock(dtype=torch.float32, registered=False, **config):
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": TARGETS, **config})
    base = make_gpt2(dtype)
    torch.manual_seed(1)
    return randomise(peft.get_peft_model(base, register(config) if registered else config))


def logits(model):
    return model(IDS).logits


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("options", [{}, {"fan_in_fan_out": True}, {"registered": True}, {"lora_bias": True}], ids=str)
def test_patched_with_the_numbers_of_stock(options):
    fused = make_stock(**options)
    stock = copy.deepcopy(fused)
    if "registered" in options:
        assert len(unpatch(stock)) == LAYERS
    else:
        assert len(patch(fused, strict=True)) == LAYERS
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused, forward=logits)
    assert fused_calls() == 2 * LAYERS and not fallbacks() and unserved(fused) == {}


def test_two_active_adapters_autocast_merge_and_back():
    stock = make_stock()
    stock.add_adapter("second", peft.LoraConfig(r=2, target_modules=["c_fc"]))
    randomise(stock, "second").base_model.set_adapter(["default", "second"])
    fused = copy.deepcopy(stock)
    patch(fused, strict=True)
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused, forward=logits)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = logits(fused).double(), logits(stock).double()
    exact = logits(copy.deepcopy(stock).double())
    allowed = 1.25 * (theirs - exact).abs().max() + torch.finfo(torch.bfloat16).eps * exact.abs().max()
    assert (ours - exact).abs().max() <= allowed
    assert not fallbacks()
    expected = logits(fused)
    fused.merge_adapter(), stock.merge_adapter()
    assert torch.equal(logits(fused), logits(stock))
    fused.unmerge_adapter()
    torch.testing.assert_close(logits(fused), expected)
    torch.testing.assert_close(logits(fused.merge_and_unload()), expected)


def test_the_weight_is_handed_on_without_a_copy():
    """What autograd keeps of a call is the weight's own memory, patched or injected."""
    model = make_stock()
    patch(model)
    injected = make_injected()
    for block in (model.base_model.model.transformer.h[0], injected.transformer.h[0]):
        layer = block.mlp.c_fc
        weight = layer.base_layer.weight if hasattr(layer, "base_layer") else layer.weight
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            layer(torch.randn(3, 12, requires_grad=True))
        assert [t.data_ptr() for t in kept if t.numel() == weight.numel()] == [weight.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit(dtype):
    stock = make_stock(dtype)
    fused = copy.deepcopy(stock)
    patch(fused)
    layers = [model.base_model.model.transformer.h[0].mlp.c_fc for model in (stock, fused)]
    fastlora.reset_dispatch_counts()
    x = torch.randn(2, 5, 12).to(dtype)
    assert_same_training_step(*layers, dtype, forward=lambda layer: layer(x))
    assert fused_calls() == 2 and not fallbacks()


def test_what_is_no_conv1d_is_counted():
    model = make_stock(target_modules=["c_attn"])
    for block, layer in zip(model.base_model.model.transformer.h, ("linear", "hooked"), strict=True):
        if layer == "linear":
            block.attn.c_attn.base_layer = nn.Linear(12, 36)
            block.attn.c_attn.base_layer.requires_grad_(False)
        else:
            block.attn.c_attn.base_layer.register_forward_hook(lambda *_: None)
    patch(model)
    assert list(unserved(model).values()) == ["base_layer is a Linear", "hooks on base_layer"]


def test_compiled_and_exported():
    fused = make_stock(target_modules=["c_fc"])
    patch(fused)
    layer = fused.base_model.model.transformer.h[0].mlp.c_fc
    x = torch.randn(3, 12)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), layer(x))
    program = torch.export.export(layer, (x,), strict=False)
    torch.testing.assert_close(program.module()(x), layer(x))


# inject, and files both ways


def make_injected():
    model = make_gpt2()
    torch.manual_seed(1)
    assert len(fastlora.inject(model, TARGETS, r=3, alpha=7)) == LAYERS
    torch.manual_seed(5)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B, std=0.3)
    return model


def test_injected_with_the_start_and_the_numbers_of_stock():
    stock, model = make_stock(), make_injected()
    for (path, layer), theirs in zip(
        lora_layers(model), [m for m in stock.modules() if isinstance(m, peft.tuners.lora.Linear)], strict=True
    ):
        assert type(layer) is LoRAConv1D, path
        assert torch.equal(layer.lora_A, theirs.lora_A["default"].weight), path
    torch.testing.assert_close(logits(model), logits(stock))
    assert sum(p.requires_grad for p in model.parameters()) == 2 * LAYERS
    linears = make_gpt2()
    assert len(fastlora.inject(linears, "all-linear", r=2)) == LAYERS  # all but the head


def test_files_go_both_ways(tmp_path):
    model = make_injected()
    fastlora.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    in_peft = peft.PeftModel.from_pretrained(make_gpt2(), tmp_path / "ours")
    torch.testing.assert_close(logits(in_peft), logits(model))
    in_peft.save_pretrained(tmp_path / "theirs")
    loaded = make_gpt2()
    assert len(fastlora.load_adapter(loaded, tmp_path / "theirs")) == LAYERS
    assert torch.equal(logits(loaded), logits(model))
    merged = fastlora.merge_and_unload(loaded, safe=True)
    torch.testing.assert_close(logits(merged), logits(model))
    torch.testing.assert_close(logits(in_peft.merge_and_unload()), logits(merged))
    merged.save_pretrained(tmp_path / "merged")
    plain = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(plain), logits(merged))
    wrong = make_gpt2(n_embd=8)
    with pytest.raises(ValueError, match=r"shapes differ: transformer.h.0.attn.c_attn: file lora_A \[3, 12\]"):
        fastlora.load_adapter(wrong, tmp_path / "ours")
