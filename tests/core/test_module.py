"""LoRALinear: what it computes, how it starts, merging, and everything nn.Module promises."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fastlora.module
from fastlora.module import LoRALinear

SHAPES = [(1, 1, 1), (7, 5, 1), (5, 7, 3), (17, 33, 17), (8, 4, 9)]  # in_features, out_features, r
SIXTEEN_BIT = [torch.bfloat16, torch.float16]


def make_layer(in_features=17, out_features=33, r=5, bias=True, seed=0, **kwargs):
    """A layer whose branch is about as large as its frozen product."""
    torch.manual_seed(seed)
    layer = LoRALinear(in_features, out_features, bias, r=r, **kwargs)
    with torch.no_grad():
        layer.lora_B.normal_(std=1 / layer.scaling if layer.scaling else 1.0)
    return layer


def formula(layer, x):
    """The layer's output in float64, without dropout."""
    x, w, a, b = (t.double() for t in (x, layer.weight, layer.lora_A, layer.lora_B))
    bias = None if layer.bias is None else layer.bias.double()
    return F.linear(x, w, bias) + layer.scaling * (x @ a.t()) @ b.t()


class Calls(TorchDispatchMode):
    """Names of the operators that run."""

    def __enter__(self):
        self.names = []
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("in_features", "out_features", "r"), SHAPES)
def test_forward_is_the_formula(in_features, out_features, r, bias):
    layer = make_layer(in_features, out_features, r, bias, alpha=3, dtype=torch.float64)
    for lead in [(), (0,), (4,), (2, 0), (2, 3, 1)]:
        x = torch.randn(*lead, in_features, dtype=torch.float64)
        torch.testing.assert_close(layer(x), formula(layer, x))


def test_gradients_reach_the_adapter_and_the_input_only():
    layer = make_layer(dtype=torch.float64)
    x = torch.randn(6, 17, dtype=torch.float64, requires_grad=True)
    layer(x).pow(2).sum().backward()
    got = (x.grad, layer.lora_A.grad, layer.lora_B.grad)
    wanted = torch.autograd.grad(formula(layer, x).pow(2).sum(), (x, layer.lora_A, layer.lora_B))
    for value, reference in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, reference)
    assert layer.weight.grad is None and layer.bias.grad is None


def test_parameters_shapes_and_what_trains():
    layer = LoRALinear(6, 4, r=3, alpha=12)
    shapes = {name: (tuple(p.shape), p.requires_grad) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": ((4, 6), False),
        "bias": ((4,), False),
        "lora_A": ((3, 6), True),
        "lora_B": ((4, 3), True),
    }
    assert isinstance(layer, nn.Linear) and (layer.r, layer.alpha, layer.scaling, layer.merged) == (3, 12, 4.0, False)
    assert LoRALinear(6, 4, bias=False).bias is None
    assert list(layer.state_dict()) == ["weight", "bias", "lora_A", "lora_B"]


def test_a_new_layer_computes_the_frozen_layer():
    layer = LoRALinear(9, 4, r=2)
    x = torch.randn(3, 9)
    assert not layer.lora_B.any() and layer.lora_A.any()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4.0), (True, 8.0)])
def test_scaling(rslora, scaling):
    layer = make_layer(r=4, alpha=16, rslora=rslora, dtype=torch.float64)
    assert layer.scaling == scaling
    x = torch.randn(3, 17, dtype=torch.float64)
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.scaling = 0.25  # read at every call
    torch.testing.assert_close(layer(x), formula(layer, x))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT])
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32])
@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_same_start_as_peft(init, adapter_dtype, dtype):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=5, target_modules=["0"], init_lora_weights=True if init == "kaiming" else init)
    stock = nn.Sequential(nn.Linear(17, 33, dtype=dtype))
    torch.manual_seed(3)
    layer = LoRALinear.from_linear(stock[0], r=5, init=init, adapter_dtype=adapter_dtype)
    after = torch.rand(1)
    torch.manual_seed(3)
    stock = peft.get_peft_model(stock, config, autocast_adapter_dtype=adapter_dtype is not None)
    assert torch.equal(torch.rand(1), after)
    start = stock.base_model.model[0].lora_A["default"].weight
    assert layer.lora_A.dtype == start.dtype and torch.equal(layer.lora_A, start)
    assert not layer.lora_B.any()


def test_gaussian_start_has_std_one_over_r():
    layer = LoRALinear(4096, 2, r=16, init="gaussian")
    assert layer.lora_A.std().item() == pytest.approx(1 / 16, rel=0.02)
    bound = 1 / math.sqrt(4096)  # kaiming with a = sqrt(5) is uniform within 1 / sqrt(in_features)
    a = LoRALinear(4096, 2, r=16).lora_A
    assert a.abs().max() <= bound and a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BIT])
