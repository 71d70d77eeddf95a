"""inject, merge, unmerge and trainable_parameters over whole models."""

import copy
import re

import pytest
import torch
from torch import nn

from fastlora.adapters.io import load_adapter, save_adapter
from fastlora.model import TrainableParameters, inject, lora_layers, merge, trainable_parameters, unmerge
from fastlora.module import LoRALinear

TARGETS = [
    ["q_proj"],
    ["q_proj", "up"],
    ["blocks.0.q_proj"],
    ["0.q_proj"],
    r".*\.1\..*_proj",
    r"blocks\.\d\.q_proj",
    r".*proj",
    "all-linear",
    "ALL-LINEAR",
]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(6, 6)
        self.v_proj = nn.Linear(6, 6, bias=False)
        self.up = nn.Linear(6, 6)
        self.norm = nn.LayerNorm(6)

    def forward(self, x):
        return self.norm(x + self.up(torch.tanh(self.q_proj(x)) * self.v_proj(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(6, 11, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_model(seed=0):
    torch.manual_seed(seed)
    return Model().double()


def start_branches(model, seed=1):
    torch.manual_seed(seed)
    for _, layer in lora_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


IDS = torch.arange(11).view(1, 11)


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_targets_match_as_in_peft(targets):
    peft = pytest.importorskip("peft")
    names = inject(make_model(), targets, r=2)
    stock = peft.get_peft_model(make_model(), peft.LoraConfig(r=2, target_modules=targets))
    assert names == stock.base_model.targeted_module_names


def test_same_start_as_peft_over_a_model():
    peft = pytest.importorskip("peft")
    model, stock = make_model(), make_model()
    torch.manual_seed(7)
    inject(model, ["q_proj", "up"], r=3)
    torch.manual_seed(7)
    stock = peft.get_peft_model(stock, peft.LoraConfig(r=3, target_modules=["q_proj", "up"]))
    starts = {name: value for name, value in stock.named_parameters() if "lora_A" in name}
    layers = list(lora_layers(model))
    assert len(layers) == len(starts) == 4
    for path, layer in layers:
        assert torch.equal(layer.lora_A, starts[f"base_model.model.{path}.lora_A.default.weight"])


def test_inject_replaces_freezes_and_keeps_the_function():
    model = make_model().eval()
    expected = model(IDS)
    names = inject(model, ["q_proj", "v_proj"], r=2, alpha=6, dropout=0.5, rslora=True)
    assert names == ["blocks.0.q_proj", "blocks.0.v_proj", "blocks.1.q_proj", "blocks.1.v_proj"]
    assert torch.equal(model(IDS), expected)
    for name in names:
        layer = model.get_submodule(name)
        assert type(layer) is LoRALinear and not layer.training
        assert (layer.r, layer.alpha, layer.dropout, layer.rslora) == (2, 6, 0.5, True)
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trains == {f"{name}.lora_{factor}" for name in names for factor in "AB"}


def test_injecting_again_adds_and_skips():
    model = make_model()
    first = inject(model, ["q_proj"], r=2)
    layer = model.blocks[0].q_proj
    assert inject(model, ["q_proj"], r=4) == []
    assert inject(model, ["q_proj", "up"], r=4) == ["blocks.0.up", "blocks.1.up"]
    assert model.blocks[0].q_proj is layer and layer.r == 2 and layer.lora_A.requires_grad
    assert [name for name, _ in lora_layers(model)] == sorted(first + ["blocks.0.up", "blocks.1.up"])
    assert inject(model, "all-linear") == ["blocks.0.v_proj", "blocks.1.v_proj", "head"]


def test_adapter_dtype():
    model = make_model().bfloat16()
    inject(model, ["up"], adapter_dtype=torch.float32)
    assert model.blocks[0].up.lora_A.dtype == torch.float32 and model.blocks[0].up.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("targets", [["query"], ["q_proj", "query"], ["proj"], "query", r"blocks\.0\.q", []], ids=str)
def test_a_target_without_a_match_names_what_would(targets):
    model = make_model()
    where = "in a list, " if isinstance(targets, str) else ""  # "query" alone is a regular expression for a whole path
    message = f"match no module of Model; {where}names that would match: head, q_proj, up, v_proj"
    with pytest.raises(ValueError, match=message):
        inject(model, targets)
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["embed"], "embed: it is a torch.nn.modules.sparse.Embedding, not a plain nn.Linear"),
        (["norm", "up"], "blocks.0.norm: it is a .*LayerNorm.*blocks.1.norm"),
        (r"blocks\.0.*", "blocks.0: it is a .*Block"),
        ("(", "is not a regular expression"),
    ],
)
def test_what_cannot_be_replaced_is_named_and_nothing_changes(targets, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        inject(model, targets)
    assert not list(lora_layers(model)) and all(p.requires_grad for p in model.parameters())


def test_targets_of_the_wrong_type():
    for targets in ([1], None, 3):
        with pytest.raises(TypeError, match=f"a list of strings, got {re.escape(repr(targets))}"):
            inject(make_model(), targets)
    with pytest.raises(ValueError, match="r must be at least 1"):
        inject(make_model(), ["up"], r=0)
    with pytest.raises(ValueError, match="no submodules"):
        inject(nn.Linear(2, 2), ["x"])


def test_tied_weights_are_refused():
    model = make_model()
    model.head.weight = model.embed.weight
    with pytest.raises(ValueError, match="head: its weight is tied to embed.weight"):
        inject(model, ["head"])
    inject(model, ["up"])  # the others are free
    model = make_model()
    model.again = model.blocks[0].up
    with pytest.raises(ValueError, match="blocks.0.up: its weight is tied to again.weight"):
        inject(model, ["up"])


def test_subclasses_are_refused():
    model = nn.ModuleDict({"out": nn.MultiheadAttention(4, 1)})
    with pytest.raises(ValueError, match="NonDynamicallyQuantizableLinear, not a plain"):
        inject(model, ["out_proj"])
    with pytest.raises(ValueError, match="no nn.Linear"):
        inject(model, "all-linear")


def test_hooks_are_not_lost():
    model = make_model()
    handle = model.blocks[1].up.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="blocks.1.up: it carries hooks"):
        inject(model, ["up"])
    handle.remove()
    assert len(inject(model, ["up"])) == 2


@pytest.mark.parametrize("hide", [nn.utils.weight_norm, nn.utils.spectral_norm], ids=["weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_a_weight_that_is_computed_is_refused(hide):
    model = make_model()
    hide(model.blocks[0].up)
    with pytest.raises(ValueError, match=r"blocks\.0\.up: its weight is no parameter"):
        inject(model, ["up"])
    assert len(inject(model, ["q_proj"])) == 2


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e4m3fn], ids=str)
def test_a_weight_of_8_bits_is_refused(dtype):
    model = make_model()
    model.blocks[1].up.weight = nn.Parameter(torch.zeros(6, 6).to(dtype), requires_grad=False)
    with pytest.raises(ValueError, match=rf"blocks\.1\.up: its weight does not do: it is {dtype} \[6, 6\]"):
        inject(model, ["up"])


def test_what_would_not_see_new_parameters_is_wrapped_last(tmp_path):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for wrap, manager in ((nn.parallel.DistributedDataParallel, "DistributedDataParallel"), (fully_shard, "FSDP")):
            model = wrap(make_model())
            with pytest.raises(ValueError, match=f"up: {manager}.* put LoRA in first, then wrap or shard"):
                inject(model, ["up"])
            assert not list(lora_layers(model))
        model = make_model()
        fully_shard(model.blocks[0])
        assert inject(model, ["1.up"]) == ["blocks.1.up"]  # beside what is sharded
        trained = make_model()
        inject(trained, ["up"])
        save_adapter(trained, tmp_path / "adapter")
        with pytest.raises(ValueError, match="load the adapter, then wrap"):
            load_adapter(nn.parallel.DistributedDataParallel(make_model()), tmp_path / "adapter")
    finally:
        dist.destroy_process_group()


def test_the_encoder_fast_path_cannot_skip_the_branch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    with pytest.raises(ValueError, match="set_fastpath_enabled"):
        inject(model, ["linear1", "linear2"], r=2)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        inject(model, ["linear1", "linear2"], r=2)
        x = torch.randn(1, 3, 8)
        with torch.no_grad():
            before = model(x)
            start_branches(model)
            assert not torch.equal(model(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_all_linear_leaves_the_output_head_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.GPTNeoXConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
    )
    model = transformers.GPTNeoXForCausalLM(config)
    stock = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear"))
    names = inject(model, "all-linear")
    assert names == stock.base_model.targeted_module_names
    assert not any("embed_out" in name for name in names)


def test_merge_and_unmerge():
    model = make_model().eval()
    inject(model, ["q_proj", "up"], r=2)
    start_branches(model)
    state = copy.deepcopy(model.state_dict())
    expected = model(IDS)
    merge(model)
    assert all(layer.merged for _, layer in lora_layers(model))
    torch.testing.assert_close(model(IDS), expected)
    unmerge(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(IDS), expected)
    merge(model, keep_base=False)
    torch.testing.assert_close(model(IDS), expected)


def test_safe_merge_merges_all_or_nothing():
    model = make_model()
    inject(model, ["q_proj", "up"], r=2)
    state = copy.deepcopy(model.state_dict())
    model.blocks[1].q_proj.lora_A.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in blocks\.1\.q_proj; nothing was merged"):
        merge(model, safe=True)
    assert not any(layer.merged for _, layer in lora_layers(model))
    assert torch.equal(model.blocks[0].q_proj.weight, state["blocks.0.q_proj.weight"])
    model.blocks[1].q_proj.lora_A.data.zero_()
    merge(model, safe=True)
    assert all(layer.merged for _, layer in lora_layers(model))


@pytest.mark.parametrize("function", [merge, unmerge])
def test_a_model_without_lora_layers(function):
    with pytest.raises(ValueError, match="Model has no LoRALinear layer; call fastlora.inject first"):
        function(make_model())


def test_trainable_parameters():
    model = make_model()
    total = sum(p.numel() for p in model.parameters())
    assert trainable_parameters(model) == TrainableParameters(total, total, 1.0)
    inject(model, ["q_proj", "v_proj"], r=3)
    added = 4 * 3 * (6 + 6)
    count = trainable_parameters(model)
    assert count == (added, total + added, added / (total + added))
    assert str(count) == f"trainable: 144 of {total + added} parameters ({count.share:.4%})"
    model.head.weight = model.embed.weight
    assert trainable_parameters(model).total == total + added - 66
    assert trainable_parameters(nn.Identity()) == (0, 0, 0.0)
    assert re.match(r"trainable: 1,000,000 of 2,000,000 ", str(TrainableParameters(10**6, 2 * 10**6, 0.5)))


def test_training_lowers_the_loss_and_moves_only_the_adapters():
    model = make_model()
    names = inject(model, ["q_proj", "v_proj", "up"], r=4, dropout=0.1)
    state = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(IDS)[0], IDS[0].roll(1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.75 * losses[0]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert moved == {f"{name}.lora_{factor}" for name in names for factor in "AB"}


def test_torch_func_over_a_frozen_weight_says_so():
    """What Opacus does with a layer that it has no rule for."""
    model = make_model()
    inject(model, ["up"], r=2)
    parameters = dict(model.named_parameters())
    with pytest.raises(ValueError, match="torch.func differentiates every parameter .* Opacus"):
        torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDS,)).sum())(parameters)
    trained = {name: p for name, p in parameters.items() if "lora_" in name}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(model, p, (IDS,)).square().sum())(trained)
    model(IDS).square().sum().backward()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, dict(model.named_parameters())[name].grad)


