"""``adapter_names`` of a patched model: at inference the numbers of stock, in training those of each adapter alone."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import fastlora
from tests.support import tiny_llama

peft = pytest.importorskip("peft")

from fastlora.integrations.peft import patch, unpatch  # noqa: E402
from tests.support.peft_models import Base, fallbacks, fused_calls, layer_of, make_stock, randomise  # noqa: E402

NAMES = ["second", "default", "__base__", "third", "default"]
IDS = torch.arange(5 * 7).view(5, 7) * 5 % 13
OTHERS = {"second": {"r": 5, "lora_alpha": 2}, "third": {"r": 1, "lora_alpha": 1}}


def make_mixed(names=OTHERS, dtype=torch.float32, autocast_adapter_dtype=True, **config):
    """A stock model of three adapters, of ranks and scalings of their own, that all train."""
    model = make_stock(dtype=dtype, autocast_adapter_dtype=autocast_adapter_dtype, **config)
    targets = {"target_modules": ["q_proj", "down"], **config}
    for seed, name in enumerate(names):
        model.add_adapter(
            name, peft.LoraConfig(**{**targets, **OTHERS[name]}), autocast_adapter_dtype=autocast_adapter_dtype
        )
        randomise(model, name, seed=seed)
    model.set_requires_grad(["default", *names])
    return model


def patched(stock):
    fused = copy.deepcopy(stock)
    patch(fused)
    fastlora.reset_dispatch_counts()
    return fused


def step(model, ids, names):
    """What each sample gives, and the gradients of the sum over samples, by parameter."""
    model.zero_grad()
    output = model(ids, adapter_names=names) if names is not None else model(ids)
    output.float().pow(2).mean((1, 2)).sum().backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def each_alone(stock, ids, names):
    """The same, by stock PEFT, each adapter with its own samples."""
    outputs, gradients = [None] * len(names), {}
    for name in dict.fromkeys(names):
        rows = [i for i, other in enumerate(names) if other == name]
        if name == "__base__":
            with stock.disable_adapter(), torch.no_grad():
                output = stock(ids[rows])
        else:
            stock.set_adapter(name)
            output, found = step(stock, ids[rows], None)
            gradients.update({key: value for key, value in found.items() if f".{name}" in key})
        for row, value in zip(rows, output, strict=True):
            outputs[row] = value
    return torch.stack(outputs), gradients


def assert_near(got, wanted, dtype=torch.float32):
    slack = 64 * torch.finfo(dtype).eps
    assert got.dtype == wanted.dtype and (got - wanted).abs().max() <= slack * wanted.abs().max()


def assert_trains_as_alone(stock, fused, dtype=torch.float32):
    output, got = step(fused, IDS, NAMES)
    expected, wanted = each_alone(stock, IDS, NAMES)
    assert_near(output, expected, dtype)
    assert got.keys() == wanted.keys()
    for name, gradient in got.items():
        assert_near(gradient, wanted[name], dtype)


def test_inference_has_the_numbers_of_stock_in_one_call_a_layer():
    stock = make_mixed().eval()
    fused = patched(stock)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            fastlora.reset_dispatch_counts()
            assert_near(fused(IDS, adapter_names=NAMES), stock(IDS, adapter_names=NAMES))
            assert fused_calls() == 2 and not fallbacks()
    fused(IDS, adapter_names=NAMES).sum().backward()  # by tensors that no inference mode has made


def test_training_gives_each_adapter_the_gradients_of_its_own_rows():
    stock = make_mixed()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        stock(IDS, adapter_names=NAMES)
    fused = patched(stock)
    assert_trains_as_alone(stock, fused)
    assert not fallbacks()


def test_other_rows_change_no_bit_of_an_adapters_gradients():
    fused = patched(make_mixed())
    _, before = step(fused, IDS, NAMES)
    before = {name: gradient.clone() for name, gradient in before.items()}
    with torch.no_grad():
        for name, parameter in fused.named_parameters():
            if ".third." in name:
                parameter.fill_(torch.nan)
    ids = IDS.clone()
    ids[[0, 2, 3]] = 3  # of second, nobody and third
    _, after = step(fused, ids, NAMES)
    own = [name for name in before if ".default." in name]
    assert own and all(torch.equal(before[name], after[name]) for name in own)
    assert all(after[name].isnan().any() for name in after if ".third." in name)


def test_an_adapter_without_rows_has_no_gradient():
    fused = patched(make_mixed())
    _, gradients = step(fused, IDS[:2], ["second", "__base__"])
    assert gradients and all(".second." in name for name in gradients)


@pytest.mark.parametrize("autocast_adapter_dtype", [False, True])
def test_a_bfloat16_base(autocast_adapter_dtype):
    stock = make_mixed(dtype=torch.bfloat16, autocast_adapter_dtype=autocast_adapter_dtype)
    fused = patched(stock)
    assert_trains_as_alone(stock, fused, torch.bfloat16)
    assert not fallbacks()


def test_autocast():
    stock = make_mixed()
    fused = patched(stock)
    with torch.autocast("cpu", torch.bfloat16):
        assert_trains_as_alone(stock, fused, torch.bfloat16)
    assert not fallbacks()


def test_dropout_has_the_plain_layers_mask():
    fused = patched(make_mixed(lora_dropout=0.5))
    layer, x = layer_of(fused), torch.randn(5, 7, 18)
    torch.manual_seed(3)
    y = layer(x, adapter_names=["default"] * 5)
    torch.manual_seed(3)
    torch.testing.assert_close(y, layer(x))
    assert not torch.equal(y, layer(x)) and not fallbacks()


def test_adapters_of_several_dropouts_are_pefts_in_training():
    model = make_mixed(names=[], lora_dropout=0.5)
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj", "down"], lora_dropout=0.25))
    fused = patched(model)
    names = ["default", "second"]
    fused(IDS[:2], adapter_names=names)
    assert fallbacks() == {"adapters of several lora_dropout": 2}
    fastlora.reset_dispatch_counts()
    fused.eval()
    assert_near(fused(IDS[:2], adapter_names=names), model.eval()(IDS[:2], adapter_names=names))
    assert not fallbacks()


def test_layers_that_peft_serves_train_as_alone_as_well():
    config = {"target_modules": ["embed", "q_proj", "down"]}
    stock = make_mixed(**config)
    fused = patched(stock)
    assert_trains_as_alone(stock, fused)
    assert sum(fallbacks().values()) == 1  # the embedding, by its class


def test_modules_to_save_train_by_adapter():
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj"], "modules_to_save": ["down"]}
    stock = peft.get_peft_model(Base(), peft.LoraConfig(r=2, **options))
    stock.add_adapter("second", peft.LoraConfig(r=3, **options))
    stock.set_requires_grad(["default", "second"])
    randomise(stock), randomise(stock, "second")
    fused = patched(stock)
    names = ["default", "second", "second"]
    output, got = step(fused, IDS[:3], names)
    expected, wanted = each_alone(stock, IDS[:3], names)
    assert_near(output, expected)
    assert got.keys() == wanted.keys() and any("modules_to_save.second" in name for name in got)
    for name, gradient in got.items():
        assert_near(gradient, wanted[name])


def llama_pair():
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj", "down_proj"]}
    model = peft.get_peft_model(tiny_llama.make_llama(), peft.LoraConfig(r=2, **options))
    model.add_adapter("second", peft.LoraConfig(r=3, **options))
    model.set_requires_grad(["default", "second"])
    randomise(model), randomise(model, "second")
    plain = copy.deepcopy(model)
    patch(plain), patch(model)
    return plain.train(), model.train()


def llama_step(model, ids, names):
    model.zero_grad()
    model(input_ids=ids, adapter_names=names).logits.pow(2).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_knows_the_names_when_it_computes_again(use_reentrant):
    plain, checkpointed = llama_pair()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed.enable_input_require_grads()
    functions = [m._gradient_checkpointing_func for m in checkpointed.modules() if hasattr(m, "gradient_checkpointing")]
    names = ["second", "__base__", "default"]
    wanted, got = (llama_step(model, IDS[:3], names) for model in (plain, checkpointed))
    assert got.keys() == wanted.keys() and any(".second." in name for name in got)
    for name, gradient in got.items():
        assert_near(gradient, wanted[name])
    assert not fallbacks() and not any(m._forward_pre_hooks for m in checkpointed.modules() if "q_proj" in str(m)[:9])
    assert functions == [
        m._gradient_checkpointing_func for m in checkpointed.modules() if hasattr(m, "gradient_checkpointing")
    ]


class Checkpointed(Base):
    use_reentrant = False

    def forward(self, ids):
        hidden = self.embed(ids).requires_grad_()
        return self.down(checkpoint(self.q_proj, hidden, use_reentrant=self.use_reentrant))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_that_would_not_know_the_names_is_an_error(use_reentrant):
    base = Checkpointed()
    base.use_reentrant = use_reentrant
    fused = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fused.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    patch(fused)
    if use_reentrant:
        with pytest.raises(ValueError, match="adapter_names in training mode without gradients"):
            fused(IDS[:1], adapter_names=["second"])
    else:
        with pytest.raises(CheckpointError):
            fused(IDS[:1], adapter_names=["second"]).sum().backward()
    assert not any(module._forward_pre_hooks for module in fused.modules() if isinstance(module, nn.Linear))


def test_what_peft_refuses_is_refused():
    stock = make_mixed()
    fused = patched(stock)
    with pytest.raises(ValueError, match="adapters that do not exist: fourth"):
        fused(IDS, adapter_names=["fourth"] * 5)
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        fused(IDS, adapter_names=NAMES[:3])
    fused.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        fused(IDS, adapter_names=NAMES)
    fused.unmerge_adapter()
    output, _ = step(fused, IDS, NAMES)  # after errors, too, no hook is left
    assert output.shape == (5, 7, 7)
    torch.testing.assert_close(fused(IDS), stock(IDS))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_and_unpatch(clone):
    stock = make_mixed()
    fused = patched(stock)
    assert_trains_as_alone(stock, clone(fused))
    unpatch(fused)
    assert repr(fused) == repr(stock)
    with pytest.raises(ValueError, match="in training mode"):
        fused(IDS, adapter_names=NAMES)


@pytest.mark.parametrize("shape", [(5, 18), (5, 2, 3, 18)])
def test_inputs_of_other_dimensions(shape):
    stock = make_mixed().eval()
    fused, x = patched(stock), torch.randn(shape)
    assert_near(layer_of(fused)(x, adapter_names=NAMES), layer_of(stock)(x, adapter_names=NAMES))
    assert not fallbacks()


def test_compiled():
    stock = make_mixed().eval()
    fused, x = patched(stock), torch.randn(5, 7, 18)
    layer = layer_of(fused)
    compiled = torch.compile(lambda x: layer(x, adapter_names=NAMES), backend="aot_eager", fullgraph=True)
    assert_near(compiled(x), layer_of(stock)(x, adapter_names=NAMES))


@pytest.mark.parametrize("kind", ["Mixtral", "GptOss"])
def test_experts_of_several_adapters(kind):
    """Which stock PEFT refuses at inference, too."""
    from tests.support.tiny_moe import IDS as MOE_IDS
    from tests.support.tiny_moe import PARAMETERS, make_peft

    stock = make_peft(kind)
    options = {"target_modules": ["q_proj"], "target_parameters": PARAMETERS}
    stock.add_adapter("second", peft.LoraConfig(r=2, lora_alpha=3, **options))
    randomise(stock, "second")
    fused = patched(stock)
    fused.set_requires_grad(["default", "second"])
    ids = torch.cat([MOE_IDS, MOE_IDS + 1])[:, :6] % 31
    names = ["second", "default", "__base__", "second"]

    def loss_of(model, rows, **kwargs):
        return model(input_ids=ids[rows], **kwargs).logits.pow(2).mean((1, 2)).sum()

    total = loss_of(fused, [0, 1, 2, 3], adapter_names=names)
    total.backward()
    losses = []
    for name in ("second", "default"):
        stock.set_adapter(name)
        losses.append(loss_of(stock, [i for i in range(4) if names[i] == name]))
        losses[-1].backward()
        for (key, got), wanted in zip(fused.named_parameters(), stock.parameters(), strict=True):
            if f".{name}." in key:
                assert_near(got.grad, wanted.grad)
    with stock.disable_adapter(), torch.no_grad():
        losses.append(loss_of(stock, [2]))
    assert_near(total, sum(losses))
    assert fallbacks() == {}
    with pytest.raises(ValueError, match="does not support mixed adapter batches"):
        stock.eval()(input_ids=ids, adapter_names=names)
    expected = fused(input_ids=ids, adapter_names=names).logits
    fused.eval()
    assert torch.equal(fused(input_ids=ids, adapter_names=names).logits, expected)
