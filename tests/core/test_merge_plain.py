"""Merged means plain: merge_and_unload, and state dicts of merged layers."""

import copy
import io
import pickle
import re
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastlora
from fastlora.model import inject, lora_layers, merge, merge_and_unload, unmerge
from fastlora.module import LoRALinear
from tests.support.merge_models import (
    X,
    close,
    make_base,
    make_model,
    start_branches,
)

# merge_and_unload


@pytest.mark.parametrize("merged_before", [False, True])
def test_what_comes_back_is_the_plain_model(merged_before):
    model = make_model().eval()
    expected = model(X)
    weights = {n: layer.merged_weight() for n, layer in lora_layers(model)}
    bias = model[0].bias
    if merged_before:
        merge(model)
    assert fastlora.merge_and_unload(model) is model
    plain = make_base()
    assert repr(model) == repr(plain)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert not list(model.buffers()) and model[0].bias is bias
    fresh = vars(plain[0]).keys()
    for name, weight in weights.items():
        layer = model.get_submodule(name)
        assert type(layer) is nn.Linear and vars(layer).keys() == fresh and torch.equal(layer.weight, weight)
        assert not layer.training and not layer.weight.requires_grad
    close(model(X), expected)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(X), model(X))
    with pytest.raises(AssertionError):
        close(make_base()(X), expected)
    with pytest.raises(ValueError, match="has no LoRALinear layer"):
        merge_and_unload(model)


def test_against_peft():
    peft = pytest.importorskip("peft")
    model = make_model(rslora=False)
    stock = peft.get_peft_model(make_base(), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["0", "2"]))
    for path, layer in lora_layers(model):
        theirs = stock.base_model.model.get_submodule(path)
        theirs.lora_A.default.weight.data.copy_(layer.lora_A)
        theirs.lora_B.default.weight.data.copy_(layer.lora_B)
    theirs, ours = stock.merge_and_unload().state_dict(), merge_and_unload(model).state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        close(value, theirs[name])


