"""PEFT's DoRA, patched: stock's values and gradients by one fused launch and a column scale, or counted."""

import copy
import json

import pytest
import torch
from torch import nn

import fastlora
from fastlora.model import lora_layers
from tests.support.numerics import assert_reordered
from tests.support.tiny_gpt2 import TARGETS, make_gpt2

peft = pytest.importorskip("peft")

from fastlora.integrations.peft import patch, unpatch, unserved  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    Base,
    add_adapter,
    assert_same_training_step,
    assert_trains_alike,
    fallbacks,
    fused_calls,
    gradients,
    layer_of,
    make_stock,
)

TERMS = 128  # of the longest sum of a tiny model
PATHS = ["base_model.model.q_proj", "base_model.model.down"]


def stretch(model):
    """Magnitudes that are no norms any more."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_magnitude_vector" in name:
            parameter.data.mul_(torch.rand(parameter.shape).add(0.7))
    return model


def make_pair(change=lambda model: None, **config):
    stock = stretch(make_stock(use_dora=True, **config))
    change(stock)
    fused = copy.deepcopy(stock)
    patch(fused)
    fastlora.reset_dispatch_counts()
    return stock, fused


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"down": 5}}], ids=str)
def test_served_fused_with_the_numbers_of_stock(options):
    stock, fused = make_pair(**options)
    assert unserved(fused) == {} and len(patch(copy.deepcopy(stock), strict=True)) == 2
    for _ in range(2):  # the second time by the norms of the first
        assert_same_training_step(stock, fused)
    assert fused_calls() == 8 and not fallbacks()
    magnitude = layer_of(fused).lora_magnitude_vector["default"].weight
    assert magnitude.grad is not None and magnitude.grad.abs().max() > 0


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_within_stocks_own_error(dtype, autocast_adapter_dtype):
    """Against fp64 on the same rounded values."""
    stock, fused = make_pair(dtype=dtype, autocast_adapter_dtype=autocast_adapter_dtype)
    torch.manual_seed(1)
    x = torch.randn(64, 18).to(dtype)

    def values(model, x):
        layer = layer_of(model)
        layer.zero_grad()
        leaf = x.clone().requires_grad_(True)
        y = layer(leaf)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype))
        return [y.detach(), leaf.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]

    exact = values(copy.deepcopy(stock).double(), x.double())
    ours, theirs = values(fused, x), values(stock, x)
    assert len(ours) == 5 and not fallbacks()
    for own, other, truth in zip(ours, theirs, exact, strict=True):
        assert own.dtype == other.dtype
        error, stocks = (((t.double() - truth).abs().max() / truth.abs().max()).item() for t in (own, other))
        assert error <= 1.25 * stocks + torch.finfo(dtype).eps  # an ulp of the largest value besides


def test_a_trained_step_moves_what_it_moves_in_stock():
    stock, fused = make_pair()
    trained = lambda model: [p for p in model.parameters() if p.requires_grad]  # noqa: E731
    moved = assert_trains_alike(stock, fused, lambda model: torch.optim.SGD(trained(model), lr=0.1), steps=4)
    assert {"lora_A", "lora_B"} <= moved and len(moved) == 3
    fused.eval(), stock.eval()
    assert_reordered([fused(IDS)], [stock(IDS)], 4 * TERMS)
    assert not fallbacks()


def test_dropout_is_stocks_in_training_and_fused_in_eval():
    stock, fused = make_pair(lora_dropout=0.5)
    assert unserved(fused) == dict.fromkeys(PATHS, "DoRA with dropout")
    torch.manual_seed(3)
    expected, wanted = gradients(stock)
    torch.manual_seed(3)
    output, got = gradients(fused)
    assert torch.equal(output, expected) and fallbacks() == {"DoRA with dropout": 2} and fused_calls() == 0
    for name, gradient in got.items():
        assert torch.equal(gradient, wanted[name]), name
    stock.eval(), fused.eval()
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()


UNSERVED = {
    "hooks on lora_magnitude_vector": lambda layer: layer.lora_magnitude_vector["default"].register_forward_hook(
        lambda *_: None
    ),
    "hooks on lora_A": lambda layer: layer.lora_A["default"].register_forward_hook(lambda *_: None),
    "lora_magnitude_vector is a Sub": lambda layer: setattr(
        layer.lora_magnitude_vector["default"],
        "__class__",
        type("Sub", (type(layer.lora_magnitude_vector["default"]),), {}),
    ),
}


@pytest.mark.parametrize("reason", UNSERVED)
def test_what_cannot_be_served_is_stocks_and_counted(reason):
    stock, fused = make_pair()
    for model in (stock, fused):
        UNSERVED[reason](layer_of(model))
    assert unserved(fused) == {PATHS[0]: reason}
    assert_same_training_step(stock, fused)
    assert fallbacks() == {reason: 1}


def test_a_dora_adapter_beside_a_plain_one():
    """Each alone is fused; both at once are PEFT's, which scales what the adapter before has added."""
    stock, fused = make_pair()
    for model in (stock, fused):
        add_adapter(model, "second", r=2, target_modules=["q_proj", "down"])
    for names in ("second", "default"):
        for model in (stock, fused):
            model.set_adapter(names)
        fastlora.reset_dispatch_counts()
        assert_same_training_step(stock, fused)
        assert fused_calls() == 4 and not fallbacks()
    for model in (stock, fused):
        model.base_model.set_adapter(["default", "second"])
    assert_same_training_step(stock, fused)
    assert fallbacks() == {"2 active adapters with DoRA": 2}


