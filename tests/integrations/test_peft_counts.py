"""What ``patch`` and ``register`` say of a model, and the count of every LoRA layer that PEFT serves itself."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastlora

peft = pytest.importorskip("peft")
from peft.tuners.lora.layer import Linear as StockLinear  # noqa: E402
from peft.tuners.lora.layer import LoraLayer  # noqa: E402

from fastlora.integrations.peft import FusedLinear, patch, register, unpatch, unserved  # noqa: E402
from tests.support.peft_models import IDS, add_adapter, fallbacks, fused_calls, make_stock, randomise  # noqa: E402

IN_ATTENTION = "torch.nn.MultiheadAttention reads its weight and never calls it"
IN_ENCODER = "torch.nn.TransformerEncoderLayer in eval mode reads its weight and does not call it"


def not_stock(name, module="peft.tuners.lora.layer"):
    return f"a {module}.{name}, not a stock lora.Linear"


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 6, 5))
        self.down = nn.Parameter(torch.randn(3, 5, 6))

    def forward(self, x):
        return (x.unsqueeze(0) @ self.up @ self.down).sum(0)


class Packed(nn.Linear):
    """A base layer of some library, as quantised ones are."""


class PackedLora(nn.Module, LoraLayer):
    """What PEFT has for a quantisation library's layers: neither lora.Linear nor a subclass of it."""

    def __init__(self, target, adapter_name, r, lora_alpha, config, **kwargs):
        super().__init__()
        LoraLayer.__init__(self, target)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def forward(self, x):
        if self.disable_adapters:
            return self.base_layer(x)
        (name,) = self.active_adapters
        return self.base_layer(x) + self.lora_B[name](self.lora_A[name](x)) * self.scaling[name]


class Net(nn.Module):
    """Some module of another kind beside a layer that can be fused."""

    def __init__(self, special, copies_of_x):
        super().__init__()
        self.special, self.copies_of_x = special, copies_of_x
        self.plain = nn.Linear(6, 6)

    def forward(self, x):
        y = self.special(*[x] * self.copies_of_x)
        return self.plain(torch.ones(2, 6)) + (y[0] if isinstance(y, tuple) else y).sum()


# The module; its input; how often it takes it; PEFT's class for it; how many of these a call of the model calls.
CLASSES = {
    "Embedding": (lambda: nn.Embedding(7, 6), torch.arange(5), 1, not_stock("Embedding"), 1),
    "Conv1d": (lambda: nn.Conv1d(6, 4, 3), torch.ones(2, 6, 5), 1, not_stock("Conv1d"), 1),
    "Conv2d": (lambda: nn.Conv2d(6, 4, 3), torch.ones(2, 6, 5, 5), 1, not_stock("Conv2d"), 1),
    "Conv3d": (lambda: nn.Conv3d(6, 4, 3), torch.ones(2, 6, 5, 5, 5), 1, not_stock("Conv3d"), 1),
    "attention": (lambda: nn.MultiheadAttention(6, 2), torch.rand(4, 3, 6), 3, not_stock("MultiheadAttention"), 1),
    "experts": (Experts, torch.ones(4, 6), 1, not_stock("ParamWrapper"), 2),
    "quantised": (lambda: Packed(6, 4), torch.ones(4, 6), 1, not_stock("PackedLora", __name__), 1),
    "AdaLora": (lambda: nn.Linear(6, 4), torch.ones(4, 6), 1, not_stock("SVDLinear", "peft.tuners.adalora.layer"), 2),
}


def build(name, registered=False, **options):
    """(model, x) for one of CLASSES."""
    make, x, copies_of_x, *_ = CLASSES[name]
    torch.manual_seed(0)
    targets = {"target_modules": ["special", "plain"]}
    if name == "experts":
        targets = {"target_modules": ["plain"], "target_parameters": ["special.up", "special.down"]}
    if name == "AdaLora":
        config = peft.AdaLoraConfig(init_r=2, target_r=1, total_step=9, **targets)
    else:
        config = peft.LoraConfig(r=2, **targets, **options)
    config = register(config) if registered else config
    if name == "quantised":
        config._register_custom_module({Packed: PackedLora})
    model = peft.get_peft_model(Net(make(), copies_of_x), config)
    for parameter_name, parameter in model.named_parameters():
        if "lora_" in parameter_name:
            nn.init.normal_(parameter, std=0.3)
    return model, x


def expected_counts(name):
    *_, reason, calls = CLASSES[name]
    return {reason: calls}


