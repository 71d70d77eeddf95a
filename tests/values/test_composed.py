"""Values of the composed backend: dropout's kernels run for real, the products are torch's own."""

import itertools

import pytest
import torch

from fastlora.backends import composed, reference, workspace
from fastlora.backends.target import Target
from fastlora.backends.triton import masked
from fastlora.philox import keep_mask
from fastlora.problem import Needs
from tests.support import float16_range, launches, numerics

ALL = Needs(True, True, True, True)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("poisoned")


def run(case: numerics.Case, needs: Needs = ALL) -> dict[str, torch.Tensor]:
    c = case
    needs = needs._replace(dbias=needs.dbias and c.bias is not None)
    y, s = launches.forward(composed, c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)
    gradients = launches.backward(
        composed, c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, needs
    )
    assert all(not buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return {"y": y, **{n: g for n, g in gradients._asdict().items() if g is not None}}


@pytest.fixture
def device_of(monkeypatch):
    """A device with so many multiprocessors, which decides how many parts a sum of S has."""
    return lambda n_sms: monkeypatch.setattr(masked, "target_of", lambda device: Target(80, n_sms))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, n, k, r, n_sms", [(70, 40, 104, 5, 2), (33, 40, 1100, 40, 64), (1, 37, 29, 1, 64), (5, 24, 300, 150, 1)]
)
def test_values(m, n, k, r, n_sms, dtype, device_of, device):
    device_of(n_sms)
    case = numerics.draw_case(m, n, k, r, dtype, dropout_p=0.3, device=device)
    numerics.assert_accurate(run(case), case)


def test_parts_are_added_up_in_their_order(device_of, device):
    """More of them, other roundings; the same number, the same bits."""
    case = numerics.draw_case(8, 8, 1100, 8, torch.float32, dropout_p=0.3, device=device)
    found = []
    for n_sms in (64, 64, 1):
        device_of(n_sms)
        found.append(run(case, Needs(False, False, True, False))["y"])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    "needs", [Needs(*bits) for bits in itertools.product((False, True), repeat=4) if any(bits)], ids=str
)
def test_only_the_gradients_asked_for(needs, device):
    case = numerics.draw_case(20, 40, 48, 6, torch.float16, dropout_p=0.2, device=device)
    results = run(case, needs)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    numerics.assert_accurate(results, case)


def test_float32_adapters_over_a_16_bit_layer(device):
    case = numerics.draw_case(50, 48, 64, 12, torch.bfloat16, dropout_p=0.3, adapter_dtype=torch.float32, device=device)
    results = run(case)
    assert results["da"].dtype == results["db"].dtype == torch.float32
    numerics.assert_accurate(results, case)


def test_strided_rows_are_read_in_place(device):
    case = numerics.draw_case(50, 48, 64, 8, torch.float16, dropout_p=0.3, device=device)

    def widened(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 24), float("nan"), dtype=tensor.dtype, device=device)
        wide[:, 8:-16] = tensor
        return wide[:, 8:-16]

    strided = {name: widened(getattr(case, name)) for name in ("x", "weight", "lora_a", "lora_b", "dy")}
    numerics.assert_accurate(run(type(case)(**{**vars(case), **strided})), case)


@pytest.mark.parametrize("scaling", float16_range.SCALINGS)
@pytest.mark.parametrize("regime", float16_range.REGIMES, ids=lambda regime: regime.name)
def test_float16_overflows_where_the_layer_of_framework_operations_does(regime, scaling, device):
    case = float16_range.draw(regime, scaling, 33, 40, 136, 5, 0.3)
    on_device = {name: value.to(device) for name, value in vars(case).items() if torch.is_tensor(value)}
    results = run(type(case)(**{**vars(case), **on_device}))
    float16_range.check({name: result.cpu() for name, result in results.items()}, case)


@pytest.mark.parametrize("on_device", [False, True], ids=["seed by value", "seed by pointer"])
def test_the_mask_is_every_backends(on_device, monkeypatch, device):
    """With A the identity, S is the masked input itself, dA of dY = B = identity the masked input's transpose; by a
    pointer the seed is read when the kernel runs, as a replayed graph needs."""
    if on_device:
        monkeypatch.setattr(masked, "seed_arguments", lambda seed, like: (seed.to(device), 1 << 62, 0))
    m, p, seed = 40, 0.4, torch.tensor(0x7EDC_BA98_7654_3210)
    x, eye = torch.ones(m, m, device=device), torch.eye(m, device=device)
    args = (x, torch.zeros(m, m, device=device), eye, eye, None, 1.0, p, seed)
    _, s = launches.forward(composed, *args)
    keep = keep_mask(seed, p, m, m).to(device)
    assert torch.equal(s != 0, keep)
    gradients = launches.backward(composed, eye, x, args[1], eye, eye, s, 1.0, p, seed, Needs(True, True, False, False))
    # Column r of dS is one row's: dA [R, K] = dSᵀ·drop(X) and dX = mask∘dS keep what the mask keeps.
    assert torch.equal(gradients.da != 0, keep) and torch.equal(gradients.dx != 0, keep & (eye != 0))
    _, expected = reference.lora_forward(*args)
    torch.testing.assert_close(s, expected, rtol=0, atol=0)


def test_a_dropout_of_one_drops_everything(device):
    case = numerics.draw_case(5, 24, 40, 3, torch.float32, dropout_p=1.0, device=device)
    results = run(case)
    assert torch.equal(results["y"], torch.nn.functional.linear(case.x, case.weight, case.bias))
    assert torch.equal(results["dx"], case.dy @ case.weight)
    assert not results["da"].any() and not results["db"].any()


@pytest.mark.parametrize("m, n, k", [(0, 6, 7), (5, 0, 7), (5, 6, 0)])
def test_empty_dimensions(m, n, k, device):
    case = numerics.draw_case(m, n, max(k, 1), 2, torch.float32, dropout_p=0.3, device=device)
    narrowed = {name: getattr(case, name)[:, :k] for name in ("x", "weight", "lora_a")}
    case = type(case)(**{**vars(case), **narrowed})
    exact = numerics.compose(case)
    assert all(torch.equal(result, exact[name]) for name, result in run(case).items())
