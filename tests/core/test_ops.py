"""The differentiable layer as autograd, torch.library and torch.compile see it."""

import pytest
import torch
from torch.library import opcheck
from torch.nn.functional import linear

import fastlora
from fastlora import lora_linear
from fastlora.philox import inverse_keep, keep_mask
from tests.support import numerics

FORWARD = torch.ops.fastlora.lora_forward.default
BACKWARD = torch.ops.fastlora.lora_backward.default


def leaves(shape=(3, 5, 12), n=8, r=3, dtype=torch.float32, requires_grad=True):
    case = numerics.draw_case(torch.Size(shape[:-1]).numel(), n, shape[-1], r, dtype)
    x = case.x.view(shape)
    tensors = [t.clone().requires_grad_(requires_grad) for t in (x, case.lora_a, case.lora_b, case.bias)]
    return case.weight, *tensors


def composition(x, weight, lora_a, lora_b, bias, scaling=1.7):
    return linear(x, weight, bias) + linear(linear(x, lora_a), lora_b) * scaling


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("adapter_dtype", [None, torch.float32], ids=str)
def test_opcheck(dtype, adapter_dtype):
    c = numerics.draw_case(9, 8, 12, 3, dtype, adapter_dtype=adapter_dtype)
    opcheck(FORWARD, (c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None, None))
    opcheck(FORWARD, (c.x, c.weight, c.lora_a, c.lora_b, None, c.scaling, 0.5, torch.tensor(3), None))
    _, s = FORWARD(c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, 0.0, None, None)
    for needs in ([True] * 4, [True, False, False, False], [False, True, True, False]):
        opcheck(BACKWARD, (c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, 0.0, None, needs, None))


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 0, 12), (7, 12), (2, 3, 4, 12)], ids=str)
@pytest.mark.parametrize("skips_ops", [True, False])
def test_shapes(shape, skips_ops, monkeypatch):
    monkeypatch.setattr(fastlora.ops, "_skips_ops", lambda tensor: skips_ops)
    weight, x, a, b, bias = leaves(shape)
    y = lora_linear(x, weight, a, b, 1.7, bias)
    expected = composition(x, weight, a, b, bias)
    torch.testing.assert_close(y, expected)
    gradients = torch.autograd.grad(y.sum(), (x, a, b, bias))
    for got, want in zip(gradients, torch.autograd.grad(expected.sum(), (x, a, b, bias)), strict=True):
        torch.testing.assert_close(got, want)


def test_shapes_alone():
    weight, x, a, b, bias = (t.detach().to("meta").requires_grad_(t.requires_grad) for t in leaves((2, 3, 12)))
    y = lora_linear(x, weight, a, b, 1.7, bias, dropout_p=0.1)
    assert y.is_meta and y.shape == (2, 3, 8)
    y.sum().backward()
    assert x.grad.shape == x.shape and a.grad.shape == a.shape


def test_inputs_need_not_be_contiguous():
    weight, x, a, b, bias = leaves((12, 5, 4))
    weight, x, a, b, _ = leaves((4, 5, 12))
    turned = x.detach().transpose(0, 2).contiguous().transpose(0, 2).requires_grad_()
    for source in (turned, x.detach().expand(4, 5, 12)):
        y = lora_linear(source, weight.t().contiguous().t(), a, b, 1.7)
        torch.testing.assert_close(y, composition(source, weight, a, b, None))


def test_the_output_can_be_modified_in_place():
    weight, x, a, b, bias = leaves()
    y = lora_linear(x, weight, a, b, 1.7, bias)
    y.add_(1.0).relu_()
    y.sum().backward()
    torch.relu(composition(x, weight, a, b, bias) + 1.0).sum().backward()
    assert x.grad.isfinite().all()


def test_inputs_are_not_overwritten():
    weight, *rest = leaves()
    before = [t.detach().clone() for t in (weight, *rest)]
    x, a, b, bias = rest
    lora_linear(x, weight, a, b, 1.7, bias, dropout_p=0.5).sum().backward()
    assert all(torch.equal(t, old) for t, old in zip((weight, *rest), before, strict=True))


