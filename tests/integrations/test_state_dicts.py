"""State dicts of loralib and torchtune, and models of other homes: diffusers' attention."""

import copy
import re

import pytest
import torch
from torch import nn

from fastlora.integrations.state_dicts import LAYOUTS, adapter_state_dict, load_adapter_state_dict
from fastlora.model import inject, lora_layers, merge


def make_model(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"attn": nn.ModuleDict({"q": nn.Linear(6, 4), "v": nn.Linear(6, 4)}), "mlp": nn.Linear(4, 6)})
    if kwargs:
        inject(model, ["q", "v", "mlp"], **kwargs)
        for _, layer in lora_layers(model):
            nn.init.normal_(layer.lora_B)
    return model


def same(model, other):
    pairs = zip(lora_layers(model), lora_layers(other), strict=True)
    return all(torch.equal(a.lora_A, b.lora_A) and torch.equal(a.lora_B, b.lora_B) for (_, a), (_, b) in pairs)


NAMES = {
    "fastlora": ["attn.q.lora_A", "attn.q.lora_B"],
    "loralib": ["attn.q.lora_A", "attn.q.lora_B"],
    "torchtune": ["attn.q.lora_a.weight", "attn.q.lora_b.weight"],
    "peft": ["base_model.model.attn.q.lora_A.weight", "base_model.model.attn.q.lora_B.weight"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_round_trip(layout):
    model, other = make_model(r=2), make_model(seed=1, r=2)
    state = adapter_state_dict(model, layout)
    assert list(state)[:2] == NAMES[layout] and len(state) == 6
    assert [tuple(state[name].shape) for name in NAMES[layout]] == [(2, 6), (4, 2)]
    assert not same(model, other)
    assert load_adapter_state_dict(other, state) == ["attn.q", "attn.v", "mlp"]
    assert same(model, other)


def test_a_loralib_model_loads_strictly():
    """loralib's layers have this package's parameter names, so that a whole state dict loads as it is."""
    loralib = pytest.importorskip("loralib")
    torch.manual_seed(0)
    theirs = nn.Sequential(loralib.Linear(6, 4, r=2, lora_alpha=6))
    nn.init.normal_(theirs[0].lora_B)
    ours = nn.Sequential(nn.Linear(6, 4))
    inject(ours, ["0"], r=2, alpha=6)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 6)
    torch.testing.assert_close(ours(x), theirs(x))
    theirs.load_state_dict(ours.state_dict())
    load_adapter_state_dict(ours, loralib.lora_state_dict(theirs))


def test_the_names_of_a_loralib_model():
    state = {"attn.q.weight": torch.zeros(4, 6), "attn.q.bias": torch.zeros(4)}
    state |= {"attn.q.lora_A": torch.ones(2, 6), "attn.q.lora_B": torch.ones(4, 2)}
    model = make_model(r=2)
    model.attn.q.load_state_dict({name.removeprefix("attn.q."): value for name, value in state.items()})
    assert (model.attn.q(torch.ones(1, 6)) == 6 * 2 * model.attn.q.scaling).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mlp.lora_A"), "missing mlp.lora_A"),
        (lambda s: s.update({"attn.k.lora_A": torch.zeros(2, 6)}), "unexpected attn.k.lora_A"),
        (lambda s: s.update({"attn.q.magnitude": torch.zeros(4)}), "unexpected attn.q.magnitude"),
        (lambda s: s.update({"attn.q.weight": torch.zeros(4, 6)}), "unexpected attn.q.weight"),
        (lambda s: s.update({"mlp.lora_B": torch.zeros(6, 3)}), r"mlp.lora_B is \[6, 3\], the model's \[6, 2\]"),
    ],
)
def test_what_does_not_fit_changes_nothing(change, message):
    model = make_model(r=2)
    before = copy.deepcopy(model)
    state = adapter_state_dict(make_model(seed=1, r=2))
    change(state)
    with pytest.raises(ValueError, match=message):
        load_adapter_state_dict(model, state)
    assert same(model, before)


def test_merged_plain_and_unknown():
    model = make_model(r=2)
    state = adapter_state_dict(model)
    merge(model)
    with pytest.raises(ValueError, match="attn.q is merged; attn.v is merged; mlp is merged"):
        load_adapter_state_dict(model, state)
    for call in (lambda: adapter_state_dict(make_model()), lambda: load_adapter_state_dict(make_model(), {})):
        with pytest.raises(ValueError, match="no LoRALinear layer"):
            call()
    with pytest.raises(ValueError, match="layout must be one of .*'torchtune'.*, got 'megatron'"):
        adapter_state_dict(model, "megatron")


class Attention(nn.Module):
    """The layout of diffusers' Attention: a list holds the output projection and its dropout."""

    def __init__(self):
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x):
        y = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        for module in self.to_out:
            y = module(y)
        return y


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def check_trains(model, call, count):
    """In float64, in which merging changes a result by rounding alone and any mistake by far more."""
    model.double()
    expected = call().detach()
    names = inject(model, TARGETS, r=2)
    assert len(names) == count and sum(name.endswith("to_out.0") for name in names) == count // 4
    assert torch.equal(call(), expected)
    call().pow(2).mean().backward()
    for _, layer in lora_layers(model):
        assert layer.lora_B.grad.abs().sum() > 0 and layer.lora_A.grad is not None
        nn.init.normal_(layer.lora_B)
    changed = call()
    assert not torch.allclose(changed, expected)
    merge(model)
    torch.testing.assert_close(call(), changed)


def test_attention_with_a_projection_in_a_list():
    torch.manual_seed(0)
    model = nn.ModuleList([Attention(), Attention()])
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    check_trains(model, lambda: model[1](model[0](x)), 8)


def test_diffusers_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    x, text = (torch.randn(*shape, dtype=torch.float64) for shape in ((1, 4, 8, 8), (1, 3, 8)))
    count = sum(bool(re.search(r"to_(q|k|v|out\.0)$", name)) for name, _ in model.named_modules())
    check_trains(model, lambda: model(x, 1, text).sample, count)
