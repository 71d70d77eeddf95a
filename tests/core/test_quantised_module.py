"""``inject`` over quantised layers: PEFT's start, packed weights in state dicts, adapters on disk, no merge."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora.heads import newly_drawn
from fastlora.quantised_module import QuantisedLoRALinear
from tests.support.quantised_models import FORMATS, bitsandbytes, decoded, quantise, quantise_model
from tests.support.tiny_llama import make_llama


def make(name="nf4 nested", dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(18, 24), nn.Tanh(), nn.Linear(24, 7, bias=False)).to(dtype)
    return quantise_model(model, name, **options)


def trained(model, seed=1):
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return model


def injected(*args, **options):
    model = make(*args, **options)
    fastlora.inject(model, "all-linear", r=3, alpha=7)
    return trained(model)


@pytest.mark.parametrize("name", FORMATS)
def test_layers_compute_over_the_librarys_values(name):
    model, plain = make(name, torch.bfloat16), make(name, torch.bfloat16)
    assert fastlora.inject(model, "all-linear", r=3, alpha=7, adapter_dtype=torch.float32) == ["0", "2"]
    trained(model)
    assert [type(layer) for layer in model] == [QuantisedLoRALinear, nn.Tanh, QuantisedLoRALinear]
    x = torch.randn(5, 18, dtype=torch.bfloat16)
    layer = model[0]
    assert layer.lora_A.dtype == torch.float32 and layer.weight.shape == plain[0].weight.shape
    wanted = fastlora.lora_linear(x, decoded(plain[0]), layer.lora_A, layer.lora_B, 7 / 3, plain[0].bias)
    assert torch.equal(layer(x), wanted)
    model(x).float().sum().backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        f"{i}.lora_{f}" for i in (0, 2) for f in "AB"
    }
    assert f"base={name.split()[0]}" in repr(model)


@pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["nf4", "float8"])
def test_one_seed_starts_as_in_peft(name, dtype):
    peft = pytest.importorskip("peft")
    model, base = make(name, dtype), make(name, dtype)
    torch.manual_seed(3)
    fastlora.inject(model, ["0"], r=3, adapter_dtype=torch.float32)
    torch.manual_seed(3)
    stock = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["0"]))
    layer = stock.base_model.model[0]
    assert torch.equal(model[0].lora_A, layer.lora_A["default"].weight)


def test_state_dicts_have_the_librarys_entries_and_load():
    plain, model = make(), injected()
    own = model.state_dict()
    assert own.keys() == plain.state_dict().keys() | {f"{i}.lora_{f}" for i in (0, 2) for f in "AB"}
    assert all(torch.equal(own[key], value) for key, value in plain.state_dict().items())
    other = injected()
    for layer in (other[0], other[2]):  # another weight altogether
        packed = quantise(nn.Linear(layer.in_features, layer.out_features), "nf4 nested")
        layer.weight, layer.quant_state = packed.weight, packed.quant_state
    x = torch.randn(5, 18)
    assert not torch.allclose(other(x), model(x))
    other.load_state_dict({key: value.clone() for key, value in own.items()})
    assert torch.equal(other(x), model(x))
    half = {key: value for key, value in own.items() if "absmax" not in key and "quant" not in key}
    with pytest.raises(RuntimeError, match=r"its codes and not their statistics \(0.weight.absmax\)"):
        other.load_state_dict(half)


@pytest.mark.parametrize("name", ["nf4 nested", "int8"])
def test_adapters_are_saved_and_loaded(name, tmp_path):
    model, fresh, x = injected(name), make(name), torch.randn(5, 18)
    fastlora.save_adapter(model, tmp_path)
    assert fastlora.load_adapter(fresh, tmp_path) == ["0", "2"]
    assert torch.equal(fresh(x), model(x))
    narrow = make(name, torch.bfloat16)
    fastlora.load_adapter(narrow, tmp_path)  # nothing of the file's float32 values is lost
    assert torch.equal(narrow[0].lora_B, model[0].lora_B)


def test_copies_and_pickles():
    model, x = injected(), torch.randn(5, 18)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), model(x)) and repr(clone) == repr(model)


def test_a_quantised_weight_is_not_taken_for_a_newly_drawn_one():
    """torchao's weight is a new parameter, without the mark that from_pretrained leaves."""
    model = make_llama()
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    fastlora.inject(quantise_model(model, "int8"), "all-linear")
    assert list(newly_drawn(model)) == []


def test_merging_is_refused_and_changes_nothing():
    model, x = injected(), torch.randn(5, 18)
    before = model(x)
    for merge in (fastlora.merge, fastlora.merge_and_unload, lambda model: model[0].merge()):
        with pytest.raises(ValueError, match="nf4 weight would be rounded.*save_adapter, then merge"):
            merge(model)
    assert torch.equal(model(x), before)
    layer = model[0]
    wanted = decoded(layer) + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.merged_weight(), wanted)


def test_a_dtype_that_the_layer_does_not_compute_in():
    model, x = injected(compute_dtype=torch.bfloat16), torch.randn(5, 18)
    with pytest.raises(
        TypeError, match=r"x is torch.float32, but the nf4 weight is decoded to torch.bfloat16.*autocast"
    ):
        model(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    model = injected(compute_dtype=torch.float32)
    assert model.to(torch.float32)(x).dtype == torch.float32
    model[0].compute_dtype = model[2].compute_dtype = None  # any that the adapters go with
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_what_cannot_take_a_branch():
    bnb = bitsandbytes()
    raw = nn.Sequential(bnb.nn.Linear4bit(18, 24), bnb.nn.Linear8bitLt(24, 7, has_fp16_weights=False))
    with pytest.raises(
        ValueError, match=r"0: this Linear4bit is not quantised yet.*1: it is a bitsandbytes.*Linear8bitLt"
    ):
        fastlora.inject(raw, ["0", "1"])
    with pytest.raises(TypeError, match="from_linear needs a quantised layer, got a Linear$"):
        QuantisedLoRALinear.from_linear(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="adapter_dtype torch.float16 does not go with a torch.float32 weight"):
        QuantisedLoRALinear.from_linear(make()[0], adapter_dtype=torch.float16)
    hooked = make()
    hooked[0].register_forward_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0: it carries hooks"):
        fastlora.inject(hooked, ["0"])


def test_warming_and_counting():
    model = injected()
    assert fastlora.warmup(model, 70).layers == 2
    assert fastlora.trainable_parameters(model).trainable == 3 * (18 + 24 + 24 + 7)


@pytest.mark.parametrize("name", FORMATS)
def test_dora_is_refused_and_changes_nothing(name):
    model = make(name, torch.bfloat16)
    before = list(model)
    with pytest.raises(ValueError, match=f"DoRA needs the norms of a dense weight, and this one is {name.split()[0]}"):
        fastlora.inject(model, "all-linear", dora=True)
    assert all(one is other for one, other in zip(model, before, strict=True))