def test_whatever_changes_the_factors_changes_the_norm(tmp_path):
    """Scales, swapped tensors, merging and back, another adapter of the same name: never an earlier norm."""
    stock, fused = make_pair()
    other = stretch(make_stock(use_dora=True, seed=4, lora_alpha=3))
    other.save_pretrained(tmp_path)

    def swap(model):
        """As PEFT hotswaps, which of DoRA it does not itself."""
        old = layer_of(model).lora_A["default"].weight
        torch.utils.swap_tensors(old, nn.Parameter(2 * old.detach()))

    def reload(model):
        model.delete_adapter("default")
        model.load_adapter(str(tmp_path), "default", is_trainable=True)
        model.set_adapter("default")
        layer_of(model).lora_B["default"].weight.data.mul_(2)

    def check():
        with torch.no_grad():
            assert_reordered([fused(IDS)], [stock(IDS)], TERMS)
        assert_same_training_step(stock, fused)

    changes = [
        lambda model: layer_of(model).set_scale("default", 3.0),
        lambda model: layer_of(model).scaling.update(default=torch.tensor(0.7)),
        lambda model: layer_of(model).scaling.update(default=0.9),
        swap,
        lambda model: (model.merge_adapter(), model.unmerge_adapter()),
        reload,
        reload,
        lambda model: model.double(),
        lambda model: model.float(),
    ]
    check()
    for change in changes:
        for model in (stock, fused):
            change(model)
        check()
    assert not fallbacks()


def test_merge_save_copies_and_unpatch(tmp_path):
    stock, fused = make_pair()
    fused(IDS)
    keys = list(stock.state_dict())
    assert list(fused.state_dict()) == keys
    clone = copy.deepcopy(fused)
    assert torch.equal(clone(IDS), fused(IDS))
    stock.save_pretrained(tmp_path / "stock"), fused.save_pretrained(tmp_path / "fused")
    name = "adapter_model.safetensors"
    assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "fused" / name).read_bytes()
    unpatch(clone)
    assert torch.equal(clone(IDS), stock(IDS))
    assert vars(layer_of(clone)).keys() == vars(layer_of(stock)).keys()
    expected = fused(IDS)
    for safe in (False, True):
        torch.testing.assert_close(copy.deepcopy(fused).merge_and_unload(safe_merge=safe)(IDS), expected)


def test_autocast_checkpointing_and_compile():
    stock, fused = make_pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_training_step(stock, fused, torch.bfloat16)
    layer, x = layer_of(fused), torch.randn(4, 18, requires_grad=True)
    layer.zero_grad()
    layer(x).pow(2).mean().backward()
    expected = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    layer.zero_grad()
    torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False).pow(2).mean().backward()
    for name, gradient in expected.items():
        assert torch.equal(gradient, layer.get_parameter(name).grad), name
    assert len(expected) == 3
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(IDS), stock(IDS))
    assert not fallbacks()