@pytest.mark.parametrize(
    ("theirs", "ours"), [("lora_alpha", "alpha"), ("lora_dropout", "dropout"), ("use_rslora", "rsl")]
)
def test_peft_s_names_of_arguments_are_told_ours(theirs, ours):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{theirs}'; here it is called '{ours}"):
        inject(make_model(), ["up"], **{theirs: 1})
    with pytest.raises(TypeError, match="unexpected keyword argument 'rank'$"):
        inject(make_model(), ["up"], rank=1)


class Shares(nn.Module):
    """One block under two parents, as models that repeat their layers have it."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleDict({"block": Block()})
        self.second = nn.ModuleDict({"block": self.first["block"]})

    def forward(self, x):
        return self.second["block"](self.first["block"](x))


def test_a_block_with_several_parents_is_adapted_once_as_by_peft(tmp_path):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = Shares().double()
    x = torch.randn(3, 6).double()
    stock = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "up"])
    )
    for name, parameter in stock.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter)
    stock.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    names = inject(model, ["q_proj", "up"], r=2, alpha=6)
    assert names == stock.base_model.targeted_module_names == ["first.block.q_proj", "first.block.up"]
    assert model.second["block"].up is model.first["block"].up
    load_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), stock(x))
    model(x).sum().backward()
    stock(x).sum().backward()
    gradients = {n: p.grad for n, p in stock.named_parameters() if p.grad is not None}
    for name in names:
        a = model.get_submodule(name).lora_A
        torch.testing.assert_close(a.grad, gradients[f"base_model.model.{name}.lora_A.default.weight"])
    save_adapter(model, tmp_path / "ours")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(loaded(x), model(x))


def test_tied_factors_save_with_a_message(tmp_path):
    model = start_branches(make_model())
    inject(model, ["up"], r=2)
    start_branches(model)
    model.blocks[1].up.lora_A = model.blocks[0].up.lora_A
    with pytest.warns(UserWarning, match="holds a copy for each of these: blocks.1.up.lora_A.weight to blocks.0.up"):
        save_adapter(model, tmp_path)
    other = make_model()
    load_adapter(other, tmp_path)
    assert torch.equal(other(IDS), model(IDS))
    load_adapter(model, tmp_path)  # tied already, and one value
    other.blocks[1].up.lora_A.data.add_(1)
    save_adapter(other, tmp_path)
    with pytest.raises(ValueError, match="are one tensor in the model, and differ in the file"):
        load_adapter(model, tmp_path)
