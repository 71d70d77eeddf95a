"""Values of the Triton backend on projections that share an input: dtypes, odd sizes, any mixture of what they have."""

import pytest
import torch

from fastlora import lora_linear, lora_linears, routes
from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target
from fastlora.backends.triton import launch as single
from fastlora.backends.triton import projection_launch
from fastlora.problem import Needs
from tests.support import projection_checks as checks
from tests.support.projection_checks import Member

SMALL = TileConfig(32, 32, 32, 2, 4, 2, gradient_m=32, gradient_n=32, slice_n=32)
# Ranks, biases, scalings, probabilities and needs of their own; one without an adapter, one without a dY.
MEMBERS = (
    Member(40, 5, bias=True, dropout_p=0.3, scaling=1.7),
    Member(33, None, bias=True),
    Member(16, 72, scaling=-0.6, needs=Needs(True, False, True, False)),
    Member(8, 3, dropout_p=0.5, scaling=1.1, needs=None),
    Member(24, 1, bias=True, scaling=0.9, needs=Needs(True, True, False, True)),
)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch, device):
    if device.type == "cpu":
        for kernels in (projection_launch, single):
            monkeypatch.setattr(kernels, "target_of", lambda device: Target(80, n_sms=2))


@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(torch.float32, None), (torch.float16, torch.float32)],
    ids=str,
)
def test_a_mixture(dtype, adapter_dtype, device):
    group = checks.draw(40, 46, MEMBERS, dtype, adapter_dtype=adapter_dtype, device=device)
    checks.assert_accurate(checks.run(group, SMALL, True, projection_launch), group)


def test_without_dropout_or_dx(device):
    members = tuple(
        each._replace(dropout_p=0.0, needs=each.needs and each.needs._replace(dx=False)) for each in MEMBERS
    )
    group = checks.draw(40, 48, members, torch.float32, device=device)
    checks.assert_accurate(checks.run(group, SMALL, True, projection_launch), group)


def test_the_mask_of_each_is_that_of_its_own_call(device):
    """From the public function on: the seeds that single calls would draw, in their order."""
    routes.forget_routes()
    members = (Member(24, 4, dropout_p=0.5), Member(16, 8, dropout_p=0.0), Member(32, 4, dropout_p=0.2))
    group = checks.draw(20, 32, members, torch.float32, device=device)
    parts = [[getattr(c, name) for c in group.cases] for name in ("weight", "lora_a", "lora_b", "scaling")]
    p = [each.dropout_p for each in members]
    x = group.cases[0].x
    torch.manual_seed(3)
    together = lora_linears(x, *parts, dropout_p=p, backend="triton")
    torch.manual_seed(3)
    alone = [
        lora_linear(x, *each, dropout_p=drop, backend="triton")
        for each, drop in zip(zip(*parts, strict=True), p, strict=True)
    ]
    for mine, wanted in zip(together, alone, strict=True):
        checks.numerics.assert_reordered([mine], [wanted], terms=32)
    routes.forget_routes()
