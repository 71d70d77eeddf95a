"""What is unlike a plain call of a plain layer: as the composed layer has it, or one clear sentence."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

import fastlora
from fastlora import LoRALinear, lora_linear, ops
from fastlora.philox import draw_seed, inverse_keep, keep_mask
from tests.support import numerics


@pytest.fixture(params=["cpu", "as on a GPU"])
def path(request, monkeypatch):
    if request.param != "cpu":
        monkeypatch.setattr(ops, "_skips_ops", lambda tensor: False)


def composition(x, weight, a, b, bias, scaling=1.7):
    return linear(x, weight, bias) + linear(linear(x, a), b) * scaling


@pytest.mark.parametrize(
    ("shape", "n"), [((2, 3, 0), 4), ((0,), 4), ((0, 0), 3), ((2, 4, 7), 0), ((7,), 0), ((3, 0, 5), 2), ((0,), 0)]
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
@pytest.mark.usefixtures("path")
def test_sizes_of_zero(shape, n, dropout_p):
    tensors = [torch.randn(z, dtype=torch.float64) for z in (shape, (3, shape[-1]), (n, 3), (n,))]
    weight = torch.randn(n, shape[-1], dtype=torch.float64)
    results = []
    for layer in (
        lambda x, a, b, bias: lora_linear(x, weight, a, b, 1.7, bias, dropout_p=dropout_p if n == 0 else 0.0),
        lambda x, a, b, bias: composition(x, weight, a, b, bias),
    ):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = layer(*leaves)
        y.cos().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    torch.testing.assert_close(*results)


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize(("k", "n"), [(0, 4), (4, 0)])
def test_layers_of_size_zero(k, n):
    layer = LoRALinear(k, n, r=2)
    x = torch.randn(2, 3, k, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert torch.equal(y, linear(x, layer.weight, layer.bias)) and x.grad.shape == x.shape
    assert not layer.lora_B.grad.any() and layer.lora_A.grad.shape == layer.lora_A.shape


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_dual_numbers(dropout_p):
    """In every operand at once, with the mask that the fused layer applies."""
    case = numerics.draw_case(6, 4, 5, 2, torch.float64)
    primals = [t.clone() for t in (case.x.view(2, 3, 5), case.lora_a, case.lora_b, case.bias)]
    tangents = [torch.cos(t) for t in primals]
    results, fastlora_layer = (
        [],
        lambda x, a, b, bias: lora_linear(x, case.weight, a, b, 1.7, bias, dropout_p=dropout_p),
    )

    def composed(x, a, b, bias):
        seen = x
        if dropout_p:
            mask = keep_mask(draw_seed(x.device), dropout_p, 6, 5).view(x.shape)
            seen = x * mask * inverse_keep(dropout_p)
        return linear(x, case.weight, bias) + linear(linear(seen, a), b) * 1.7

    torch.manual_seed(2)
    plain = fastlora_layer(*primals)
    fastlora.reset_dispatch_counts()
    for layer in (fastlora_layer, composed):
        torch.manual_seed(2)
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(p, t) for p, t in zip(primals, tangents, strict=True)]
            results.append(tuple(forward_ad.unpack_dual(layer(*duals))))
    numerics.assert_reordered(*results, terms=4 * (5 + 2))
    numerics.assert_reordered(results[0][:1], [plain], terms=5 + 2)
    assert fastlora.dispatch_counts()["fallbacks"] == {"forward-mode AD": 1}


def test_a_dual_number_in_front_of_an_insisted_backend_raises():
    case = numerics.draw_case(6, 4, 5, 2, torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(case.x, case.x.cos())
        with pytest.raises(RuntimeError, match="jvp function"):
            lora_linear(x, case.weight, case.lora_a, case.lora_b, 1.7, backend="reference")


@pytest.mark.parametrize("gradients", [torch.enable_grad, torch.no_grad])
def test_an_insisted_backend_on_a_gpu_loses_no_tangent_in_silence(gradients, monkeypatch):
    """By the op that a GPU's calls take, which would drop it where no gradient is recorded."""
    monkeypatch.setattr(ops, "_skips_ops", lambda tensor: False)
    case = numerics.draw_case(6, 4, 5, 2, torch.float64)
    with forward_ad.dual_level(), gradients():
        x = forward_ad.make_dual(case.x, case.x.cos())
        with pytest.raises(ValueError, match="'reference' has no forward-mode derivative"):
            lora_linear(x, case.weight, case.lora_a, case.lora_b, 1.7, backend="reference")
        y = lora_linear(x, case.weight, case.lora_a, case.lora_b, 1.7)
        assert forward_ad.unpack_dual(y).tangent is not None


@pytest.mark.parametrize("skips_ops", [True, False])
def test_forward_over_reverse(skips_ops, monkeypatch):
    """A layer that ran before the dual level, and whose backward meets dual numbers in it."""
    monkeypatch.setattr(ops, "_skips_ops", lambda tensor: skips_ops)
    case = numerics.draw_case(6, 4, 5, 2, torch.float64)
    tangents = []
    for layer in (lambda *t: lora_linear(*t[:4], 1.7, t[4]), composition):
        leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, case.bias)]
        x, a, b, bias = leaves
        y = layer(x, case.weight, a, b, bias)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(case.dy, case.dy.sin())
            grads = torch.autograd.grad(y, leaves, dy)
            tangents.append([forward_ad.unpack_dual(g).tangent for g in grads])
    numerics.assert_reordered(*tangents, terms=6 + 4 + 2)


