"""Values of the Triton backend over packed weights: every format and code, odd sizes, from the public function on."""

import dataclasses

import pytest
import torch

import fastlora
from fastlora import routes
from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target
from fastlora.backends.triton import quantised_launch
from fastlora.quantised_weight import QuantisedWeight
from tests.support import numerics
from tests.support import quantised_checks as checks
from tests.support.quantised_models import FORMATS
from tests.support.triton_checks import ALL

SMALL = TileConfig(32, 32, 32, 2, 4, 2, gradient_m=32, gradient_n=32, slice_n=32)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def small_gpu(monkeypatch, device):
    if device.type == "cpu":
        monkeypatch.setattr(quantised_launch, "target_of", lambda device: Target(80, n_sms=2))


def drawn(name, sizes, dtype, device, **options):
    case, packed = checks.draw(name, sizes, dtype, **options)
    moved = {field: value.to(device) for field, value in vars(case).items() if torch.is_tensor(value)}
    return dataclasses.replace(case, **moved), to(packed, device)


def to(packed: QuantisedWeight, device) -> QuantisedWeight:
    return packed._replace(tensors=tuple(tensor.to(device) for tensor in packed.tensors))


@pytest.mark.parametrize(
    "name, in_loop",
    [*((name, False) for name in FORMATS), *((name, True) for name in ("fp4", "nf4 nested", "int8 group", "float8"))],
)
def test_formats(name, in_loop, device):
    """In float32; ahead of the products at sizes of bytes, and of blocks that run over the end of rows."""
    sizes = (49, 40, 48, 5) if in_loop else (33, 37, 46, 3)
    case, packed = drawn(name, sizes, torch.float32, device, block=32)
    numerics.assert_accurate(checks.run(case, packed, SMALL, None if in_loop else ALL, in_loop=in_loop), case)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_16_bits_with_dropout(dtype, device):
    case, packed = drawn("nf4 nested", (49, 40, 56, 5), dtype, device, block=128, dropout_p=0.3)
    numerics.assert_accurate(checks.run(case, packed, SMALL), case)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, in the interpreter, about infinities
@pytest.mark.parametrize("kind", (torch.float8_e4m3fn, torch.float8_e5m2), ids=str)
def test_every_float8(kind, device):
    """Not a number, infinities and the smallest ones among them."""
    codes = torch.arange(256, dtype=torch.uint8).view(kind).view(16, 16)
    packed = QuantisedWeight(
        "float8", (codes, torch.linspace(0.5, 2.0, 16).view(16, 1)), (16, 16), torch.float32, (1, 16)
    )
    case = dataclasses.replace(numerics.draw_case(8, 16, 16, 2, torch.float32), weight=packed.dequantize())
    case = dataclasses.replace(case, **{f: v.to(device) for f, v in vars(case).items() if torch.is_tensor(v)})
    checks.run(case, to(packed, device), SMALL, None)


@pytest.mark.parametrize("rows", (40, 100))
def test_from_the_public_function(rows, device):
    """One launch each way, counted as Triton's, and no fallback; 40 rows in the loop, 100 ahead of it."""
    case, packed = drawn("nf4 nested", (rows, 48, 64, 8), torch.float32, device)
    given = {name: getattr(case, name).requires_grad_() for name in ("x", "lora_a", "lora_b", "bias")}
    routes.forget_routes()
    fastlora.reset_dispatch_counts()
    with checks.allocated(packed.shape, torch.float32) as scratch:
        rest = (given["lora_a"], given["lora_b"], case.scaling, given["bias"])
        y = fastlora.lora_linear(given["x"], packed, *rest, backend="triton")
        gradients = torch.autograd.grad(y, list(given.values()), case.dy)
    routes.forget_routes()
    assert len(scratch) == 1 + (rows > 64)
    assert fastlora.dispatch_counts()["triton"] == 2 and not fastlora.dispatch_counts()["fallbacks"]
    detached = {name: tensor.detach() for name, tensor in given.items()}
    results = {"y": y.detach(), **dict(zip(("dx", "da", "db", "dbias"), gradients, strict=True))}
    numerics.assert_accurate(results, dataclasses.replace(case, **detached))
