"""Values of the Triton backend: every dtype, odd shapes, dropout, both ways of addressing memory."""

import dataclasses
import itertools

import pytest
import torch

from fastlora.backends import reference, workspace
from fastlora.backends.configs import TileConfig
from fastlora.backends.target import Target, target_of
from fastlora.backends.triton import launch as triton_lora
from fastlora.problem import Needs
from tests.support import float16_range, launches, numerics

ALL = Needs(True, True, True, True)
# Tiles so small that a small problem has several row groups, columns, parts and slices, and no smaller: the
# interpreter's time goes by operations, not by elements.
SMALL = TileConfig(64, 64, 64, 1, 4, 2, gradient_m=64, gradient_n=64, slice_n=32)
SUBSETS = [Needs(*bits) for bits in itertools.product((False, True), repeat=4) if any(bits)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(params=["pointers", "descriptors"])
def addressing(request, monkeypatch, device):
    """Memory through pointers, or through TMA descriptors where alignment allows them."""
    if device.type == "cuda" and request.param == "descriptors":
        if target_of(device).arch < 90:
            pytest.skip("this GPU has no TMA")
        return request.param
    arch = 90 if request.param == "descriptors" else 80
    monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(arch, n_sms=2))
    return request.param


def run(case: numerics.Case, needs: Needs = ALL, config: TileConfig | None = SMALL) -> dict[str, torch.Tensor]:
    c = case
    if c.bias is None:
        needs = needs._replace(dbias=False)
    forward_args = (c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)
    y, s = launches.forward(triton_lora, *forward_args, config=config)
    backward_args = (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, c.dropout_p, c.seed, needs)
    gradients = launches.backward(triton_lora, *backward_args, config=config)
    assert all(not buffer.any() for buffer in workspace._by_stream.values()), "the workspace was left dirty"
    return {"y": y, **{n: g for n, g in zip(gradients._fields, gradients, strict=True) if g is not None}}


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, n, k, r", [(97, 72, 104, 5), (64, 96, 64, 16), (33, 40, 136, 40), (1, 37, 29, 1)])
def test_values(m, n, k, r, dtype, dropout_p, addressing, device):
    case = numerics.draw_case(m, n, k, r, dtype, dropout_p=dropout_p, device=device)
    numerics.assert_accurate(run(case), case)


