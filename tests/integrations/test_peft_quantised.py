"""Patched PEFT models over quantised bases: stock's losses and gradients, all calls served, the rest stays PEFT's."""

import copy
import pickle
import warnings

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from torch import nn

import fastlora

peft = pytest.importorskip("peft")

from fastlora.integrations.peft import patch, register, unpatch, unserved  # noqa: E402
from tests.support.peft_models import (  # noqa: E402
    IDS,
    Base,
    add_adapter,
    assert_draws_the_projects_mask,
    assert_same_training_step,
    fallbacks,
    fused_calls,
    layer_of,
    randomise,
)
from tests.support.quantised_models import FOUR_BIT, as_stored, bitsandbytes, quantise_model, torchao  # noqa: E402
from tests.support.tiny_llama import make_llama  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*get_apply_tensor_subclass.*"),
    pytest.mark.filterwarnings("ignore:Deprecation"),
    pytest.mark.filterwarnings("ignore:Merge lora module"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]
FORMATS = ("nf4 nested", "fp4", "int8", "float8")


def make_pair(name, dtype=torch.float32, compute_dtype=None, registered=False, **config):
    torch.manual_seed(0)
    base = quantise_model(Base().to(dtype), name, compute_dtype)
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 7, "target_modules": ["q_proj", "down"], **config})
    stock = randomise(peft.get_peft_model(base, config))
    fused = copy.deepcopy(stock)
    assert len(patch(fused)) == 2
    fastlora.reset_dispatch_counts()
    return stock, fused


def losses(model, ids, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    found = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    make_llama().save_pretrained(directory)
    return directory


def quantisation(name):
    """What a user of transformers says."""
    transformers = pytest.importorskip("transformers")
    if name in FOUR_BIT:
        bitsandbytes()
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=name[:3], bnb_4bit_use_double_quant="nested" in name
        )
    ao = torchao()
    config = ao.Int8WeightOnlyConfig(version=2) if name == "int8" else ao.Float8WeightOnlyConfig()
    return transformers.TorchAoConfig(config)


@pytest.mark.parametrize("name", FORMATS)
def test_a_llama_trains_with_the_losses_of_stock_and_every_call_served(name, llama):
    from transformers import LlamaForCausalLM

    ids = torch.arange(24).view(2, 12) % 19
    options = {"quantization_config": quantisation(name), "dtype": torch.float32, "device_map": "cpu"}
    base = as_stored(LlamaForCausalLM.from_pretrained(llama, **options))
    torch.manual_seed(0)
    stock = randomise(peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules="all-linear")))
    fused, *merged = (copy.deepcopy(stock) for _ in range(3))
    patch(merged[0])
    for model in merged:
        model.merge_adapter()
    assert torch.equal(*(model(input_ids=ids).logits for model in merged))
    assert str(patch(fused, strict=True)) == "14 of 14 LoRA layers fused"
    fastlora.reset_dispatch_counts()
    wanted = losses(stock, ids)
    assert fused_calls() == 0
    found = losses(fused, ids)
    assert fused_calls() == 3 * 2 * 14 and not fallbacks()
    assert abs(wanted[0] - wanted[-1]) > 1e-3, "nothing has trained"
    torch.testing.assert_close(found, wanted, rtol=64 * torch.finfo(torch.float32).eps, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMATS)
def test_one_step_of_each_format_and_dtype(name, dtype):
    stock, fused = make_pair(name, dtype)
    assert_same_training_step(stock, fused, dtype)
    assert fused_calls() == 4 and not fallbacks() and unserved(fused) == {}
    pairs = zip(fused.modules(), stock.modules(), strict=True)
    assert [type(m) is type(s) for m, s in pairs if isinstance(s, LoraLayer)].count(False) == 2
    assert list(fused.state_dict()) == list(stock.state_dict())


@pytest.mark.filterwarnings("ignore:.*lora_bias.*")
@pytest.mark.parametrize(
    "name, config",
    [
        ("nf4 nested", {"use_rslora": True}),
        ("nf4 nested", {"bias": "all"}),
        ("nf4 nested", {"lora_bias": True}),  # PEFT has none over torchao
        ("int8", {"bias": "all"}),
    ],
    ids=str,
)
def test_what_a_dense_layer_has(name, config):
    stock, fused = make_pair(name, **config)
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()


@pytest.mark.parametrize("name", FORMATS)
def test_autocast_with_the_dtypes_of_stock(name):
    """Of outputs, too: some of the libraries' layers return their input's dtype, some autocast's."""
    stock, fused = make_pair(name, compute_dtype=torch.bfloat16)
    x = torch.randn(5, 18)
    with torch.autocast("cpu", torch.bfloat16):
        for layer in ("q_proj", "down"):  # with a bias, and without
            shape = (5, 18)
            pair = [model.base_model.model.get_submodule(layer)(x.view(shape)) for model in (stock, fused)]
            assert pair[0].dtype == pair[1].dtype
        assert_same_training_step(stock, fused, torch.bfloat16)
    assert not fallbacks()