# fastlora's own layers and files


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("kind", ["linear", "Conv1D"])
def test_injected_with_the_start_and_the_numbers_of_stock(kind, tmp_path):
    build, targets = (Base, ["q_proj", "down"]) if kind == "linear" else (make_gpt2, TARGETS)
    call = (lambda model: model(IDS)) if kind == "linear" else (lambda model: model(IDS).logits)
    torch.manual_seed(0)
    base = build()
    config = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_dora=True)
    stock = peft.get_peft_model(copy.deepcopy(base), config)
    fused, model = copy.deepcopy(stock), copy.deepcopy(base)
    assert len(patch(fused, strict=True)) == len(fastlora.inject(model, targets, r=3, alpha=7, dora=True))
    theirs = [module for module in stock.modules() if isinstance(module, peft.tuners.lora.Linear)]
    twins = [module for module in fused.modules() if isinstance(module, peft.tuners.lora.Linear)]
    for (path, ours), *both in zip(lora_layers(model), theirs, twins, strict=True):
        magnitude = both[0].lora_magnitude_vector["default"].weight
        torch.testing.assert_close(ours.lora_magnitude_vector, magnitude, msg=path)
        torch.manual_seed(len(path))
        nn.init.normal_(ours.lora_B, std=0.3)
        ours.lora_magnitude_vector.data.mul_(1.2)
        for other in both:
            other.lora_A["default"].weight.data.copy_(ours.lora_A)
            other.lora_B["default"].weight.data.copy_(ours.lora_B)
            other.lora_magnitude_vector["default"].weight.data.copy_(ours.lora_magnitude_vector)
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused, forward=call)
    assert fused_calls() == 2 * len(theirs) and not fallbacks()
    expected = call(stock)
    assert_reordered([call(model)], [expected], TERMS)
    fastlora.save_adapter(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["use_dora"] is True
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    assert_reordered([call(in_peft)], [expected], TERMS)
    stock.save_pretrained(tmp_path / "theirs")
    loaded = copy.deepcopy(base)
    assert len(fastlora.load_adapter(loaded, tmp_path / "theirs")) == len(theirs)
    assert_reordered([call(loaded)], [expected], TERMS)
    assert_reordered([call(fastlora.merge_and_unload(loaded, safe=True))], [expected], TERMS)


def test_shapes_meta_inference_mode_and_traces():
    stock, fused = make_pair()
    for shape in ((0, 18), (2, 0, 18), (2, 3, 2, 18)):
        x = torch.randn(shape, requires_grad=True)
        y = layer_of(fused)(x)
        torch.testing.assert_close(y, layer_of(stock)(x))
        y.sum().backward()
    assert not fallbacks()
    vector = torch.randn(18)
    assert torch.equal(layer_of(fused)(vector), layer_of(stock)(vector))  # [1, 18]
    assert fallbacks() == {"DoRA of a vector": 1}
    for model in (stock, fused):
        model.load_state_dict(model.state_dict())  # norms are made anew, within inference mode
    with torch.inference_mode():
        torch.testing.assert_close(fused(IDS), stock(IDS))
    assert_same_training_step(stock, fused)
    traced = torch.jit.trace(layer_of(fused), (torch.randn(4, 18),))
    with torch.no_grad():
        for model in (stock, fused):
            layer_of(model).lora_B["default"].weight.mul_(2)  # the norm is no constant of the trace
    x = torch.randn(7, 18)
    torch.testing.assert_close(traced(x), layer_of(stock)(x))
    with torch.device("meta"):
        empty = make_stock(use_dora=True)
    patch(empty)
    assert empty(torch.zeros(2, 3, dtype=torch.long, device="meta")).shape == (2, 3, 7)


def test_second_derivatives_and_accumulated_gradients():
    stock, fused = make_pair()
    x = torch.randn(3, 18, requires_grad=True)
    second = []
    for model in (stock, fused):
        (first,) = torch.autograd.grad(layer_of(model)(x).pow(3).sum(), x, create_graph=True)
        second.append(torch.autograd.grad(first.pow(2).sum(), x)[0])
        for _ in range(2):
            for _ in range(3):
                model(IDS).pow(2).mean().backward()
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data -= 0.1 * parameter.grad  # past torch's version counter
            model.zero_grad()
    assert_reordered([second[1]], [second[0]], TERMS)
    assert_reordered([fused(IDS)], [stock(IDS)], TERMS)