@pytest.mark.parametrize("m, n, k, r", [(97, 72, 104, 5), (64, 96, 64, 72), (1, 37, 29, 1)])
def test_a_weight_that_lies_transposed(m, n, k, r, addressing, device):
    case = numerics.draw_case(m, n, k, r, torch.float32, dropout_p=0.3, device=device)
    lying = dataclasses.replace(case, weight=case.weight.t().contiguous().t())
    numerics.assert_accurate(run(lying), case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_small_ranks_by_tiles_of_their_own(dropout_p, addressing, device):
    case = numerics.draw_case(97, 72, 104, 16, torch.bfloat16, dropout_p=dropout_p, device=device)
    numerics.assert_accurate(run(case, config=dataclasses.replace(SMALL, fused=False)), case)


@pytest.mark.parametrize("r", [65, 128, 200, 256])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_ranks_beyond_the_fused_ones(r, dropout_p, addressing, device):
    case = numerics.draw_case(40, 48, 72, r, torch.bfloat16, dropout_p=dropout_p, device=device)
    numerics.assert_accurate(run(case), case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m, n, k, r", [(80, 72, 96, 8), (65, 33, 47, 3), (48, 64, 64, 96)])
def test_integers_are_exact(m, n, k, r, dtype, addressing, device):
    case = numerics.draw_integer_case(m, n, k, r, dtype).to(dtype)
    case = type(case)(**{f: v.to(device) if torch.is_tensor(v) else v for f, v in vars(case).items()})
    numerics.assert_exact(run(case), case)


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
def test_only_the_gradients_asked_for(needs, device):
    case = numerics.draw_case(70, 40, 48, 6, torch.float16, dropout_p=0.2, device=device)
    results = run(case, needs)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    numerics.assert_accurate(results, case)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_float32_adapters_over_a_16_bit_layer(dropout_p, addressing, device):
    case = numerics.draw_case(
        50, 48, 64, 12, torch.bfloat16, dropout_p=dropout_p, adapter_dtype=torch.float32, device=device
    )
    results = run(case)
    assert results["da"].dtype == results["db"].dtype == torch.float32
    numerics.assert_accurate(results, case)


def test_strided_rows_are_read_in_place(addressing, device):
    case = numerics.draw_case(50, 48, 64, 8, torch.float16, device=device)

    def widened(tensor):
        wide = torch.full((tensor.shape[0], tensor.shape[1] + 24), float("nan"), dtype=tensor.dtype, device=device)
        wide[:, 8:-16] = tensor
        return wide[:, 8:-16]

    strided = {name: widened(getattr(case, name)) for name in ("x", "weight", "lora_a", "lora_b", "dy")}
    results = run(type(case)(**{**vars(case), **strided}))
    expected = run(case)
    assert all(torch.equal(results[name], expected[name]) for name in expected)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("scaling", float16_range.SCALINGS)
@pytest.mark.parametrize("regime", float16_range.REGIMES, ids=lambda regime: regime.name)
def test_float16_overflows_where_the_composed_layer_does(regime, scaling, dropout_p, device):
    case = float16_range.draw(regime, scaling, 97, 40, 136, 5, dropout_p)
    on_device = {name: value.to(device) for name, value in vars(case).items() if torch.is_tensor(value)}
    results = run(dataclasses.replace(case, **on_device))
    float16_range.check({name: result.cpu() for name, result in results.items()}, case)


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # NumPy, in the interpreter, about inf times zero
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_of_dy_reach_dbias_as_infinities(dtype, device):
    case = numerics.draw_case(97, 72, 104, 5, dtype, device=device)
    case.dy[70, 3], case.dy[5, 40] = float("inf"), float("-inf")
    dbias = run(case)["dbias"]
    assert torch.equal(dbias.isinf().nonzero().flatten().cpu(), torch.tensor([3, 40])) and not dbias.isnan().any()
    assert dbias[3] > 0 > dbias[40]


def test_the_same_call_gives_the_same_bits(device):
    case = numerics.draw_case(130, 72, 88, 7, torch.bfloat16, dropout_p=0.1, device=device)
    first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_draws_the_reference_mask(device):
    """With A the identity, S is the masked input itself."""
    m, k, p = 40, 48, 0.4
    x, eye = torch.ones(m, k, device=device), torch.eye(k, device=device)
    weight, b = torch.zeros(8, k, device=device), torch.zeros(8, k, device=device)
    args = (x, weight, eye, b, None, 1.0, p, torch.tensor(77))
    _, s = launches.forward(triton_lora, *args, config=SMALL)
    _, expected = reference.lora_forward(*args)
    assert torch.equal(s != 0, expected != 0)
    assert 0.3 < (s == 0).float().mean() < 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch, block_m", [(90, 16), (120, 64)])
def test_dropout_where_the_rank_is_not_padded(arch, block_m, dtype, monkeypatch, device):
    """Short tiles, and an architecture whose products are a warp's."""
    if device.type == "cpu":
        monkeypatch.setattr(triton_lora, "target_of", lambda device: Target(arch, n_sms=2))
    case = numerics.draw_case(70, 40, 96, 5, dtype, dropout_p=0.3, device=device)
    numerics.assert_accurate(run(case, config=dataclasses.replace(SMALL, block_m=block_m)), case)


@pytest.mark.parametrize("needs", SUBSETS, ids=str)
@pytest.mark.parametrize("m, n, k", [(0, 6, 7), (5, 0, 7), (5, 6, 0)])
def test_empty_dimensions(m, n, k, needs, device):
    case = numerics.draw_case(m, n, max(k, 1), 2, torch.float32, device=device)
    narrowed = {name: getattr(case, name)[:, :k] for name in ("x", "weight", "lora_a")}
    case = dataclasses.replace(case, **narrowed)
    exact, results = numerics.compose(case), run(case, needs)
    assert set(results) == {"y", *(name for name, need in needs._asdict().items() if need)}
    assert all(torch.equal(result, exact[name]) for name, result in results.items())


@pytest.mark.parametrize("needs", [ALL, Needs(True, False, True, False), Needs(False, True, False, True)], ids=str)
@pytest.mark.parametrize(
    "m, n, k, r", [(40, 8, 72, 40), (40, 72, 8, 40), (33, 16, 24, 72), (1, 1, 1, 64), (20, 5, 3, 100)]
)
def test_a_rank_above_n_or_k_or_both(m, n, k, r, needs, addressing, device):
    case = numerics.draw_integer_case(m, n, k, r, torch.bfloat16)
    case = dataclasses.replace(case, **{f: v.to(device) for f, v in vars(case).items() if torch.is_tensor(v)})
    numerics.assert_exact(run(case, needs), case)


@pytest.mark.parametrize("elements", [1, 2, 4, 8], ids=lambda elements: f"{2 * elements} bytes")
@pytest.mark.parametrize("names", [("x",), ("weight",), ("dy",), ("lora_a", "lora_b"), ("x", "weight", "dy", "bias")])
def test_what_starts_on_fewer_bytes_than_16(names, elements, addressing, device):
    """Rows as well as what they lie in; N and K are multiples of 16, so that only this may ask for narrow loads."""
    case = numerics.draw_integer_case(40, 48, 64, 16, torch.bfloat16)
    case = dataclasses.replace(case, **{f: v.to(device) for f, v in vars(case).items() if torch.is_tensor(v)})

    def moved(tensor):
        wide = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 2 * elements), float("nan"), dtype=tensor.dtype)
        wide = wide.to(device)
        wide[..., elements:-elements] = tensor
        return wide[..., elements:-elements]

    case = dataclasses.replace(case, **{name: moved(getattr(case, name)) for name in names})
    assert all(getattr(case, name).data_ptr() % 16 == 2 * elements % 16 for name in names)
    numerics.assert_exact(run(case), case)


@pytest.mark.parametrize("scaling", [0.0, -0.7, -3.0])
def test_scalings_below_zero_and_none_at_all(scaling, addressing, device):
    case = dataclasses.replace(
        numerics.draw_case(70, 40, 48, 6, torch.bfloat16, dropout_p=0.2, device=device), scaling=scaling
    )
    results = run(case)
    numerics.assert_accurate(results, case)
    if scaling == 0.0:
        assert not results["da"].any() and not results["db"].any()


def test_vectors_whose_elements_lie_apart(addressing, device):
    case = numerics.draw_integer_case(40, 48, 64, 16, torch.bfloat16)
    case = dataclasses.replace(case, **{f: v.to(device) for f, v in vars(case).items() if torch.is_tensor(v)})
    apart = torch.stack((case.bias, torch.full_like(case.bias, float("nan"))), dim=-1)[..., 0]
    assert apart.stride() == (2,)
    numerics.assert_exact(run(dataclasses.replace(case, bias=apart)), case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 16, 150])
def test_shipped_configurations(m, dtype, device):
    """The tables' own tiles, on problems smaller than one of them and a little larger."""
    case = numerics.draw_case(m, 264, 136, 8, dtype, device=device)
    numerics.assert_accurate(run(case, config=None), case)
