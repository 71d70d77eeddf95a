"""What layers that share an input cost the host: a group against its single layers, by the way that a GPU's calls take.

On a GPU each single layer is a call of an op each way; on the CPU a single layer is spared that (fastlora.ops), and a
group with it, so that there little is left to save.
"""

import pytest
import torch
from torch import nn

import fastlora
from benchmarks.host_calls import count_calls, time_calls

ROUNDS = 200
GROUPS = {"q, k, v": 3, "gate, up": 2}


class Parent(nn.Module):
    def __init__(self, count):
        super().__init__()
        self.layers = [f"layer{i}" for i in range(count)]
        for name in self.layers:
            setattr(self, name, nn.Linear(32, 32, bias=False))

    def forward(self, x):
        return [self._modules[name](x) for name in self.layers]


def make_calls(count, dropout=0.0):
    """A forward, and a whole training step, of single layers and of a group."""
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
    dy = torch.ones(16, 32)
    calls = {}
    for name, group in (("single", False), ("group", x)):
        model = Parent(count)
        fastlora.inject(model, model.layers, r=8, dropout=dropout, group=group)

        def forward(model=model):
            return model(x)

        def step(model=model):
            x.grad = None
            torch.autograd.backward(model(x), [dy] * count)

        calls |= {f"{name} forward": forward, f"{name} step": step}
    for call in [*calls.values()] * 2:
        call()
    return calls


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("count", GROUPS.values(), ids=GROUPS)
def test_a_step_of_a_group_takes_fewer_calls(count, dropout, monkeypatch):
    monkeypatch.setattr(fastlora.ops, "_skips_ops", lambda tensor: False)
    found = {name: count_calls(call) for name, call in make_calls(count, dropout).items()}
    assert found["group step"] <= found["single step"], found


@pytest.mark.parametrize("count", GROUPS.values(), ids=GROUPS)
def test_a_forward_of_a_group_takes_no_more_time(count, monkeypatch):
    """The least of many turns, in CPU time of the thread: others can only add to it. A tenth is left to chance."""
    monkeypatch.setattr(fastlora.ops, "_skips_ops", lambda tensor: False)
    calls = {name: call for name, call in make_calls(count).items() if name.endswith("forward")}
    found = time_calls(calls, ROUNDS)
    assert found["group forward"] <= 1.1 * found["single forward"], found


@pytest.mark.parametrize("count", GROUPS.values(), ids=GROUPS)
def test_what_the_rule_costs_on_the_cpu_is_bounded(count):
    """Calls on top of those of single layers: the parent's hooks, the checks in front of every result handed out."""
    found = {name: count_calls(call) for name, call in make_calls(count).items()}
    assert found["group forward"] <= found["single forward"] + 30, found
    assert found["group step"] <= found["single step"] + 20, found
