"""Groups within what surrounds a call: checkpointing, hooks, exceptions, threads, transforms, compilation."""

import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora.shared_input import scope
from tests.support.shared_attention import (
    ALONE,
    APART,
    UNFETCHED,
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
        held.extend(weakref.ref(entry[-1]) for entry in scope._thread.scope.seen.values() if entry)
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
