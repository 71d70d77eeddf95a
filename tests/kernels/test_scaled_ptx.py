"""The Triton kernels of DoRA layers, proven on their own PTX: as test_triton_ptx.py does it for layers without a scale."""

import dataclasses

import pytest
import torch

import fastlora
from fastlora import dispatch, selection
from fastlora.backends.target import Target
from fastlora.backends.triton import scaled_launch
from fastlora.backends.triton import launch as triton_lora
from fastlora.dora import Norms, dora_linear
from tests.emulator import LaunchOptions
from tests.support import numerics
from tests.support import scaled_checks as checks
from tests.support.triton_checks import SCHEDULES, needs_compiler
from tests.support.triton_emulation import emulated

pytestmark = [needs_compiler, pytest.mark.usefixtures("own_workspace", "poisoned")]


@pytest.mark.parametrize("arch, sizes", checks.INTEGERS, ids=str)
def test_integers_are_exact_under_every_schedule(arch, sizes):
    checks.check_integers(sizes, arch)


@pytest.fixture
def on_triton(monkeypatch):
    """Calls on the CPU are a GPU's, of which Triton's are emulated."""
    monkeypatch.setattr(dispatch, "may_ask_triton", lambda device, requested: True)
    monkeypatch.setattr("fastlora.dora.may_ask_triton", lambda device, requested: True)
    monkeypatch.setattr(selection, "triton_unusable", lambda device: None)
    for kernels in (scaled_launch, triton_lora):
        monkeypatch.setattr(kernels, "target_of", lambda device: Target(80, n_sms=3))
    dispatch.forget_routes()
    fastlora.reset_dispatch_counts()
    yield
    dispatch.forget_routes()


def leaves_of(case: checks.Case) -> dict[str, torch.Tensor]:
    c = case.layer
    given = {"dx": c.x, "da": c.lora_a, "db": c.lora_b, "dbias": c.bias, "dm": case.magnitude}
    return {name: tensor.clone().requires_grad_() for name, tensor in given.items()}


class Known(Norms):
    """The norm that a case has drawn."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def of(self, *_):
        return self.norm


def call(case: checks.Case, leaves: dict[str, torch.Tensor], **options) -> torch.Tensor:
    x, a, b, bias, magnitude = leaves.values()
    return dora_linear(x, case.layer.weight, a, b, case.layer.scaling, magnitude, bias, norms=Known(case.norm), **options)


def test_a_layer_is_one_launch_each_way(on_triton):
    """From the public function on, counted as Triton's, and no fallback; in [..., K], and again by its keys."""
    case = checks.draw(50, 48, 64, 8, torch.bfloat16)
    leaves = leaves_of(case)
    with emulated(80) as stats:
        for _ in range(2):
            y = call(case, {**leaves, "dx": leaves["dx"].view(2, 25, 64)})
            gradients = torch.autograd.grad(y, list(leaves.values()), case.layer.dy.view(2, 25, 48))
        with torch.no_grad():
            evaluated = call(case, leaves)
    assert len(stats) == 5
    assert fastlora.dispatch_counts() == {"cuda": 0, "triton": 5, "composed": 0, "reference": 0, "fallbacks": {}}
    checks.assert_accurate({"y": y.detach().view(50, 48), **dict(zip(leaves, gradients, strict=True))}, case)
    checks.assert_accurate({"y": evaluated}, case)
    assert all(each.dtype == leaf.dtype for each, leaf in zip(gradients, leaves.values(), strict=True))