@pytest.mark.parametrize("name", CLASSES)
def test_a_class_that_patch_leaves_alone_is_counted_at_every_call(name):
    stock, x = build(name)
    fused = copy.deepcopy(stock)
    patched = patch(fused)
    fastlora.reset_dispatch_counts()
    served = [] if name == "AdaLora" else ["base_model.model.plain"]
    assert list(patched) == served and patched.unserved == unserved(fused)
    (reason, calls), *_ = expected_counts(name).items()
    assert list(patched.unserved.values()).count(reason) == calls
    for model in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(model(x), stock(x))
        assert fallbacks() == {reason: calls} and fused_calls() == len(served)
        fastlora.reset_dispatch_counts()
    assert fused.state_dict().keys() == stock.state_dict().keys()
    fused(x).sum().backward(), stock(x).sum().backward()
    for (path, got), wanted in zip(fused.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=path)
    assert patch(fused) == patched  # a second time counts no call twice
    fastlora.reset_dispatch_counts()
    fused(x)
    assert fallbacks() == {reason: calls}
    unpatch(fused)
    fastlora.reset_dispatch_counts()
    torch.testing.assert_close(fused(x), stock(x), rtol=0, atol=0)
    assert not fallbacks() and not any(module._forward_pre_hooks for module in fused.modules())


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "AdaLora"])
def test_register_counts_the_same(name):
    stock, x = build(name)
    model, _ = build(name, registered=True)
    fastlora.reset_dispatch_counts()
    assert type(model.base_model.model.plain) is FusedLinear
    torch.testing.assert_close(model(x), stock(x))
    assert fallbacks() == expected_counts(name) and fused_calls() == 1
    assert "custom" not in str(model.peft_config["default"].to_dict().keys())


def test_register_leaves_other_entries_in_force():
    config = peft.LoraConfig(r=2, target_modules=["special", "plain"])
    config._register_custom_module({Packed: PackedLora})
    model = peft.get_peft_model(Net(Packed(6, 4), 1), register(config))
    assert type(model.base_model.model.special) is PackedLora
    assert set(config._custom_modules) == {nn.Module, Packed}


@pytest.mark.parametrize("name", ["Embedding", "attention", "experts"])
def test_the_count_says_when_no_branch_is_computed(name):
    model, x = build(name)
    patch(model)
    calls = CLASSES[name][-1]
    fastlora.reset_dispatch_counts()
    with model.disable_adapter():
        model(x)
    assert fallbacks() == {"adapters disabled": calls + 1}
    model.merge_adapter()
    fastlora.reset_dispatch_counts()
    model(x)
    assert fallbacks() == {"merged": calls + 1}
    model.unmerge_adapter()
    fastlora.reset_dispatch_counts()
    model(x)
    assert fallbacks() == expected_counts(name)


def test_a_layer_without_the_active_adapter():
    model, x = build("Embedding")
    add_adapter(model, "second", r=2, target_modules=["plain"])
    patch(model)
    model.set_adapter("second")
    fastlora.reset_dispatch_counts()
    model(x)
    assert fallbacks() == {"0 active adapters": 1} and fused_calls() == 1


@pytest.mark.parametrize("into", ["PeftModel", "plain model"])
def test_layers_that_an_adapter_brings_later_are_fused_or_counted(into):
    torch.manual_seed(0)
    net = Net(nn.Embedding(7, 6), 1)
    first = peft.LoraConfig(r=2, target_modules=["plain"])
    second = peft.LoraConfig(r=2, target_modules=["special", "plain"])
    if into == "PeftModel":
        model = peft.get_peft_model(net, first)
        assert len(patch(model, strict=True)) == 1
        model.add_adapter("second", second)
        model.set_adapter("second")
    else:
        model = peft.inject_adapter_in_model(first, net)
        assert len(patch(model, strict=True)) == 1
        peft.inject_adapter_in_model(second, model, "second")
        for module in model.modules():
            if isinstance(module, LoraLayer):
                module.set_adapter("second")
    net.other = nn.Linear(6, 6)
    x = torch.arange(5)
    for _ in range(2):
        fastlora.reset_dispatch_counts()
        model(x)
        assert fallbacks() == {not_stock("Embedding"): 1} and fused_calls() == 1
    third = peft.LoraConfig(r=2, target_modules=["other"])
    model.add_adapter("third", third) if into == "PeftModel" else peft.inject_adapter_in_model(third, model, "third")
    model(x)
    assert type(net.other) is FusedLinear
    net.other(torch.ones(2, 6))
    unpatch(model)
    assert type(net.other) is StockLinear and not any(module._forward_pre_hooks for module in model.modules())


def test_a_forward_replaced_on_the_instance_is_counted():
    model = make_stock()
    layer = model.base_model.model.q_proj
    stock_forward = layer.forward
    layer.forward = lambda x: stock_forward(x)
    assert patch(model) == ["base_model.model.down"]
    fastlora.reset_dispatch_counts()
    model(IDS)
    assert fallbacks() == {"its forward was replaced on the instance": 1} and fused_calls() == 1
    del layer.forward
    model(IDS)
    assert fallbacks()["stock again since patch has seen it"] == 1
    assert len(patch(model, strict=True)) == 2
    fastlora.reset_dispatch_counts()
    model(IDS)
    assert not fallbacks() and fused_calls() == 2


