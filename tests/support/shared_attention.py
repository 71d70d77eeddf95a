"""Tiny models with layers that share an input, grouped or not, and what a step of each computes and counts."""

import torch
from torch import nn

import fastlora
from fastlora import inject
from fastlora.shared_input import scope

NAMES, OUT_FEATURES = ("q", "k", "v"), (8, 4, 4)
X = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ALONE = "no sibling that could be computed ahead"
APART = "checkpointed, or without gradients, apart from its parent"
CHANGED = "the input or the layer has changed since its group was computed"
UNFETCHED = "computed ahead and never called for"


class Attention(nn.Module):
    """Calls its children as ``route`` says, q, k and v of x by default, and returns what it makes of their results."""

    def __init__(self):
        super().__init__()
        n_q, n_k, n_v = OUT_FEATURES
        self.q, self.k, self.v = nn.Linear(12, n_q), nn.Linear(12, n_k, bias=False), nn.Linear(12, n_v)
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
