"""When the layers of a group are computed together, and why not in every other case."""

import copy

import pytest
import torch
from torch import nn

import fastlora
from fastlora import inject
from fastlora.module import LoRALinear
from fastlora.shared_input import scope
from fastlora.shared_input.plan import group
from tests.support.numerics import assert_reordered
from tests.support.shared_attention import (
    ALONE,
    APART,
    CHANGED,
    NAMES,
    OUT_FEATURES,
    UNFETCHED,
    Block,
    X,
    assert_agree,
    assert_as_ungrouped,
    combine,
    counted,
    make,
    route,
    step,
)


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
        (y, dx, gradients), (wanted_y, wanted_dx, wanted_gradients) = got, wanted
        assert torch.equal(y, wanted_y) and gradients.keys() == wanted_gradients.keys()
        assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in gradients)
        assert_reordered([dx.bfloat16()], [wanted_dx.bfloat16()], terms=sum(OUT_FEATURES))  # a sum in another order


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