def test_from_linear_shares_storage_and_leaves_the_source_alone(dtype):
    linear = nn.Linear(6, 4, dtype=dtype).eval()
    layer = LoRALinear.from_linear(linear, r=2, alpha=3, dropout=0.1, rslora=True)
    assert layer.weight.data_ptr() == linear.weight.data_ptr() and layer.bias.data_ptr() == linear.bias.data_ptr()
    assert linear.weight.requires_grad and not layer.weight.requires_grad
    assert {p.dtype for p in layer.parameters()} == {dtype} and not layer.training
    assert (layer.r, layer.alpha, layer.dropout, layer.rslora) == (2, 3, 0.1, True)
    before = linear.weight.detach().clone()
    nn.init.ones_(layer.lora_B)
    layer.merge()
    assert torch.equal(linear.weight, before)


def test_from_linear_draws_nothing_for_the_weight():
    linear = nn.Linear(6, 4)
    torch.manual_seed(0)
    LoRALinear.from_linear(linear, r=1)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(6), torch.rand(4), torch.rand(6)
    assert torch.equal(torch.get_rng_state(), state)


def test_float32_adapters_over_a_16_bit_weight():
    linear = nn.Linear(6, 4, dtype=torch.bfloat16)
    layer = LoRALinear.from_linear(linear, r=2, adapter_dtype=torch.float32)
    nn.init.normal_(layer.lora_B)
    assert layer.weight.dtype == torch.bfloat16 and layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    y = layer(torch.randn(3, 6, dtype=torch.bfloat16))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == layer.lora_B.grad.dtype == torch.float32


def test_dropout_acts_in_training_only():
    layer = make_layer(64, 8, dropout=0.5, alpha=1, dtype=torch.float64)
    x = torch.randn(16, 64, dtype=torch.float64)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    seeded = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), seeded)
    layer.eval()
    torch.testing.assert_close(layer(x), formula(layer, x))
    layer.train()
    layer.dropout = 1.0  # nothing of the branch is left
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))


def test_dropout_keeps_the_expected_output():
    layer = make_layer(32, 8, dropout=0.25, alpha=1, dtype=torch.float64)
    x = torch.randn(1, 32, dtype=torch.float64)
    samples = layer(x.expand(20000, 32)).detach()
    deviation = (samples.mean(0) - formula(layer, x)[0].detach()) / (samples.std(0) / math.sqrt(20000))
    assert deviation.abs().max() < 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *SIXTEEN_BIT])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
@pytest.mark.parametrize("wide_adapter", [False, True])
def test_merge_and_unmerge_are_exact(dtype, scale, wide_adapter):
    layer = make_layer(dtype=dtype, alpha=3)
    if wide_adapter and dtype.itemsize == 2:
        linear = nn.Linear(17, 33, dtype=dtype)
        layer = LoRALinear.from_linear(linear, r=5, alpha=3, adapter_dtype=torch.float32)
        nn.init.normal_(layer.lora_B)
    layer.lora_B.data *= scale
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    weight, a, b = (t.detach().double() for t in (layer.weight, layer.lora_A, layer.lora_B))
    layer.merge()
    assert layer.merged and not torch.equal(layer.weight, before["weight"])
    exact = weight + layer.scaling * b @ a
    # One rounding to the weight's dtype, after a product of length r in at least float32.
    eps = max(torch.finfo(dtype).eps / 2, 1e-12)
    slack = 8 * torch.finfo(torch.float32).eps if dtype != torch.float64 else 1e-14
    bound = eps * exact.abs() + slack * (weight.abs() + layer.scaling * b.abs() @ a.abs())
    assert ((layer.weight.double() - exact).abs() <= bound).all()
    layer.unmerge()
    assert not layer.merged
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_merged_forward_is_one_linear():
    layer = make_layer(dropout=0.3)
    x = torch.randn(5, 17)
    layer.merge()
    with Calls() as calls, torch.no_grad():
        y = layer(x)
    with Calls() as plain, torch.no_grad():
        expected = F.linear(x, layer.weight, layer.bias)
    assert calls.names == plain.names
    assert torch.equal(y, expected)
    layer.unmerge()
    with Calls() as calls, torch.no_grad():
        layer(x)
    assert calls.names != plain.names


def test_a_parametrized_adapter_is_used_as_computed():
    layer = make_layer(r=4, dtype=torch.float64)
    with torch.no_grad():  # integers, for which every sum is exact
        for tensor in layer.parameters():
            tensor.copy_(torch.randint(-4, 5, tensor.shape))
    x = torch.randint(-4, 5, (5, 17)).double()
    plain = layer(x)
    branch = plain - F.linear(x, layer.weight, layer.bias)
    double = nn.Module()
    double.forward = lambda a: 2 * a
    nn.utils.parametrize.register_parametrization(layer, "lora_A", double)
    assert branch.any() and torch.equal(layer(x), plain + branch)


def test_merging_keeps_the_function():
    layer = make_layer(dtype=torch.float64)
    x = torch.randn(5, 17, dtype=torch.float64)
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected)
    layer.merge()  # merged once
    torch.testing.assert_close(layer(x), expected)
    layer.unmerge()
    layer.unmerge()
    assert torch.equal(layer(x), expected)


