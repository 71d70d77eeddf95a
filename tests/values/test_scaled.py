"""Values of the Triton backend on DoRA layers: dtypes, odd sizes, factors of zero, from the public function on."""

import pytest
import torch

from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target
from fastlora.backends.triton import scaled_launch
from fastlora.problem import Needs
from tests.support import scaled_checks as checks
from tests.support.triton_checks import ALL

SMALL = TileConfig(32, 32, 32, 2, 4, 2, gradient_m=32, gradient_n=32, slice_n=32)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch, device):
    if device.type == "cpu":
        monkeypatch.setattr(scaled_launch, "target_of", lambda device: Target(80, n_sms=2))


@pytest.mark.parametrize("sizes", [(150, 40, 48, 5), (33, 37, 46, 3), (70, 36, 40, 72), (1, 16, 16, 1)], ids=str)
def test_float32(sizes, device):
    case = checks.draw(*sizes, torch.float32, device=device)
    checks.assert_accurate(checks.run(case, SMALL), case)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("magnitude", (torch.float32, None), ids=str)
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