@pytest.mark.parametrize("name", FORMATS)
def test_a_bias_of_another_dtype(name):
    """bitsandbytes casts it, torchao's int8 adds it as it is, its float8 returns what comes of that."""
    stock, fused = make_pair(name, torch.bfloat16)
    x = torch.randn(5, 18, dtype=torch.bfloat16)
    for model in (stock, fused):
        layer_of(model).base_layer.bias.data = torch.randn(18, generator=torch.Generator().manual_seed(0))
    wanted, got = layer_of(stock)(x), layer_of(fused)(x)
    assert got.dtype == wanted.dtype
    assert (got - wanted).abs().max() <= 64 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    reason = "torch.bfloat16 input, torch.float32 bias"
    assert fallbacks() == ({} if name in FOUR_BIT else {reason: 1})


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_dropout_is_the_projects_own_mask(name):
    assert_draws_the_projects_mask(*make_pair(name, lora_dropout=0.5))


@pytest.mark.filterwarnings("ignore:Unmerge lora module", "ignore:Already unmerged")
def test_adapters_merging_saving_and_unpatching_are_pefts(tmp_path):
    stock, fused = make_pair("nf4 nested")
    for model in (stock, fused):
        add_adapter(model, "second", r=5, lora_alpha=3, target_modules=["q_proj", "down"])
        model.set_adapter("second")
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4 and not fallbacks()
    for model, folder in ((stock, "stock"), (fused, "fused")):
        model.save_pretrained(tmp_path / folder)
    files = sorted(path.relative_to(tmp_path / "stock") for path in (tmp_path / "stock").rglob("*.safetensors"))
    assert files and all((tmp_path / "stock" / f).read_bytes() == (tmp_path / "fused" / f).read_bytes() for f in files)
    for model in (stock, fused):
        model.merge_adapter()
    assert torch.equal(fused(IDS), stock(IDS)) and fallbacks() == {"merged": 2}
    for model in (stock, fused):
        model.unmerge_adapter()
    assert_same_training_step(stock, fused)
    with stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(IDS), stock(IDS))
    loaded = peft.PeftModel.from_pretrained(stock.unload(), tmp_path / "fused" / "second")
    patch(loaded)
    torch.testing.assert_close(loaded(IDS), fused(IDS))
    assert patch(fused) == unpatch(fused) and type(layer_of(fused)).__module__ == "peft.tuners.lora.bnb"


def test_torchao_merges_as_pefts_do():
    ao = torchao()
    stock, fused = make_pair("int8")
    for model in (stock, fused):
        for layer in (layer_of(model), model.base_model.model.down):
            layer.get_apply_tensor_subclass = lambda: ao.Int8WeightOnlyConfig(version=2)
        model.merge_adapter()
    assert torch.equal(fused(IDS), stock(IDS)) and fallbacks() == {"merged": 2}
    for model in (stock, fused):
        model.unmerge_adapter()
    fastlora.reset_dispatch_counts()
    assert_same_training_step(stock, fused)
    assert fused_calls() == 4


def test_copies_and_registered_layers_stay_fused():
    stock, fused = make_pair("nf4 nested")
    for clone in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert type(layer_of(clone)) is type(layer_of(fused)) and repr(clone) == repr(fused)
        assert torch.equal(clone(IDS), fused(IDS))
    assert not fallbacks() and repr(layer_of(fused)).startswith("lora.FusedLinear4bit(")
    for name, kind in (("nf4", "FusedLinear4bit"), ("float8", "FusedTorchaoLinear")):
        config = register(peft.LoraConfig(r=2, target_modules=["q_proj"]))
        model = peft.get_peft_model(quantise_model(Base(), name), config)
        assert type(layer_of(model)).__name__ == kind and unserved(model) == {}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["nf4 nested", "float8"])
