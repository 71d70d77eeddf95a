"""Patched PEFT models: the numbers of stock, every feature of PEFT, fused where it can be and counted where not."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import fastlora

peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import Linear as StockLinear  # noqa: E402

from fastlora.integrations.peft import FusedLinear, patch, unpatch, unserved  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    Base,
    add_adapter,
    assert_draws_the_projects_mask,
    assert_same_training_step,
    fallbacks,
    fused_calls,
    layer_of,
    make_pair,
    make_stock,
)

SIXTEEN_BIT = [torch.bfloat16, torch.float16]
SERVED = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down": 5}, "alpha_pattern": {"q_proj": 2}},
    "lora_bias": {"lora_bias": True},
    "trained bias": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "pissa": {"init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("config", SERVED.values(), ids=SERVED.keys())
@pytest.mark.parametrize("registered", [False, True])
def test_served_fused_with_the_numbers_of_stock(config, registered):
    stock, fused = make_pair(**config)
    if registered:
        state = stock.state_dict()
        fused = make_stock(registered=True, **config)
        fused.load_state_dict(state)
        assert all(type(m) is FusedLinear for m in (fused.base_model.model.q_proj, fused.base_model.model.down))
        fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()
    assert unserved(fused) == {}


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_16_bit_bases(dtype, autocast_adapter_dtype, lora_bias):
    stock, fused = make_pair(dtype=dtype, autocast_adapter_dtype=autocast_adapter_dtype, lora_bias=lora_bias)
    assert_same_training_step(stock, fused, dtype)
    assert fused_calls() == 4 and not fallbacks()
    assert fused(IDS).dtype == dtype
    parameter = fused.base_model.model.q_proj.lora_A["default"].weight
    assert parameter.grad.dtype == parameter.dtype == (torch.float32 if autocast_adapter_dtype else dtype)


@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_autocast(base):
    stock, fused = make_pair(dtype=base)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_training_step(stock, fused, torch.bfloat16)
        assert fused(IDS).dtype == torch.bfloat16
    assert not fallbacks()


def test_dropout_is_fused_seeded_and_off_in_eval():
    assert_draws_the_projects_mask(*make_pair(lora_dropout=0.5))


def test_unpatch_gives_back_what_was_there():
    stock, fused = make_pair()
    assert patch(fused) == unpatch(fused) == ["base_model.model.q_proj", "base_model.model.down"]
    assert type(fused.base_model.model.q_proj) is StockLinear and repr(fused) == repr(stock)
    assert torch.equal(fused(IDS), stock(IDS)) and fused_calls() == 0
    assert unpatch(fused) == []


def test_several_adapters_and_switching():
    stock, fused = make_pair()
    for model in (stock, fused):
        add_adapter(model, "second", r=5, lora_alpha=3, target_modules=["q_proj"])
        model.set_adapter("second")
    assert_same_training_step(stock, fused)
    assert fallbacks() == {"0 active adapters": 1}  # down has no second adapter
    for model in (stock, fused):
        model.base_model.set_adapter(["default", "second"])
    fastlora.reset_dispatch_counts()
    torch.testing.assert_close(fused(IDS), stock(IDS))
    assert not fallbacks() and fused_calls() == 2 and unserved(fused) == {}
    for model in (stock, fused):
        model.set_adapter("default")
        model.delete_adapter("second")
    fastlora.reset_dispatch_counts()
    torch.testing.assert_close(fused(IDS), stock(IDS))
    assert fused_calls() == 2 and not fallbacks()


def test_disable_adapter():
    stock, fused = make_pair()
    with stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(IDS), stock(IDS))
    assert fallbacks() == {"adapters disabled": 2}
    torch.testing.assert_close(fused(IDS), stock(IDS))


@pytest.mark.filterwarnings("ignore:Already unmerged")
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_unmerge_and_unload(safe_merge):
    stock, fused = make_pair()
    expected = fused(IDS)
    for model in (stock, fused):
        model.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(fused(IDS), stock(IDS))
    torch.testing.assert_close(fused(IDS), expected)
    assert fallbacks() == {"merged": 4}
    fused.unmerge_adapter(), stock.unmerge_adapter()
    torch.testing.assert_close(fused(IDS), stock(IDS))
    unloaded = fused.merge_and_unload(safe_merge=safe_merge)
    assert type(unloaded.q_proj) is nn.Linear
    torch.testing.assert_close(unloaded(IDS), expected)
    broken = make_pair()[1]
    broken.base_model.model.q_proj.lora_B["default"].weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        broken.merge_and_unload(safe_merge=True)


def test_add_weighted_adapter():
    stock, fused = make_pair()
    for model in (stock, fused):
        add_adapter(model, "second", r=3, lora_alpha=2, target_modules=["q_proj", "down"])
        model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "mix", combination_type="cat")
        model.set_adapter("mix")
    torch.testing.assert_close(fused(IDS), stock(IDS))
    assert fused_calls() == 2 and not fallbacks()


def test_scaling_is_read_at_every_call():
    stock, fused = make_pair()
    for model in (stock, fused):
        model.base_model.model.q_proj.set_scale("default", 0.3)
        model.base_model.model.down.scale_layer(2.0)
    assert_same_training_step(stock, fused)
    with torch.no_grad():
        for model in (stock, fused):
            model.base_model.model.down.scaling["default"] = 0
    assert_same_training_step(stock, fused)
    assert not fallbacks()


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize("lora_bias", [False, True])
def test_scalings_that_hotswap_made_tensors(lora_bias):
    stock, fused = make_pair(lora_bias=lora_bias)
    for model in (stock, fused):
        for layer in (model.base_model.model.q_proj, model.base_model.model.down):
            layer.scaling["default"] = torch.tensor(layer.scaling["default"])
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()


def test_hotswap(tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    other = make_stock(r=5, lora_alpha=3, seed=4)
    other.save_pretrained(tmp_path)
    stock, fused = make_pair()
    for model in (stock, fused):
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        hotswap_adapter(model, str(tmp_path), "default")
    torch.testing.assert_close(fused(IDS), stock(IDS))
    assert fused_calls() == 2 and not fallbacks()


def test_save_and_load(tmp_path):
    stock, fused = make_pair()
    stock.save_pretrained(tmp_path / "stock"), fused.save_pretrained(tmp_path / "fused")
    name = "adapter_model.safetensors"
    assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    configs = [peft.LoraConfig.from_pretrained(tmp_path / name).to_dict() for name in ("stock", "fused")]
    assert configs[0] == configs[1]
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Base(), tmp_path / "fused")
    patch(loaded)
    torch.testing.assert_close(loaded(IDS), stock(IDS))
    assert list(fused.state_dict()) == list(stock.state_dict())
    registered = make_stock(registered=True)
    registered.save_pretrained(tmp_path / "registered")
    assert "custom" not in (tmp_path / "registered" / "adapter_config.json").read_text()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_stay_fused(clone):
    stock, fused = make_pair()
    other = clone(fused)
    assert type(other.base_model.model.q_proj) is FusedLinear and repr(other) == repr(fused)
    assert repr(fused.base_model.model.q_proj).startswith("lora.FusedLinear(")
    assert torch.equal(other(IDS), fused(IDS)) and not fallbacks()


SHAPES = [(18,), (0, 18), (2, 0, 18), (1, 1, 18), (2, 3, 2, 18)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes_and_strides(shape):
    stock, fused = make_pair()
    x = torch.randn(shape)
    torch.testing.assert_close(layer_of(fused)(x), layer_of(stock)(x))
    if len(shape) == 4:
        x = x.transpose(0, 2)
        torch.testing.assert_close(layer_of(fused)(x), layer_of(stock)(x))
        torch.testing.assert_close(layer_of(fused)(x.flip(-1)[..., ::1]), layer_of(stock)(x.flip(-1)))
    assert not fallbacks()


def test_frozen_inputs_frozen_factors_and_in_place_use():
    for frozen in ("lora_A", "lora_B", None):
        stock, fused = make_pair()
        for model in (stock, fused):
            for name, parameter in model.named_parameters():
                if frozen and f"{frozen}." in name:
                    parameter.requires_grad_(False)
        assert_same_training_step(stock, fused)
        output = fused(IDS)
        output += 1  # the output is no view and no saved tensor
        output.sum().backward(retain_graph=True)
        output.sum().backward()
    assert not fallbacks()


def test_a_patched_model_is_warmed_up_on_request(monkeypatch):
    """With what its layers will be called with, and only where their kernels are Triton's."""
    calls = []
    monkeypatch.setattr("fastlora.warming.compile_ahead", lambda found, *rest: calls.extend(found) or 0)
    for warms in (False, True):
        patch(make_stock(lora_dropout=0.1), warmup=warms)
        assert bool(calls) == warms
    assert {(spec.direction, spec.dropout) for _, spec in calls} == {
        ("forward", True), ("forward", False), ("backward", True)
    }  # fmt: skip
    assert {(*spec.sizes[1:], spec.bias) for _, spec in calls if spec.direction == "forward"} == {
        (18, 18, 3, True), (7, 18, 3, False)
    }  # fmt: skip
    assert {spec.needs for _, spec in calls if spec.direction == "backward"} == {(True, True, True, False)}