def test_merge_without_keeping_the_base():
    layer = make_layer()
    before = layer.weight.detach().clone()
    layer.merge(keep_base=False)
    assert not list(layer.buffers())
    layer.unmerge()
    scale = before.abs().max() + layer.scaling * (layer.lora_B @ layer.lora_A).abs().max()
    assert (layer.weight - before).abs().max() <= 4 * torch.finfo(torch.float32).eps * scale


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_safe_merge_refuses_and_leaves_the_layer(bad):
    layer = make_layer()
    layer.lora_B.data[3, 1] = bad
    before = layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"not finite; the layer is left unmerged"):
        layer.merge(safe=True)
    assert not layer.merged and torch.equal(layer.weight, before)
    layer.merge()  # unsafe: as asked
    assert layer.merged and not torch.isfinite(layer.weight).all()


def test_safe_merge_refuses_overflow_of_the_weights_dtype():
    layer = make_layer(dtype=torch.float16)
    layer.lora_B.data.fill_(6e4)
    with pytest.raises(ValueError, match="not finite"):
        layer.merge(safe=True)


def test_merged_layers_move_copy_and_pickle():
    layer = make_layer()
    before = layer.weight.detach().clone()
    layer.merge()
    assert "_base_weight" not in layer.state_dict()
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert clone.merged and torch.equal(clone.weight, layer.weight)
        clone.unmerge()
        assert torch.equal(clone.weight, before)
    layer.to(torch.float64).unmerge()
    assert torch.equal(layer.weight, before.double())


def test_a_merged_layer_refuses_a_state_dict():
    layer, other = make_layer(seed=0), make_layer(seed=1)
    layer.merge()
    with pytest.raises(RuntimeError, match="is merged; call unmerge"):
        layer.load_state_dict(other.state_dict())
    layer.unmerge()
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.lora_A, other.lora_A)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_equal_and_independent(clone):
    layer = make_layer(dropout=0.2, rslora=True).eval()
    other = clone(layer)
    x = torch.randn(2, 17)
    assert torch.equal(layer(x), other(x)) and repr(layer) == repr(other)
    other.lora_B.data.zero_()
    assert not torch.equal(layer(x), other(x))


def test_meta_device_draws_nothing_and_materialises():
    state = torch.get_rng_state()
    layer = LoRALinear(6, 4, r=2, device="meta")
    assert torch.equal(torch.get_rng_state(), state) and all(p.is_meta for p in layer.parameters())
    filled = layer.to_empty(device="cpu")
    for parameter in filled.parameters():
        parameter.data.fill_(math.nan)
    filled.reset_parameters()
    assert all(torch.isfinite(p).all() for p in filled.parameters()) and not filled.lora_B.any() and filled.lora_A.any()
    with torch.device("meta"):
        assert LoRALinear(6, 4).lora_A.is_meta
        assert LoRALinear(6, 4, device="cpu").lora_A.abs().sum() > 0
    source = LoRALinear(6, 4, r=2)
    layer = LoRALinear(6, 4, r=2, device="meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(layer(torch.ones(1, 6)), source(torch.ones(1, 6)))


@pytest.mark.parametrize("dtype", SIXTEEN_BIT)
def test_casting_the_module(dtype):
    layer = make_layer().to(dtype)
    x = torch.randn(4, 17, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and {p.dtype for p in layer.parameters()} == {dtype}
    eager = F.linear(x, layer.weight, layer.bias) + layer.scaling * ((x @ layer.lora_A.t()) @ layer.lora_B.t())
    exact = formula(layer, x)
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert (y - exact).abs().max() <= 1.25 * (eager - exact).abs().max() + ulp


def test_repr_shows_what_differs_from_the_defaults():
    layer = LoRALinear(6, 4, r=4, alpha=8, bias=False)
    assert repr(layer) == "LoRALinear(in_features=6, out_features=4, bias=False, r=4, alpha=8, scaling=2)"
    layer = LoRALinear(6, 4, r=4, alpha=8, dropout=0.1, rslora=True)
    layer.merge()
    assert repr(layer).endswith("r=4, alpha=8, scaling=4, dropout=0.1, rslora=True, merged=True)")


def test_what_replaces_a_frozen_parameter_is_frozen():
    layer = LoRALinear(6, 4)
    layer.weight, layer.bias = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(4))
    assert not layer.weight.requires_grad and not layer.bias.requires_grad
    layer.bias.requires_grad_(True)  # a bias may train if asked to
    layer.bias = nn.Parameter(torch.zeros(4))
    layer.lora_A = nn.Parameter(torch.ones(8, 6))
    assert layer.bias.requires_grad and layer.lora_A.requires_grad
    layer(torch.ones(2, 6)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((4,), 2.0))


def test_the_forward_is_one_call_with_the_layers_own_values(monkeypatch):
    seen = []
    monkeypatch.setattr(fastlora.module, "lora_linear", lambda *args, **kwargs: seen.append((args, kwargs)))
    layer = LoRALinear(6, 4, dropout=0.3).eval()
    x = torch.randn(1, 6)
    layer(x)
    ((args, kwargs),) = seen
    expected = (x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.bias)
    assert all(a is b for a, b in zip(args, expected, strict=True))
    assert kwargs == {"dropout_p": 0.3, "training": False, "copy_input": False}