def test_gradient_checkpointing(name, reentrant):
    from torch.utils.checkpoint import checkpoint

    stock, fused = make_pair(name, lora_dropout=0.3)
    x = torch.randn(5, 18, requires_grad=True)
    grads = []
    for run in (layer_of(fused), lambda x: checkpoint(layer_of(fused), x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        fused.zero_grad()
        dx = torch.autograd.grad(run(x).pow(2).sum(), x) if not reentrant else None
        torch.manual_seed(3)
        run(x).pow(2).sum().backward()
        grads.append([p.grad.clone() for p in layer_of(fused).parameters() if p.grad is not None] + list(dx or ()))
    assert all(map(torch.equal, *grads)) and not fallbacks()


def test_a_patched_layer_compiles_whole():
    stock, fused = make_pair("nf4 nested")
    torch._dynamo.reset()
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    wanted, got = stock(IDS), compiled(IDS)
    torch.testing.assert_close(got, wanted)
    got.pow(2).sum().backward(), wanted.pow(2).sum().backward()
    for (path, one), other in zip(fused.named_parameters(), stock.parameters(), strict=True):
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, msg=path)


class TestWhatPeftServes:
    def test_a_compute_dtype_that_differs_from_the_input(self):
        stock, fused = make_pair("nf4 nested", compute_dtype=torch.bfloat16)
        assert torch.equal(fused(IDS), stock(IDS))
        (reason,) = fallbacks()
        assert reason.startswith("torch.float32 input, compute dtype torch.bfloat16: set bnb_4bit_compute_dtype")
        with torch.autocast("cpu", torch.bfloat16):
            fused(IDS)
        assert fallbacks() == {reason: 2}
        _, fused = make_pair("nf4 nested", compute_dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            fused(IDS)
        (reason,) = fallbacks()
        assert reason.startswith("torch.bfloat16 input, compute dtype torch.float32")

    def test_a_layer_without_a_compute_dtype_takes_its_first_inputs(self):
        stock, fused = make_pair("nf4")
        for model in (stock, fused):
            base = layer_of(model).base_layer
            base.compute_dtype, base.compute_type_is_set = None, False
        assert_same_training_step(stock, fused)
        assert layer_of(fused).base_layer.compute_dtype == layer_of(stock).base_layer.compute_dtype == torch.float32

    def test_a_weight_that_is_not_quantised_yet_or_has_lost_its_state(self):
        stock, fused = make_pair("nf4")
        base = layer_of(fused).base_layer
        base.weight.quant_state = base.quant_state = None
        assert "lost its quant_state" in unserved(fused)["base_model.model.q_proj"]
        base.weight.bnb_quantized = False
        assert "not quantised yet" in unserved(fused)["base_model.model.q_proj"]
        with pytest.raises(ValueError, match="1 of 2 LoRA layers cannot be served fused: .*not quantised yet"):
            patch(fused, strict=True)
        # bitsandbytes finds a state on the layer alone, and so does the fused layer.
        state = layer_of(stock).base_layer.quant_state
        base.quant_state = state
        assert_same_training_step(stock, fused)
        assert not fallbacks()

    def test_hooks_on_the_base_layer(self):
        _, fused = make_pair("nf4")
        layer_of(fused).base_layer.register_forward_pre_hook(lambda *_: None)
        assert unserved(fused) == {"base_model.model.q_proj": "hooks on base_layer"}

    def test_llm_int8_quantises_the_input(self):
        bnb = bitsandbytes()
        model = Base()
        linear = bnb.nn.Linear8bitLt(18, 18, has_fp16_weights=False)
        linear.load_state_dict(model.q_proj.state_dict())
        model.q_proj = linear.to("cpu")
        model.is_loaded_in_8bit = True
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        patched = patch(model)
        reason = "LLM.int8 quantises the layer's input as well"
        assert patched.unserved == {"base_model.model.q_proj": reason}
        fastlora.reset_dispatch_counts()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(IDS)
        assert fallbacks() == {reason: 1} and fused_calls() == 0

    def test_dynamic_and_unknown_quantisers_of_torchao(self):
        ao = torchao()
        configs = {
            "this LinearActivationQuantizedTensor quantises the layer's input as well": (
                ao.Int8DynamicActivationInt8WeightConfig()
            ),
            "base_layer holds a IntxUnpackedToInt8Tensor": ao.IntxWeightOnlyConfig(),
        }
        for reason, config in configs.items():
            torch.manual_seed(0)
            base = Base()
            ao.quantize_(base.q_proj, config)
            stock = randomise(peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"])))
            fused = copy.deepcopy(stock)
            patch(fused)
            fastlora.reset_dispatch_counts()
            assert torch.equal(fused(IDS), stock(IDS))
            assert fallbacks() == {reason: 1} and fused_calls() == 0


def test_a_warm_up_knows_the_decoded_shapes(monkeypatch):
    calls = []
    monkeypatch.setattr("fastlora.warming.compile_ahead", lambda found, *rest: calls.extend(found) or 0)
    _, fused = make_pair(FOUR_BIT[0], torch.bfloat16)
    assert fastlora.warmup(fused, 70).layers == 2
    assert {spec.sizes[1:] for _, spec in calls} == {(18, 18, 3), (7, 18, 3)}
    assert {spec.dtype for _, spec in calls} == {torch.bfloat16}


def test_a_linear_stays_what_it_is():
    """The fused class of dense layers is untouched by what is made for quantised ones."""
    model = peft.get_peft_model(Base(), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    patch(model)
    assert type(layer_of(model)).__name__ == "FusedLinear" and type(layer_of(model).base_layer) is nn.Linear