@pytest.mark.parametrize("trains", ["", "a", "b", "ab"])
def test_x_and_s_are_saved_only_for_the_gradients_that_read_them(trains):
    weight, x, a, b, _ = leaves()
    a.requires_grad_("a" in trains)
    b.requires_grad_("b" in trains)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linear(x, weight, a, b, 1.7)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for parameter in (weight, a, b):
        storages.pop(parameter.untyped_storage().data_ptr(), None)
    kept_x = storages.pop(x.untyped_storage().data_ptr(), None)
    assert (kept_x is not None) == ("a" in trains)
    s_bytes = 4 * (x.numel() // x.shape[-1]) * a.shape[0]
    assert list(storages.values()) == ([s_bytes] if "b" in trains else [])


def test_backward_twice_over_a_retained_graph():
    weight, x, a, b, bias = leaves()
    y = lora_linear(x, weight, a, b, 1.7, bias, dropout_p=0.3)
    first = torch.autograd.grad(y.sum(), (x, a, b, bias), retain_graph=True)
    second = torch.autograd.grad(y.sum(), (x, a, b, bias))
    assert all(torch.equal(p, q) for p, q in zip(first, second, strict=True))


def test_functional_transforms_are_served_by_torch():
    weight, x, a, b, bias = leaves(dtype=torch.float64, requires_grad=False)

    def loss(function):
        return lambda x, a: function(x, weight, a, b, bias).square().sum()

    def layer(x, weight, a, b, bias):
        return lora_linear(x, weight, a, b, 1.7, bias)

    fastlora.reset_dispatch_counts()
    per_sample = torch.vmap(torch.func.grad(loss(layer), argnums=(0, 1)), in_dims=(0, None))(x, a)
    expected = torch.vmap(torch.func.grad(loss(composition), argnums=(0, 1)), in_dims=(0, None))(x, a)
    torch.testing.assert_close(per_sample, expected)
    hessian = torch.func.hessian(loss(layer), argnums=1)(x, a)
    torch.testing.assert_close(hessian, torch.func.hessian(loss(composition), argnums=1)(x, a))
    counts = fastlora.dispatch_counts()
    assert counts["fallbacks"] == {"torch.func transform": 2} and counts["reference"] == 0
    dropped = torch.vmap(lambda x: lora_linear(x, weight, a, b, 1.7, dropout_p=0.5), randomness="different")(x)
    assert dropped.shape == (3, 5, 8) and not torch.allclose(dropped, layer(x, weight, a, b, None))
    with pytest.raises(RuntimeError, match="setup_context"):  # a backend insisted on
        torch.func.grad(lambda x: lora_linear(x, weight, a, b, 1.7, backend="reference").sum())(x)


def test_dropout_follows_the_generator_and_training():
    weight, x, a, b, _ = leaves((64, 12))
    torch.manual_seed(5)
    y = lora_linear(x, weight, a, b, 1.7, dropout_p=0.5)
    torch.manual_seed(5)
    assert torch.equal(y, lora_linear(x, weight, a, b, 1.7, dropout_p=0.5))
    assert not torch.equal(y, lora_linear(x, weight, a, b, 1.7, dropout_p=0.5))
    torch.manual_seed(5)
    mask = keep_mask(torch.randint(0, 2**63 - 1, (), dtype=torch.int64), 0.5, 64, 12) * inverse_keep(0.5)
    torch.testing.assert_close(y, linear(x, weight) + linear(linear(x * mask, a), b) * 1.7)
    assert torch.equal(
        lora_linear(x, weight, a, b, 1.7, dropout_p=0.5, training=False), lora_linear(x, weight, a, b, 1.7)
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_recomputes_the_same_mask(reentrant):
    from torch.utils.checkpoint import checkpoint

    weight, x, a, b, _ = leaves()

    def gradients(wrap):
        torch.manual_seed(2)
        y = wrap(lambda x: lora_linear(x, weight, a, b, 1.7, dropout_p=0.5))
        return torch.autograd.grad(y.sum(), (a, b)) if not reentrant else _backward(y, a, b)

    def _backward(y, *parameters):
        for p in parameters:
            p.grad = None
        y.sum().backward()
        return [p.grad.clone() for p in parameters]

    plain = gradients(lambda layer: layer(x))
    recomputed = gradients(lambda layer: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(p, q) for p, q in zip(plain, recomputed, strict=True))


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(adapter_dtype):
    case = numerics.draw_case(17, 8, 12, 3, torch.bfloat16, adapter_dtype=adapter_dtype)
    # float32 values that autocast rounds to the case's own.
    x, weight, bias = (t.float() for t in (case.x, case.weight, case.bias))
    sources = dict(zip(numerics.NAMES[1:], (x, case.lora_a, case.lora_b, bias), strict=True))
    for leaf in sources.values():
        leaf.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, weight, case.lora_a, case.lora_b, case.scaling, bias)
    assert y.dtype == torch.bfloat16
    y.backward(case.dy)
    assert all(leaf.grad.dtype == leaf.dtype for leaf in sources.values())
    gradients = {name: leaf.grad for name, leaf in sources.items()}
    numerics.assert_accurate({"y": y.detach(), **gradients}, case)


def test_float64_stays_out_of_autocast():
    weight, x, a, b, _ = leaves(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(x, weight, a, b, 1.7).dtype == torch.float64


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_compile_fullgraph(dynamic, dropout_p):
    weight, x, a, b, bias = leaves()

    def layer(x):
        return torch.relu(lora_linear(x, weight, a, b, 1.7, bias, dropout_p=dropout_p) + 1.0)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic)
    y = compiled(x)
    y.sum().backward()
    if dropout_p == 0.0:
        torch.testing.assert_close(y, layer(x))
        expected = torch.autograd.grad(torch.relu(composition(x, weight, a, b, bias) + 1.0).sum(), (x, a, b, bias))
        for leaf, want in zip((x, a, b, bias), expected, strict=True):
            torch.testing.assert_close(leaf.grad, want)
    else:
        assert not torch.equal(y, compiled(x))


def test_one_dispatch_each_way():
    weight, x, a, b, bias = leaves()
    fastlora.reset_dispatch_counts()
    lora_linear(x, weight, a, b, 1.7, bias).sum().backward()
    assert fastlora.dispatch_counts()["reference"] == 2
