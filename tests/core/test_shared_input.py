"""Layers that share an input: which are grouped, when they are computed together, and why not in every other case."""

import copy
import gc
import io
import pickle
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import inject, shared_inputs
from fastlora.module import LoRALinear
from fastlora.shared_input import scope
from fastlora.shared_input.plan import group, observe, ungroup

NAMES = ("q", "k", "v")
X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ALONE = "no sibling that could be computed ahead"
APART = "checkpointed, or without gradients, apart from its parent"
CHANGED = "the input or the layer has changed since its group was computed"
UNFETCHED = "computed ahead and never called for"


class Attention(nn.Module):
    """Calls its children as ``route`` says, q, k and v of x by default, and returns what it makes of their results."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 4, bias=False), nn.Linear(12, 4)
        self.out = nn.Linear(4, 12)
        self.route = None

    def forward(self, x):
        if self.route is not None:
            return self.route(self, x)
        return combine(self.q(x), self.k(x), self.v(x))


def combine(q, k, v):
    return torch.tanh(q[..., :4] * k) + v


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return x + self.attention.out(self.attention(x))


def make(grouped=True, dropout=0.0, layers=2, **options):
    torch.manual_seed(0)
    model = nn.Sequential(*(Block() for _ in range(layers))).double()
    torch.manual_seed(1)
    inject(model, ["q", "k", "v", "out"], r=3, dropout=dropout, group=X if grouped else False, **options)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.3)
    fastlora.reset_dispatch_counts()
    return model


def route(model, function):
    """Has the attention of every block run as ``function(attention, x)`` says."""
    for block in model:
        block.attention.route = function
    return model


def step(model, wrap=None, x=X):
    """Output and gradients of one training step, the same random numbers each time."""
    torch.manual_seed(5)
    x = x.clone().requires_grad_()
    y = model(x) if wrap is None else wrap(model, x)
    model.zero_grad()
    y.pow(2).sum().backward()
    return y.detach(), x.grad, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_agree(got, wanted):
    """What ``step`` returns, in float64, whose roundings are far below the change of any seed, factor or input."""
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


def counted():
    """Groups computed, and the reasons of calls of single layers; then counts anew."""
    counts = fastlora.dispatch_counts()
    fastlora.reset_dispatch_counts()
    return counts.get("groups", 0), {r.removeprefix("shared input: "): n for r, n in counts["fallbacks"].items()}


def assert_as_ungrouped(function=None, *, groups, fallbacks, dropout=0.0, wrap=None, prepare=None):
    """A training step of a grouped model has the values of an ungrouped one, by so many groups and reasons."""
    models = [route(make(grouped, dropout), function) for grouped in (True, False)]
    for model in models:
        if prepare is not None:
            prepare(model)
        fastlora.reset_dispatch_counts()
    got = step(models[0], wrap=wrap)
    assert counted() == (groups, fallbacks)
    assert_agree(got, step(models[1], wrap=wrap))
    assert scope._thread.scope is None


# ------------------------------------------------------------------------------------------------- what is grouped


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


# -------------------------------------------------------------------------------------------- what is computed when


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_group_has_the_values_of_single_layers(dropout):
    assert_as_ungrouped(groups=2, fallbacks={}, dropout=dropout)
    grouped, plain = make(dropout=dropout), make(False, dropout)
    torch.manual_seed(3)
    first = grouped[0].attention(X)
    torch.manual_seed(3)
    assert torch.equal(first, plain[0].attention(X))


def test_without_gradients_and_in_inference_mode():
    model, plain = make().eval(), make(False).eval()
    fastlora.reset_dispatch_counts()
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    assert counted() == (2, {})
    with torch.inference_mode():
        assert torch.equal(model(X), plain(X))
    # Only the first x was made outside of inference mode.
    assert counted() == (1, {"inference tensors, whose changes nobody sees": 3})
    with torch.inference_mode():
        made = make()
    with torch.no_grad():
        assert torch.equal(made(X), plain(X))
    assert counted()[1] == {"inference tensors, whose changes nobody sees": 6}


def test_another_order_and_calls_left_out_or_repeated():
    def turned(attention, x):
        v, k = attention.v(x), attention.k(x)
        return combine(attention.q(x), k, v)

    def partly(attention, x):
        return combine(attention.q(x), attention.k(x), attention.k(x))

    assert_as_ungrouped(turned, groups=2, fallbacks={})
    assert_as_ungrouped(partly, groups=2, fallbacks={"called again": 2, UNFETCHED: 2})


def test_seeds_are_drawn_in_the_order_of_calls():
    def late(attention, x):
        v = attention.v(x)
        return combine(attention.q(x), attention.k(x), v)

    models = [route(make(grouped, 0.5), None) for grouped in (True, False)]
    for model in models:
        group(model, {f"{i}.attention": [("v", "q", "k")] for i in range(2)} if model is models[0] else {}, LoRALinear)
        route(model, late)
    assert_agree(step(models[0]), step(models[1]))


@pytest.mark.parametrize(
    "other, fallbacks",
    [
        (lambda x: x.clone(), {CHANGED: 4}),
        (lambda x: x.view(x.shape), {CHANGED: 4}),
        (lambda x: x.detach(), {CHANGED: 4}),
        (lambda x: x, {}),
    ],
    ids=["equal", "shared storage", "detached", "the same"],
)
def test_handed_out_for_the_very_same_input(other, fallbacks):
    def call(attention, x):
        q, x = attention.q(x), other(x)
        return combine(q, attention.k(x), attention.v(x))

    assert_as_ungrouped(call, groups=2, fallbacks=fallbacks)


def test_handed_out_for_an_unchanged_input():
    def call(attention, x, layers=NAMES):
        x = x + 0.0
        made = []
        for name in layers:
            made.append(attention._modules[name](x).detach())
            x += 1.0
        return made

    model, plain = make(), make(False)
    with torch.no_grad():
        got, wanted = (call(m[0].attention, X) for m in (model, plain))
    assert counted()[1] == {"outside its parent's forward": 3}
    route(model, call), route(plain, call)
    with torch.no_grad():
        got, wanted = (m[0].attention(X) for m in (model, plain))
    assert counted() == (1, {CHANGED: 2}) and all(map(torch.equal, got, wanted))

    def leaf(attention, x):
        x = x.detach()
        q = attention.q(x)
        return combine(q, attention.k(x.requires_grad_()), attention.v(x)), x

    route(model, leaf)
    y, x = model[0].attention(X.clone())
    y.sum().backward()
    assert counted() == (1, {CHANGED: 2}) and x.grad is not None


def _replace(name):
    def change(attention):
        old = getattr(attention.v, name)
        new = nn.Parameter(old.detach() * 2, requires_grad=old.requires_grad)
        with torch.no_grad():
            while new._version < old._version:  # so that its version does not give it away
                new.add_(0.0)
        setattr(attention.v, name, new)

    return change


def _freeze(attention):
    attention.k.lora_A.requires_grad_(False)


def _scale(attention):
    attention.k.scaling = 7.0


def _stop_dropping(attention):
    attention.k.eval()


def _merge(attention):
    attention.k.merge()


def _swap(attention):
    attention.k = copy.deepcopy(attention.k)
    with torch.no_grad():
        attention.k.lora_B.mul_(3.0)


@pytest.mark.parametrize(
    "change, fallbacks",
    [
        *((_replace(name), {CHANGED: 1}) for name in ("weight", "lora_A", "lora_B", "bias")),
        (_freeze, {CHANGED: 1}),
        (_scale, {CHANGED: 1}),
        (_stop_dropping, {CHANGED: 1}),
        (_merge, {UNFETCHED: 1}),
        (_swap, {ALONE: 1, UNFETCHED: 1}),
    ],
)
def test_handed_out_for_an_unchanged_layer(change, fallbacks):
    """A change of k or v after q was called, which a single call of it would see."""

    def call(attention, x):
        q = attention.q(x)
        change(attention)
        return combine(q, attention.k(x), attention.v(x))

    dropout = 0.4 if change is _stop_dropping else 0.0
    model, plain = (route(make(grouped, dropout, layers=1), call) for grouped in (True, False))
    if dropout:
        for each in (model, plain):  # k's seed is drawn ahead, and theirs would be others
            each[0].attention.v.eval(), each[0].attention.out.eval()
    fastlora.reset_dispatch_counts()
    got = step(model)
    assert counted() == (1, fallbacks)
    assert_agree(got, step(plain))


def test_a_factor_written_after_its_group_was_computed():
    """Nothing stale is handed out, and a backward that would need the old values is an error."""

    def call(attention, x):
        q = attention.q(x)
        with torch.no_grad():
            attention.k.lora_B.add_(1.0)
        return combine(q, attention.k(x), attention.v(x))

    model, plain = (route(make(grouped, layers=1), call) for grouped in (True, False))
    y = model(X)
    assert counted() == (1, {CHANGED: 1}) and torch.equal(y, plain(X))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_the_input_is_copied_where_one_of_the_group_says_so(name):
    def call(attention, x):
        x = x * 1.0
        y = combine(attention.q(x), attention.k(x), attention.v(x))
        x.add_(1.0)
        return y

    model, plain = route(make(layers=1), call), route(make(False, layers=1, copy_input=True), call)
    with pytest.raises(RuntimeError, match="copy_input=True"):
        step(model)
    model[0].attention._modules[name].copy_input = True
    fastlora.reset_dispatch_counts()
    got = step(model)
    assert counted() == (1, {})
    assert_agree(got, step(plain))


def test_handed_out_in_the_modes_of_the_group():
    def without_gradients(attention, x):
        q = attention.q(x)
        with torch.no_grad():
            k = attention.k(x)
        return combine(q, k, attention.v(x))

    def inference_late(attention, x):
        q = attention.q(x)
        with torch.inference_mode():
            attention.k(x)
        return combine(q, q[..., :4], attention.v(x))

    assert_as_ungrouped(without_gradients, groups=2, fallbacks={APART: 2})
    assert_as_ungrouped(inference_late, groups=2, fallbacks={APART: 2})
    model, plain = route(make(), inference_late), route(make(False), inference_late)
    with torch.no_grad():
        assert torch.equal(model(X), plain(X))
    assert counted() == (2, {CHANGED: 2})


def test_handed_out_under_the_same_autocast():
    def late(attention, x):
        q = attention.q(x)
        with torch.autocast("cpu", torch.bfloat16):
            k = attention.k(x)
        return combine(q, k, attention.v(x))

    def throughout(attention, x):
        with torch.autocast("cpu", torch.bfloat16):
            return combine(attention.q(x), attention.k(x), attention.v(x)).float()

    for function, reasons in ((late, {CHANGED: 1}), (throughout, {})):
        model, plain = (route(make(grouped, layers=1).float(), function) for grouped in (True, False))
        fastlora.reset_dispatch_counts()
        got = step(model, x=X.float())
        assert counted() == (1, reasons)
        wanted = step(plain, x=X.float())
        assert torch.equal(got[0], wanted[0])  # dX alone is a sum in another order
        torch.testing.assert_close(got[2], wanted[2], rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(got[1], wanted[1], rtol=0.02, atol=0.5)


def test_the_class_the_hooks_and_the_forwards_of_siblings():
    class Mine(LoRALinear):
        pass

    def reclass(attention):
        attention.k.__class__ = Mine

    def hook(attention):
        attention.k.register_forward_pre_hook(lambda layer, args: (args[0] * 2,))

    def replace_forward(attention):
        inner = attention.k.forward
        attention.k.forward = lambda x: inner(x * 2)

    def hook_gradients(attention):
        attention.k.register_full_backward_hook(lambda layer, grad_in, grad_out: None)

    def compile_it(attention):
        attention.k._compiled_call_impl = attention.k._call_impl

    for prepare, reason in (
        (reclass, "a Mine, not a LoRALinear"),
        (hook, ALONE),
        (replace_forward, ALONE),
        (hook_gradients, ALONE),
        (compile_it, ALONE),
    ):
        assert_as_ungrouped(
            groups=2, fallbacks={reason: 2}, prepare=lambda model, p=prepare: [p(b.attention) for b in model]
        )


def test_a_hook_on_a_result_still_runs():
    def prepare(model):
        for block in model:
            block.attention.k.register_forward_hook(lambda layer, args, output: output * 2)

    assert_as_ungrouped(groups=2, fallbacks={}, prepare=prepare)


def test_a_sibling_on_another_device_or_dtype_is_left_to_its_own_call():
    def call(attention, x):
        return combine(attention.q(x), attention.v(x), attention.v(x)), attention.k

    for change in (lambda k: k.to("meta"), lambda k: k.float(), lambda k: k.weight.requires_grad_()):
        model = route(make(layers=1), call)
        change(model[0].attention.k)
        y, _ = model[0].attention(X)
        assert y.isfinite().all() and counted() == (1, {"called again": 1})


def test_siblings_that_cannot_take_part():
    merged = make(layers=1)
    merged[0].attention.k.merge()
    plain = make(False, layers=1)
    plain[0].attention.k.merge()
    fastlora.reset_dispatch_counts()
    assert torch.equal(merged(X), plain(X)) and counted() == (1, {})
    dora = nn.Sequential(Block()).double()
    inject(dora, ["q", "k", "v"], r=2, dora=True, group=X)
    dora(X)
    assert counted()[0] == 0
    dropping = make(layers=1)
    dropping[0].attention.q.dropout = 1.5
    with pytest.raises(ValueError, match="dropout_p must be between 0 and 1"):
        dropping(X)
    assert counted() == (0, {"operands that the layer itself refuses": 1})
    scaled = make(layers=1)
    scaled[0].attention.q.scaling = torch.tensor(2.0)
    with pytest.raises(TypeError, match="scaling must be a number"):
        scaled(X)
    assert counted() == (0, {"a scaling that is no number": 1}) and scope._thread.scope is None


# ------------------------------------------------------------------------------------------------- around the calls


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointing_of_the_parent(reentrant, dropout):
    def wrap(model, x):
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
        return x

    assert_as_ungrouped(groups=4, fallbacks={}, dropout=dropout, wrap=wrap)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("reentrant", [False, True], ids=["hooks", "reentrant"])
def test_checkpointing_of_some_siblings(reentrant, dropout):
    """Other random numbers are drawn within the region, which its recomputation has to meet in the same order."""

    def some(attention, x):
        def region(x):
            q = nn.functional.dropout(attention.q(x), 0.3)
            return q, attention.k(x)

        q, k = checkpoint(region, x, use_reentrant=reentrant)
        return combine(q, k, attention.v(x))

    # v is called last and alone; in a recomputation no parent's forward runs.
    fallbacks = {APART: 4, ALONE: 2, "outside its parent's forward": 4}
    assert_as_ungrouped(some, groups=0, fallbacks=fallbacks, dropout=dropout)


def test_saved_tensors_that_are_offloaded():
    def wrap(model, x):
        with torch.autograd.graph.save_on_cpu():
            return model(x)

    assert_as_ungrouped(groups=2, fallbacks={}, wrap=wrap)

    def some(attention, x):
        q = attention.q(x)
        with torch.autograd.graph.save_on_cpu():
            k = attention.k(x)
        return combine(q, k, attention.v(x))

    assert_as_ungrouped(some, groups=2, fallbacks={APART: 2})


def test_an_exception_closes_the_scope_and_frees_what_it_held():
    held = []

    def fail(attention, x):
        attention.q(x)
        held.extend(weakref.ref(entry[-1]) for entry in scope._thread.scope.held.values())
        raise RuntimeError("in the middle")

    model = route(make(layers=1), fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        model(X)
    assert scope._thread.scope is None and counted() == (1, {UNFETCHED: 2})
    gc.collect()
    assert len(held) == 2 and all(reference() is None for reference in held)
    route(model, None)
    assert_agree(step(model), step(make(False, layers=1)))


def test_a_scope_that_an_interrupt_left_open_ends_with_the_next_forward():
    def interrupt(attention, x):
        attention.q(x)
        raise KeyboardInterrupt

    model = route(make(layers=1), interrupt)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            model(X)
    assert scope._thread.scope.outer is None  # one, not three
    model[0].attention.k(X)  # computed together for nobody, and not wrong
    route(model, None)
    fastlora.reset_dispatch_counts()
    got = step(model)
    assert counted() == (1, {}) and scope._thread.scope is None
    assert_agree(got, step(make(False, layers=1)))


def test_a_parent_within_itself():
    def twice(attention, x):
        q = attention.q(x)
        attention.route = None
        inner = attention(x)
        attention.route = twice
        return inner + combine(q, attention.k(x), attention.v(x))

    model, plain = (route(make(grouped, layers=1), twice) for grouped in (True, False))
    got = step(model)
    assert counted() == (2, {"outside its parent's forward": 2}) and scope._thread.scope is None
    assert_agree(got, step(plain))


def test_threads_have_scopes_of_their_own():
    barrier = threading.Barrier(2, timeout=20)

    def meet(attention, x):
        q = attention.q(x)
        barrier.wait()  # both have computed their group
        return combine(q, attention.k(x), attention.v(x))

    model = route(make(layers=1), meet)
    inputs, found = [X, X * 2], {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: model(inputs[i])})) for i in range(2)]
    [t.start() for t in threads], [t.join() for t in threads]
    assert counted() == (2, {})
    plain = make(False, layers=1)
    assert all(torch.equal(found[i], plain(inputs[i])) for i in range(2))


def test_transforms_and_traces_see_single_layers():
    model, plain = make(layers=1), make(False, layers=1)

    def loss(model, x):
        return model(x).pow(2).sum()

    torch.testing.assert_close(torch.func.grad(partial(loss, model))(X), torch.func.grad(partial(loss, plain))(X))
    assert "groups" not in (counts := fastlora.dispatch_counts())
    assert counts["fallbacks"]["shared input: torch.func transform"] == 3
    fastlora.reset_dispatch_counts()

    def late(attention, x):
        q = attention.q(x)
        return q, torch.func.vmap(lambda scale: attention.k(x) * scale)(torch.ones(1))[0], attention.v(x)

    q, k, v = route(model, late)[0].attention(X)
    attention = plain[0].attention
    assert all(map(torch.equal, (q, v), (attention.q(X), attention.v(X))))
    torch.testing.assert_close(k, attention.k(X))
    assert counted()[1]["torch.func transform"] >= 1
    route(model, None)
    traced = torch.jit.trace(model, X, check_trace=False)
    torch.testing.assert_close(traced(X), plain(X))
    assert counted()[0] == 0


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiled_values_are_those_of_single_layers():
    model, plain = make(layers=1), make(False, layers=1)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    fastlora.reset_dispatch_counts()
    got = step(compiled)
    assert counted() == (0, {})
    y, dx, gradients = step(plain)
    assert_agree(got[:2], (y, dx))
    assert_agree({n.removeprefix("_orig_mod."): g for n, g in got[2].items()}, gradients)
    assert scope._thread.scope is None


def test_two_backwards_through_siblings():
    """What differs: one node makes all outputs, so that the graph has to be retained."""

    def separate(attention, x):
        return attention.q(x), attention.k(x)

    for grouped in (True, False):
        q, k = route(make(grouped, layers=1), separate)[0].attention(X)
        q.sum().backward()
        if grouped:
            with pytest.raises(RuntimeError, match="second time"):
                k.sum().backward()
        else:
            k.sum().backward()