@pytest.mark.parametrize("name", ["Embedding", "experts"])
def test_compiled_models_break_no_graph_and_count_nothing(name):
    model, x = build(name)
    expected = model(x)
    patch(model)
    torch._dynamo.reset()
    fastlora.reset_dispatch_counts()
    compiled = torch.compile(model, fullgraph=name != "experts", backend="aot_eager")  # PEFT's own proxies break there
    torch.testing.assert_close(compiled(x), expected)
    assert fused_calls() == 1
    if name != "experts":
        assert not fallbacks()


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict):
    model, x = build("Embedding")
    patch(model)
    net = model.base_model.model.eval()
    program = torch.export.export(net, (x,), strict=strict)
    fastlora.reset_dispatch_counts()
    torch.testing.assert_close(program.module()(x), net(x))


STATES = {
    "DoRA with dropout": ({"use_dora": True, "lora_dropout": 0.5}, lambda model: None),
    "2 active adapters with dropout": ({}, lambda model: model.base_model.set_adapter(["default", "dropping"])),
    "adapters disabled": ({}, lambda model: model.base_model.disable_adapter_layers()),
    "merged": ({}, lambda model: model.merge_adapter()),
    "0 active adapters": ({}, lambda model: model.set_adapter("third")),
    "lora_A and lora_B differ in dtype": ({}, lambda model: model.base_model.model.down.lora_A.to(torch.bfloat16)),
    "torch.float32 input, torch.float32 base, torch.bfloat16 adapter": (
        {},
        lambda model: [model.base_model.model.down.lora_A.bfloat16(), model.base_model.model.down.lora_B.bfloat16()],
    ),
}


@pytest.mark.parametrize("reason", STATES)
def test_patch_lists_what_a_call_would_be_served_for_now(reason):
    options, change = STATES[reason]
    model = make_stock(**options)
    for name, targets, p in ("dropping", ["down"], 0.5), ("third", ["embed"], 0.0):
        if not options:
            add_adapter(model, name, r=2, target_modules=targets, lora_dropout=p)
    change(model)
    patched = patch(model)
    assert isinstance(patched, list) and "base_model.model.down" not in patched
    assert patched.unserved["base_model.model.down"] == reason
    assert type(model.base_model.model.down) is FusedLinear  # served as soon as its state allows
    with pytest.raises(ValueError, match=r"of \d LoRA layers cannot be served fused: .*down: " + reason):
        patch(model, strict=True)


def test_patch_prints_nothing_and_its_result_says_it_all(capsys):
    net = nn.ModuleDict({f"layer{i}": nn.Linear(3, 3) for i in range(6)})
    net["head"] = nn.Conv1d(3, 3, 1)
    model = peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["head", *net]))
    prefix = "base_model.model"
    for name in ("layer0", "layer2", "layer3", "layer5"):
        getattr(model.base_model.model, name).base_layer.weight.requires_grad_(True)
    patched = patch(model)
    expected = (
        f"2 of 7 LoRA layers fused; 5 by PEFT's forward: the base weight trains (4): {prefix}.layer0, "
        f"{prefix}.layer2, {prefix}.layer3, …; {not_stock('Conv1d')} (1): {prefix}.head"
    )
    assert str(patched) == repr(patched) == patched.summary == expected
    assert patched == [f"{prefix}.layer1", f"{prefix}.layer4"] and patched + ["x"] == [*patched, "x"]
    assert capsys.readouterr() == ("", "")
    other = pickle.loads(pickle.dumps(patched))
    assert other == patched and other.unserved == patched.unserved
    assert str(patch(make_stock())) == "2 of 2 LoRA layers fused"


class Attention(nn.MultiheadAttention):
    """Calls its output projection, as torch's own does not."""

    def __init__(self, *args):
        super().__init__(*args)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(self, x):
        return self.out_proj(x)


@pytest.mark.parametrize("kind", [nn.MultiheadAttention, Attention])
def test_an_output_projection_that_is_never_called_is_not_listed(kind):
    net = nn.ModuleDict({"attention": kind(6, 2)})
    patched = patch(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["out_proj"])))
    if kind is Attention:
        assert len(patched) == 1 and not patched.unserved
    else:
        assert not patched and list(patched.unserved.values()) == [IN_ATTENTION]


@pytest.mark.filterwarnings("ignore:.*nested tensors.*")
@pytest.mark.parametrize("target", ["linear1", "self_attn"])
def test_the_fast_path_of_torchs_encoder_stays_what_it_was(target):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2)})
    stock = randomise(peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=[target])))
    fused = copy.deepcopy(stock)
    assert len(patch(fused)) == (2 if target == "linear1" else 0)
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, False, True]])
    fastlora.reset_dispatch_counts()
    outputs = [model.base_model.model["encoder"](x, src_key_padding_mask=mask) for model in (stock, fused)]
    torch.testing.assert_close(*outputs)
    assert fused_calls() == (2 if target == "linear1" else 0)
    stock.eval(), fused.eval()
    outputs = [model.base_model.model["encoder"](x, src_key_padding_mask=mask) for model in (stock, fused)]
    assert torch.equal(*outputs)
    if target == "linear1":
        assert list(patch(fused).unserved.values()) == [IN_ENCODER] * 2