def jagged(k=5):
    rows = [torch.randn(m, k, dtype=torch.float64) for m in (3, 1, 4)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)


@pytest.mark.parametrize("layer_class", ["function", "module", "peft"])
def test_a_jagged_input(layer_class):
    case = numerics.draw_case(1, 4, 5, 2, torch.float64)
    module = LoRALinear(5, 4, r=2, alpha=3.4, dtype=torch.float64)
    for name, value in (("weight", "weight"), ("bias", "bias"), ("lora_A", "lora_a"), ("lora_B", "lora_b")):
        getattr(module, name).data.copy_(getattr(case, value))
    if layer_class == "peft":
        peft = pytest.importorskip("peft")
        base = nn.Sequential(nn.Linear(5, 4, dtype=torch.float64))
        model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]), autocast_adapter_dtype=False)
        nn.init.normal_(base[0].lora_B["default"].weight)
        stock = base[0].forward
        expected_of, call = stock, None
        fastlora.integrations.peft.patch(model)
        call = base[0]
    else:
        call = (
            module
            if layer_class == "module"
            else lambda x: lora_linear(x, case.weight, module.lora_A, module.lora_B, 1.7, case.bias)
        )
        expected_of = lambda x: composition(x, case.weight, module.lora_A, module.lora_B, case.bias)  # noqa: E731
    x = jagged()
    y, expected = call(x), expected_of(x)
    assert y.layout == torch.jagged and y.shape == expected.shape  # the ragged size is x's own: y + x works
    torch.testing.assert_close(y.values(), expected.values())
    grads = [torch.autograd.grad(t.values().cos().sum(), x)[0].values() for t in (y, expected)]
    torch.testing.assert_close(*grads)


def test_nested_inputs_that_no_layer_takes():
    case = numerics.draw_case(1, 4, 5, 2, torch.float64)
    rest = (case.weight, case.lora_a, case.lora_b, 1.7)
    with pytest.raises(TypeError, match="jagged layout"):
        lora_linear(torch.nested.nested_tensor([case.x, case.x], layout=torch.strided), *rest)
    with pytest.raises(ValueError, match="the ragged one"):
        lora_linear(jagged().transpose(1, 2), *rest)


@pytest.mark.parametrize("alpha", [Fraction(1, 3), np.float32(0.5), np.int64(12)], ids=repr)
@pytest.mark.parametrize("rslora", [False, True])
def test_numbers_that_are_no_floats(alpha, rslora, tmp_path):
    model = nn.Sequential(nn.Linear(6, 4))
    fastlora.inject(model, ["0"], r=4, alpha=alpha, rslora=rslora)
    layer = model[0]
    nn.init.normal_(layer.lora_B)
    scaling = float(alpha) / (2 if rslora else 4)
    x = torch.randn(3, 6, requires_grad=True)
    expected = composition(x, layer.weight, layer.lora_A, layer.lora_B, layer.bias, scaling)
    torch.testing.assert_close(model(x), expected)
    torch.testing.assert_close(
        lora_linear(x, layer.weight, layer.lora_A, layer.lora_B, alpha),
        composition(x, layer.weight, layer.lora_A, layer.lora_B, None, float(alpha)),
    )
    model(x).sum().backward()
    fastlora.save_adapter(model, tmp_path)
    again = nn.Sequential(nn.Linear(6, 4))
    fastlora.load_adapter(again, tmp_path)
    assert again[0].scaling == layer.scaling == scaling


@pytest.mark.parametrize("scaling", [torch.tensor(2.0, requires_grad=True), "2", None, True, 1j], ids=repr)
def test_a_scaling_that_is_no_number(scaling):
    case = numerics.draw_case(3, 4, 5, 2, torch.float32)
    with pytest.raises(TypeError, match="scaling must be a number, got a"):
        lora_linear(case.x, case.weight, case.lora_a, case.lora_b, scaling)


@pytest.mark.parametrize("adapter_dtype", [torch.float64, torch.float32], ids=str)
def test_peft_float64_under_autocast(adapter_dtype):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 4, dtype=torch.float64))
    config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    for factor in (base[0].lora_A, base[0].lora_B):
        factor.to(adapter_dtype)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        fastlora.integrations.peft.patch(model)
        assert torch.equal(model(x), expected) or adapter_dtype == torch.float64
        torch.testing.assert_close(model(x), expected)
    assert model(x).dtype == torch.float64


@pytest.mark.parametrize("which", ["weight", "adapter"])
def test_other_dtypes_beside_float64_under_autocast(which):
    case = numerics.draw_case(3, 4, 5, 2, torch.float64)
    weight = case.weight.float() if which == "weight" else case.weight
    a = case.lora_a.float() if which == "adapter" else case.lora_a
    message = (
        "autocast leaves float64 alone" if which == "weight" else "over a torch.float64 layer it must be torch.float64$"
    )
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=message):
        lora_linear(case.x, weight, a, case.lora_b, 1.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.usefixtures("path")
def test_a_backward_within_autocast(dtype, create_graph):
    """Autocast around ``backward`` does not change the gradients of a layer that ran outside."""
    case = numerics.draw_case(7, 4, 5, 2, dtype, adapter_dtype=torch.float32)
    leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, case.bias)]
    x, a, b, bias = leaves
    y = lora_linear(x, case.weight, a, b, 1.7, bias)
    expected = torch.autograd.grad(y, leaves, case.dy, retain_graph=True, create_graph=create_graph)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(y, leaves, case.dy, create_graph=create_graph)
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours, theirs)
