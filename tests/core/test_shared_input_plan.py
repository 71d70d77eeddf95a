"""Which layers that share an input are grouped."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import fastlora
from fastlora import inject, shared_inputs
from fastlora.module import LoRALinear
from fastlora.shared_input.plan import group, observe, ungroup
from tests.support.shared_attention import NAMES, Attention, Block, X, assert_agree, combine, counted, make, route, step


def test_groups_are_printed_and_in_the_order_of_calls():
    def call(attention, x):
        v, q = attention.v(x), attention.q(x)
        return combine(q, attention.k(x), v)

    torch.manual_seed(0)
    model = route(nn.Sequential(*(Block() for _ in range(3))).double(), call)
    inject(model, ["q", "k", "v", "out"], r=3, group=X)
    found = shared_inputs(model)
    assert found == {f"{i}.attention": (("v", "q", "k"),) for i in range(3)}
    assert repr(found) == "*.attention: v, q, k (3)"
    assert repr(shared_inputs(make(False))) == "no layers that share an input"


def test_nothing_but_the_same_object_unchanged_makes_a_group():
    def groups(function):
        model = nn.Sequential(Attention()).double()
        model[0].route = function
        return dict(observe(model, X.clone(), ["0.q", "0.k", "0.v"]))

    def changed(attention, x):
        q = attention.q(x)
        x.add_(1.0)
        return combine(q, attention.k(x), attention.v(x))

    assert groups(None) == {"0": (("q", "k", "v"),)}
    assert groups(lambda a, x: combine(a.q(x), a.k(x.clone()), a.v(x.view(x.shape)))) == {}  # equal, shared storage
    assert groups(changed) == {"0": (("k", "v"),)}
    assert groups(lambda a, x: combine(a.q(x), a.k(x), a.v(x) + a.v(x))) == {"0": (("q", "k"),)}  # v twice
    assert groups(lambda a, x: a.q(x)[..., :4] * a.k(x.sin())) == {}


def test_a_group_is_found_in_every_forward_of_its_parent():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Attention()

        def forward(self, x):
            self.inner.route = None
            first = self.inner(x)
            self.inner.route = lambda a, x: combine(a.q(x), a.k(x + 0), a.v(x))
            return first + self.inner(x)

    paths = [f"inner.{name}" for name in NAMES]
    assert observe(Twice().double(), X, paths) == {}
    siblings = nn.ModuleDict({"a": nn.Linear(12, 4), "b": Attention()}).double()
    siblings.forward = lambda x: siblings["a"](x) + siblings["b"].k(x)
    assert observe(siblings, X, ["a", "b.k"]) == {}  # of two parents


def test_an_observation_disturbs_nothing():
    model = nn.Sequential(nn.BatchNorm1d(12), nn.Dropout(0.5), Attention()).train()
    model[1].eval()
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    x = torch.randn(4, 12)
    torch.set_rng_state(state)
    model[1].forward = lambda x: x + torch.rand_like(x)  # draws in eval mode, too
    assert observe(model, (x,), ["2.q", "2.k"]) == {"2": (("q", "k"),)}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model] == [True, False, True]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_examples():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        @property
        def dummy_inputs(self):
            return {"x": X, "scale": 2.0}

        def forward(self, x, scale=1.0):
            return self.attention(x * scale)

    for example in (True, X, (X,), [X, 2.0], {"x": X, "scale": 2.0}):
        model = Model().double()
        inject(model, ["q", "k"], r=2, group=example)
        assert shared_inputs(model) == {"attention": (("q", "k"),)}
    model = nn.Sequential(Block()).double()
    for example, error, message in (
        (True, ValueError, "Sequential has none; give group= a batch"),
        ("text", TypeError, "got a str"),
        (X[..., :3], RuntimeError, "shapes cannot be multiplied"),
    ):
        with pytest.raises(error, match=message):
            inject(model, ["q", "k"], r=2, group=example)
    model.dummy_inputs = {"x": X}
    with pytest.raises(ValueError, match=r"Sequential does not run on its dummy_inputs \(TypeError"):
        inject(model, ["q", "k"], r=2, group=True)
    assert not any(isinstance(m, LoRALinear) for m in model.modules())


def test_state_dicts_copies_and_pickles():
    model, plain = make(), make(False)
    assert model.state_dict().keys() == plain.state_dict().keys()
    wanted = step(model)
    data = io.BytesIO()
    torch.save(model, data)
    data.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(data, weights_only=False)):
        with torch.no_grad():
            for p in model.parameters():  # which the copy must not read
                p.mul_(0.5)
        fastlora.reset_dispatch_counts()
        assert_agree(step(other), wanted)
        assert counted() == (2, {})
        model.load_state_dict(other.state_dict())


def test_replicas_compute_with_their_own_weights():
    """What nn.DataParallel makes of a module: a shallow copy whose parameters are plain tensors."""
    model = make(layers=1)
    attention = model[0].attention
    replica = attention._replicate_for_data_parallel()
    for name in NAMES:
        child = attention._modules[name]._replicate_for_data_parallel()
        for key, value in attention._modules[name]._parameters.items():
            setattr(child, key, None if value is None else value.detach() * 0.5)
        replica._modules[name] = child
    fastlora.reset_dispatch_counts()
    got = replica(X)
    assert counted() == (1, {})
    for p in attention.parameters():
        p.data.mul_(0.5)
    assert torch.equal(got, attention(X)) and counted() == (1, {})


def test_ungroup_and_unload_leave_nothing():
    for take in (ungroup, lambda model: fastlora.merge_and_unload(model)):
        model = make()
        take(model)
        assert shared_inputs(model) == {}
        for module in model.modules():
            assert not module._forward_hooks and not module._forward_pre_hooks
            assert not module._forward_hooks_always_called and "shares_input" not in vars(module)
        model(X)
        assert counted()[0] == 0
    model = make()
    group(model, {"0.attention": [("q", "v")]}, LoRALinear)  # in the place of q, k, v
    assert shared_inputs(model)["0.attention"] == (("q", "v"),)
    assert len(model[0].attention._forward_hooks) == 1 and not model[0].attention.k.shares_input
    step(model)
    assert counted() == (2, {})


def test_only_plain_lora_layers_are_in_a_group():
    model = nn.Sequential(Block()).double()
    inject(model, ["q"], r=2)
    inject(model, ["k"], r=2, group=X)
    assert shared_inputs(model) == {}
    assert group(model, {"0.attention": [("q", "k", "v"), ("v", "out")]}, LoRALinear) == {"0.attention": (("q", "k"),)}