def test_a_single_layer():
    layer = LoRALinear(6, 4, r=2, alpha=3, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    expected = layer(X)
    assert merge_and_unload(layer) is layer and type(layer) is nn.Linear
    close(layer(X), expected)


def test_everything_that_holds_a_layer_sees_it_plain():
    class Twice(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.first, self.blocks = shared, nn.ModuleList([nn.Linear(6, 6), shared])
            self.aside = [shared]  # not registered

        def forward(self, x):
            return self.aside[0](self.blocks[1](self.first(x)))

    shared = LoRALinear(6, 6, r=2, dtype=torch.float64)
    nn.init.normal_(shared.lora_B)
    model = Twice(shared)
    expected = model(X)
    merge_and_unload(model)
    assert {type(m) for m in (model.first, model.blocks[1], model.aside[0])} == {nn.Linear}
    close(model(X), expected)


def test_hooks_and_attributes_stay():
    model, calls = make_model(), []
    handle = model[0].register_forward_hook(lambda *_: calls.append("hook"))
    model[2].note = "mine"
    old = model[2].forward
    model[2].forward = lambda x: calls.append("wrapped") or old(x)
    expected = model(X)
    merge_and_unload(model)
    close(model(X), expected)
    assert calls == ["hook", "wrapped"] * 2 and model[2].note == "mine"
    handle.remove()
    model(X)
    assert calls == ["hook", "wrapped"] * 2 + ["wrapped"]


def test_plain_models_copy_pickle_compile_and_take_lora_again():
    model = make_model()
    expected = model(X)
    compiled = torch.compile(model, backend="eager")
    close(compiled(X), expected)
    merge_and_unload(compiled)
    close(compiled(X), expected)
    close(copy.deepcopy(model)(X), expected)
    data = pickle.dumps(model)
    assert b"fastlora" not in data
    close(pickle.loads(data)(X), expected)
    inject(model, ["2"], r=2)
    close(model(X), expected)
    start_branches(model)
    assert not torch.allclose(model(X), expected)


def test_a_refused_merge_unloads_nothing():
    model = make_model()
    model[2].lora_A.data[0, 0] = float("nan")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="not finite in 2; nothing was merged"):
        merge_and_unload(model, safe=True)
    assert [type(m) for m in model] == [LoRALinear, nn.Tanh, LoRALinear, nn.Linear]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    with pytest.raises(ValueError, match=re.escape("call merge() first")):
        model[0].unload()


@pytest.mark.parametrize("keep_base", [True, False])
def test_frozen_weights_shared_with_the_original_keep_their_values(keep_base):
    base = make_base()
    layer = LoRALinear.from_linear(base[0], r=2)
    nn.init.normal_(layer.lora_B)
    before = base[0].weight.clone()
    layer.merge(keep_base=keep_base)
    merge_and_unload(layer)
    assert torch.equal(base[0].weight, before) and not torch.equal(layer.weight, before)


# state dicts of merged models


def through_torch(state, path):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def through_safetensors(state, path):
    save_file(state, path / "model.safetensors")
    return load_file(path / "model.safetensors")


WAYS = {
    "itself": lambda state, path: state,
    "plain dict": lambda state, path: dict(state),
    "torch.save": through_torch,
    "safetensors": through_safetensors,
}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_merged_state_dict_is_refused(tmp_path, way, strict, assign):
    model = make_model()
    merge(model)
    state = WAYS[way](model.state_dict(), tmp_path)
    for other in (make_model(seed=2), make_model(r=2), model):
        if other is model:
            unmerge(model)
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(RuntimeError, match=r"0: the state dict is of a merged layer.*unmerge\(\)"):
            other.load_state_dict(state, strict=strict, assign=assign)
        for name, value in other.state_dict().items():
            assert torch.equal(value, before[name]), name
    layer = make_model()[0]
    with pytest.raises(RuntimeError, match="the layer: the state dict is of a merged layer"):
        layer.load_state_dict({k.removeprefix("0."): v for k, v in state.items() if k[0] == "0"}, strict=strict)


def test_a_merged_model_refuses_one_too():
    model, state = make_model(), make_model(seed=2).state_dict()
    merge(model)
    with pytest.raises(RuntimeError, match=r"0 is merged; call unmerge\(\) before"):
        model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"2 is merged; call unmerge\(\) before"):
        model.load_state_dict(state)


@pytest.mark.parametrize("way", WAYS)
def test_an_unmerged_state_dict_loads(tmp_path, way):
    model = make_model()
    expected = model(X)
    keys = model.state_dict().keys()
    merge(model), unmerge(model)
    assert model.state_dict().keys() == keys
    other = make_model(seed=2)
    other.load_state_dict(WAYS[way](model.state_dict(), tmp_path))
    assert torch.equal(other(X), expected)


def test_a_plain_merged_state_dict_under_a_trained_branch_is_not_silent():
    merged = merge_and_unload(make_model()).state_dict()
    trained = make_model()
    with pytest.raises(RuntimeError, match="Missing key"):
        trained.load_state_dict(merged)
    with pytest.warns(UserWarning, match="the branch now counts twice"):
        trained.load_state_dict(merged, strict=False)
    fresh, expected = make_base(), merge_and_unload(make_model())(X)
    inject(fresh, ["0", "2"], r=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(merged, strict=False)  # training goes on from the merged weights
        make_model().load_state_dict(make_model().state_dict())
        with torch.device("meta"):
            empty = make_base()
        inject(empty, ["0", "2"], r=2)
        empty.load_state_dict(merged, strict=False, assign=True)
    assert torch.equal(fresh(X), expected)


def test_merged_state_dicts_through_torch_checkpointing():
    """torch's distributed state dicts look every key up on the module."""
    checkpoint = pytest.importorskip("torch.distributed.checkpoint.state_dict")
    model = make_model()
    merge(model)
    state = checkpoint.get_model_state_dict(model)
    other = make_model()
    with pytest.raises(RuntimeError, match="the state dict is of a merged layer"):
        checkpoint.set_model_state_dict(other, state)
