"""Values of the Triton backend on DoRA layers: dtypes, odd sizes, factors of zero, from the public function on."""

import copy
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fastlora
from fastlora import dora, routes
from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target
from fastlora.backends.triton import scaled_launch
from fastlora.problem import Needs
from tests.support import scaled_checks as checks
from tests.support.numerics import assert_reordered
from tests.support.triton_checks import ALL

SMALL = TileConfig(32, 32, 32, 2, 4, 2, gradient_m=32, gradient_n=32, slice_n=32)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch, device):
    if device.type == "cpu":
        monkeypatch.setattr(scaled_launch, "target_of", lambda device: Target(80, n_sms=2))


@pytest.mark.parametrize("sizes", [(33, 37, 46, 3), (70, 36, 40, 72), (1, 16, 16, 1)], ids=str)
def test_float32(sizes, device):
    case = checks.draw(*sizes, torch.float32, device=device)
    checks.assert_accurate(checks.run(case, SMALL), case)


@pytest.mark.parametrize("dtype, magnitude", [(torch.float16, None), (torch.bfloat16, torch.float32)], ids=str)
def test_16_bits(dtype, magnitude, device):
    """Factors and adapters in float32 over a 16-bit layer, as PEFT has them, and all in 16 bits."""
    options = {"adapter_dtype": magnitude, "magnitude": magnitude or dtype}
    case = checks.draw(97, 40, 56, 5, dtype, device=device, **options)
    checks.assert_accurate(checks.run(case, SMALL), case)


@pytest.mark.parametrize(
    "needs, trains",
    [
        (Needs(True, False, False, False), False),
        (Needs(False, True, True, False), True),
        (Needs(False, False, True, True), True),
        (Needs(False, False, False, True), False),
        (Needs(False, False, False, False), True),
        (None, False),
    ],
    ids=str,
)
def test_gradients_that_are_asked_for(needs, trains, device):
    case = checks.draw(75, 40, 48, 5, torch.float32, device=device)
    checks.assert_accurate(checks.run(case, SMALL, needs, trains), case)


def test_without_a_bias(device):
    case = checks.draw(75, 40, 48, 5, torch.float32, bias=False, device=device)
    checks.assert_accurate(checks.run(case, SMALL, ALL), case)


@contextmanager
def counted():
    """Within it routes are found anew, and calls are counted from zero."""
    routes.forget_routes()
    fastlora.reset_dispatch_counts()
    yield
    routes.forget_routes()


def steps(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and all gradients of a step, then the output of the model that the step has moved."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    given = x.clone().requires_grad_()
    y = model(given)
    gradients = torch.autograd.grad(y.pow(2).sum(), [given, *parameters])
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients[1:], strict=True):
            parameter -= 0.01 * gradient
        return [y.detach(), *gradients, model(x)]


def linear(transposed: bool) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        if not transposed:
            return fastlora.LoRALinear(40, 24, r=4, dora=True)
        pytest.importorskip("transformers")
        from transformers.pytorch_utils import Conv1D

        model = nn.Sequential(Conv1D(24, 40))
        fastlora.inject(model, ["0"], r=4, alpha=8, dora=True)
        return model

    return made


def patched() -> nn.Module:
    peft = pytest.importorskip("peft")
    from fastlora.integrations.peft import patch

    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(40, 24)), peft.LoraConfig(r=4, target_modules=["0"], use_dora=True)
    )
    patch(model, strict=True)
    return model


@pytest.mark.parametrize("made", [linear(False), linear(True), patched], ids=["LoRALinear", "Conv1D", "PEFT"])
def test_layers_are_one_launch_each_way(made, device, monkeypatch):
    """With the numbers of the composition, and norms that are made once for a step, and again for what it has moved."""
    torch.manual_seed(0)
    model = made()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    model, x = model.to(device), torch.randn(2, 20, 40, device=device)
    composition = copy.deepcopy(model)
    with counted(), monkeypatch.context() as patch:
        patch.setattr(dora, "may_launch", lambda device, requested: False)
        expected = steps(composition, x)
    made_norms = []
    with counted(), monkeypatch.context() as patch:
        norm = dora.weight_norm
        patch.setattr(dora, "weight_norm", lambda *args: made_norms.append(1) or norm(*args))
        patch.setenv("FASTLORA_BACKEND", "triton")
        got = steps(model, x)
        counts = fastlora.dispatch_counts()
    assert counts == {"cuda": 0, "triton": 3, "composed": 0, "reference": 0, "fallbacks": {}}
    assert len(made_norms) == 2
    assert_reordered(got, expected, terms=40)
