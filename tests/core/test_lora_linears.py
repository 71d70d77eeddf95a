"""Several projections of one input as one node: the values of single layers, one dX, what is saved, what is refused."""

import pytest
import torch
from torch.nn.functional import linear
from torch.utils.flop_counter import FlopCounterMode

import fastlora
from fastlora import dispatch, lora_linear, lora_linears
from fastlora.backends import reference
from tests.support.lora_linears import BFLOAT16, FLOAT32, SIZES, WHOLE, K, draw, gradients, leaves, one_by_one
from tests.support.numerics import assert_reordered


@pytest.mark.parametrize(
    "dtype, adapter_dtype",
    [(FLOAT32, None), (BFLOAT16, None), (BFLOAT16, FLOAT32), (torch.float16, None)],
    ids=str,
)
@pytest.mark.parametrize("dropout_p", [WHOLE, (0.5, 0.3, 0.0, 0.2)], ids=["whole", "dropped"])
def test_the_bits_of_single_layers(dtype, adapter_dtype, dropout_p):
    arguments = draw(dtype, adapter_dtype)
    torch.manual_seed(3)
    expected = one_by_one(*arguments, dropout_p)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    ys = lora_linears(*arguments, dropout_p=dropout_p)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(y, wanted) and y.shape == wanted.shape for y, wanted in zip(ys, expected, strict=True))
    (dx, *others), (dx_wanted, *wanted) = gradients(ys, arguments), gradients(expected, arguments)
    assert all(torch.equal(g, w) and g.dtype == w.dtype for g, w in zip(others, wanted, strict=True))
    assert_reordered([dx], [dx_wanted], sum(n for n, _ in SIZES))  # the sum over projections has another order
    with torch.no_grad():
        torch.manual_seed(3)
        again = lora_linears(*arguments, dropout_p=dropout_p)
    assert all(torch.equal(y, wanted) and not y.requires_grad for y, wanted in zip(again, expected, strict=True))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_dx_is_as_accurate_as_autograds_sum(dtype):
    """The error rule for the one dX: against fp64, at most 1.25 times that of the composition."""
    arguments = draw(dtype, lead=(64,))

    def compose(x, weights, lora_as, lora_bs, scalings, biases):
        return [
            linear(x, w, bias) + (0.0 if a is None else s * linear(linear(x, a), b))
            for w, a, b, s, bias in zip(weights, lora_as, lora_bs, scalings, biases, strict=True)
        ]

    def widen(value):
        if isinstance(value, torch.Tensor):
            return value.detach().double().requires_grad_(value.requires_grad)
        return [widen(each) for each in value] if isinstance(value, list) else value

    exact_arguments = tuple(widen(each) for each in arguments)
    torch.manual_seed(2)
    dys = [torch.randn(64, n).to(dtype) for n, _ in SIZES]
    exact = torch.autograd.grad(compose(*exact_arguments), exact_arguments[0], [dy.double() for dy in dys])[0]
    eager = torch.autograd.grad(compose(*arguments), arguments[0], dys)[0]
    dx = torch.autograd.grad(lora_linears(*arguments), arguments[0], dys)[0]
    allowed = (eager.double() - exact).abs()
    error = (dx.double() - exact).abs()
    ulp = torch.finfo(dtype).eps * exact.abs().max()
    assert error.max() <= 1.25 * allowed.max() + ulp
    assert error.square().mean().sqrt() <= 1.25 * allowed.square().mean().sqrt() + ulp


@pytest.mark.parametrize("trains", ["x a b bias", "x", "a b", "x b", "bias"])
def test_gradcheck_of_every_subset_of_inputs(trains):
    arguments = draw(torch.float64, lead=(2,))
    x, weights, lora_as, lora_bs, scalings, biases = arguments
    for name, tensors in (("x", [x]), ("a", lora_as), ("b", lora_bs), ("bias", biases)):
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_(name in trains.split())

    def run(*given):
        given = iter(given)
        swap = [[next(given) if t is not None and t.requires_grad else t for t in each] for each in tensors_of]
        torch.manual_seed(1)
        ys = lora_linears(swap[0][0], weights, swap[1], swap[2], scalings, swap[3], dropout_p=0.3)
        return tuple(y for y in ys if y.requires_grad)

    tensors_of = ([x], lora_as, lora_bs, biases)
    assert torch.autograd.gradcheck(
        run, leaves(arguments) if x.requires_grad else leaves(arguments)[1:], fast_mode=True
    )


def test_outputs_differ_in_what_depends_on_them():
    """An output requires a gradient where that of a single layer would; one that nothing uses costs its parameters
    nothing."""
    x, weights, lora_as, lora_bs, scalings, biases = draw()
    x.requires_grad_(False), biases[1].requires_grad_(False)
    ys = lora_linears(x, weights, lora_as, lora_bs, scalings, biases)
    assert [y.requires_grad for y in ys] == [True, False, True, True]
    (ys[0].sum() + ys[3].sum()).backward()
    assert lora_as[2].grad is None and lora_bs[2].grad is None
    assert all(t.grad is not None for t in (lora_as[0], lora_bs[0], biases[0], lora_as[3]))


@pytest.mark.parametrize("trains", ["", "a", "b", "ab"])
def test_x_is_saved_once_and_s_only_where_it_is_read(trains):
    x, weights, lora_as, lora_bs, scalings, biases = draw()
    for name, tensors in (("a", lora_as), ("b", lora_bs)):
        for tensor in tensors:
            if tensor is not None:
                tensor.requires_grad_(name in trains)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        lora_linears(x, weights, lora_as, lora_bs, scalings, biases)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for parameter in (*weights, *lora_as, *lora_bs):
        if parameter is not None:
            storages.pop(parameter.untyped_storage().data_ptr(), None)
    kept_x = storages.pop(x.untyped_storage().data_ptr(), None)
    assert (kept_x is not None) == ("a" in trains)
    ranks = sum(r for _, r in SIZES if r is not None)
    assert sum(storages.values()) == (4 * 15 * ranks if "b" in trains else 0)
    assert not any(t.data_ptr() == bias.data_ptr() for t in saved for bias in biases if bias is not None)


def test_dx_is_written_once_and_added_to_in_place(monkeypatch):
    into = []
    backward = reference.lora_backward

    def record(*args):
        found = backward(*args)
        into.append((args[-1], found.dx))
        return found

    monkeypatch.setattr(reference, "lora_backward", record)
    arguments = draw()
    gradients(lora_linears(*arguments), arguments)
    assert len(into) == 3 and into[0][0] is None
    assert all(given is dx and dx is not None for given, dx in into[1:])
    assert len({dx.data_ptr() for _, dx in into}) == 1


def test_a_backend_that_cannot_add_in_place_has_its_dx_added(monkeypatch):
    x, weights, lora_as, lora_bs, scalings, _ = draw(lead=(5,))
    given = (torch.randn(5, 8), x.detach(), weights[0], lora_as[0].detach(), lora_bs[0].detach())
    needs = fastlora.problem.Needs(True, True, False, False)
    operands = (*given, None, 1.7, 0.0, None)
    alone = dispatch.backward(operands, needs, None)
    monkeypatch.setattr(dispatch, "_PLAIN", ())
    monkeypatch.setattr(dispatch, "_ADD_IN_PLACE", ())
    into = torch.ones(5, K)
    found = dispatch.backward(operands, needs, "reference", into)
    assert found.dx is into and torch.equal(into, alone.dx + 1.0) and torch.equal(found.da, alone.da)


@pytest.mark.parametrize("backend", ["composed", "reference"])
def test_backends_by_name(backend):
    arguments = draw()
    fastlora.reset_dispatch_counts()
    ys = lora_linears(*arguments, backend=backend)
    got = gradients(ys, arguments)
    counts = fastlora.dispatch_counts()
    assert counts[backend] == 6 and not counts["fallbacks"]
    expected = one_by_one(*arguments)
    assert_reordered(ys, [y.detach() for y in expected], K)
    assert_reordered(got, gradients(expected, arguments), 64)
    with pytest.raises(ValueError, match="unknown backend 'cublas'"):
        lora_linears(*arguments, backend="cublas")


def test_outputs_are_tensors_of_their_own():
    arguments = draw()
    ys = lora_linears(*arguments)
    ys[0].add_(1.0).relu_()
    ys[2].mul_(2.0)
    expected = one_by_one(*arguments)
    torch.testing.assert_close(ys[0], torch.relu(expected[0] + 1.0))
    got = gradients(ys, arguments)
    wanted = gradients([torch.relu(expected[0] + 1.0), expected[1], expected[2] * 2.0, expected[3]], arguments)
    assert_reordered(got, wanted, 64)


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (7,), (2, 3, 4)], ids=str)
def test_shapes(lead):
    arguments = draw(lead=lead)
    ys, expected = lora_linears(*arguments), one_by_one(*arguments)
    assert all(torch.equal(y, wanted) and y.shape == wanted.shape for y, wanted in zip(ys, expected, strict=True))
    assert_reordered(gradients(ys, arguments), gradients(expected, arguments), 64) if 0 not in lead else None


def test_layouts_and_meta():
    x, weights, lora_as, lora_bs, scalings, biases = draw(lead=(4, 5))
    turned = x.detach().transpose(0, 1)
    weights = [w.t().contiguous().t() for w in weights]
    arguments = (turned.requires_grad_(), weights, lora_as, lora_bs, scalings, biases)
    assert_reordered(lora_linears(*arguments), one_by_one(*arguments), K)
    meta = [None if t is None else t.detach().to("meta") for t in (*weights, *lora_as, *lora_bs)]
    ys = lora_linears(x.detach().to("meta"), meta[:4], meta[4:8], meta[8:], scalings)
    assert [tuple(y.shape) for y in ys] == [(4, 5, n) for n, _ in SIZES] and all(y.is_meta for y in ys)


@pytest.mark.parametrize("adapter_dtype", [FLOAT32, BFLOAT16], ids=str)
def test_autocast(adapter_dtype):
    arguments = draw(FLOAT32, adapter_dtype)
    with torch.autocast("cpu", BFLOAT16):
        ys, expected = lora_linears(*arguments), one_by_one(*arguments)
    assert all(y.dtype == BFLOAT16 and torch.equal(y, wanted) for y, wanted in zip(ys, expected, strict=True))
    (dx, *others), (dx_wanted, *wanted) = gradients(ys, arguments), gradients(expected, arguments)
    assert all(torch.equal(g, w) and g.dtype == w.dtype for g, w in zip(others, wanted, strict=True))
    assert dx.dtype == FLOAT32
    assert_reordered([dx.bfloat16()], [dx_wanted.bfloat16()], 32)
    with torch.autocast("cpu", BFLOAT16):
        assert lora_linears(*draw(torch.float64))[0].dtype == torch.float64


def test_second_derivatives():
    arguments = draw(torch.float64, lead=(3,))

    def twice(ys, given):
        first = torch.autograd.grad(sum(y.pow(3).sum() for y in ys), leaves(given), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves(given))

    fastlora.reset_dispatch_counts()
    got = twice(lora_linears(*arguments), arguments)
    assert fastlora.dispatch_counts()["fallbacks"]["create_graph=True"] == 1
    torch.testing.assert_close(got, twice(one_by_one(*arguments), arguments))
    for a in arguments[2]:
        if a is not None:
            a.requires_grad_(False)
    torch.testing.assert_close(twice(lora_linears(*arguments), arguments), twice(one_by_one(*arguments), arguments))


def test_a_vectorized_jacobian():
    x, weights, lora_as, lora_bs, scalings, biases = draw(torch.float64, lead=(2,))

    def run(function):
        return lambda x: tuple(function(x, weights, lora_as, lora_bs, scalings, biases))

    got = torch.autograd.functional.jacobian(run(lora_linears), x, vectorize=True)
    torch.testing.assert_close(got, torch.autograd.functional.jacobian(run(one_by_one), x))


def test_what_goes_on_around_a_call_takes_it_apart():
    """Transforms, forward mode, traces and dispatch modes see calls of single layers, counted."""
    x, weights, lora_as, lora_bs, scalings, biases = draw(torch.float64, lead=(3,))
    rest = (weights, lora_as, lora_bs, scalings, biases)
    expected = [y.detach() for y in one_by_one(x, *rest)]

    def fallbacks():
        found = fastlora.dispatch_counts()["fallbacks"]
        fastlora.reset_dispatch_counts()
        return {reason for reason in found if reason.startswith("shared input")}

    fallbacks()
    rows = torch.vmap(lambda row: lora_linears(row, *rest))(x)
    torch.testing.assert_close([*rows], expected)
    assert fallbacks() == {"shared input: torch.func transform"}
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x))
        tangent = torch.autograd.forward_ad.unpack_dual(lora_linears(dual, *rest)[1]).tangent
    torch.testing.assert_close(tangent, torch.ones_like(x) @ weights[1].t())
    assert fallbacks() == {"shared input: forward-mode AD"}
    constant = [[t if t is None or isinstance(t, float) else t.detach() for t in each] for each in rest]
    traced = torch.jit.trace(lambda x: tuple(lora_linears(x, *constant)), x.detach(), check_trace=False)
    torch.testing.assert_close([*traced(x.detach())], expected)
    assert fallbacks() == {"shared input: torch.jit.trace"}
    with FlopCounterMode(display=False) as counter:
        ys = lora_linears(x, *rest)
    assert fallbacks() == {"shared input: a dispatch mode"} and all(map(torch.equal, ys, expected))
    with FlopCounterMode(display=False) as alone:
        one_by_one(x, *rest)
    assert counter.get_total_flops() == alone.get_total_flops() > 0
    nested = torch.nested.nested_tensor([x[:1].detach(), x[1:].detach()], layout=torch.jagged)
    torch.testing.assert_close(lora_linears(nested, *rest)[0].values(), expected[0])
    assert fallbacks() == {"shared input: a NestedTensor"}


def test_compiled_values_are_those_of_single_calls():
    arguments = draw(lead=(6,))

    def run(x):
        ys = lora_linears(x, *arguments[1:], dropout_p=(0.5, 0.0, 0.0, 0.0))
        return torch.cat([torch.tanh(y) for y in ys], dim=1)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    torch.manual_seed(4)
    wanted = run(arguments[0])
    torch.manual_seed(4)
    got = compiled(arguments[0])
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(gradients([got], arguments), gradients([wanted], arguments))


def test_dropout_is_that_of_training():
    arguments = draw()
    ys = lora_linears(*arguments, dropout_p=0.5, training=False)
    assert all(torch.equal(y, wanted) for y, wanted in zip(ys, one_by_one(*arguments), strict=True))
    dropped = lora_linears(*arguments, dropout_p=0.5)
    assert torch.equal(dropped[1], ys[1]) and not torch.equal(dropped[0], ys[0])


def test_a_modified_input_is_an_error_that_says_what_to_do_or_was_copied():
    arguments = draw()
    x = arguments[0].detach().clone()
    for start in (0, 1):  # with an adapter in front, and without
        rest = [each[start:] for each in arguments[1:]]
        ys = lora_linears(x, *rest)
        x.add_(1.0)
        with pytest.raises(RuntimeError, match=r"the input \[3, 5, 12\] .* was modified in place .* copy_input=True"):
            sum(y.sum() for y in ys).backward()
    before = x.clone()
    ys = lora_linears(x, *arguments[1:], copy_input=True)
    x.add_(1.0)
    ys[0].sum().backward()
    a = arguments[2][0]
    wanted = torch.autograd.grad(lora_linear(before, arguments[1][0], a, arguments[3][0], 1.7).sum(), a)[0]
    assert torch.equal(a.grad, wanted)


def test_two_backwards_need_the_graph_retained():
    arguments = draw()
    arguments[0].requires_grad_(False)
    ys = lora_linears(*arguments)
    ys[0].sum().backward(retain_graph=True)
    ys[2].sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        ys[3].sum().backward()


def _changed(position, index, value):
    arguments = list(draw())
    arguments[position] = list(arguments[position])
    arguments[position][index] = value
    return arguments


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (lambda: [[] if isinstance(a, list | tuple) else a for a in draw()], {}, ValueError, "at least one projection"),
        (lambda: [*draw()[:4], (1.0,), draw()[5]], {}, ValueError, "got weights 4, scalings 1"),
        (draw, {"dropout_p": [0.1]}, ValueError, "got weights 4, dropout_p 1"),
        (draw, {"dropout_p": 1.5}, ValueError, "dropout_p must be between 0 and 1"),
        (lambda: _changed(4, 2, "1"), {}, TypeError, r"scalings\[2\] must be a number"),
        (lambda: _changed(1, 2, torch.zeros(6, 11)), {}, ValueError, r"projection 2: shapes .* weight \[6, 11\]"),
        (lambda: _changed(2, 2, None), {}, ValueError, "projection 2: lora_a and lora_b must both be tensors"),
        (lambda: _changed(1, 1, torch.zeros(4, 11)), {}, ValueError, r"projection 1: shapes .*weight \[4, 11\]"),
        (lambda: _changed(5, 1, torch.zeros(3)), {}, ValueError, r"projection 1: shapes .*bias \[3\]"),
        (lambda: _changed(1, 1, torch.zeros(4, K).double()), {}, TypeError, "projection 1: x is torch.float32"),
        (lambda: _changed(1, 1, torch.zeros(4, K, device="meta")), {}, ValueError, "projection 1: x is on cpu"),
        (lambda: _changed(1, 3, torch.zeros(5, K, requires_grad=True)), {}, ValueError, "projection 3: .* gradient"),
        (lambda: _changed(1, 1, torch.zeros(4, K, requires_grad=True)), {}, ValueError, "projection 1: .* gradient"),
    ],
)  # fmt: skip
def test_refusals(arguments, options, error, message):
    with pytest.raises(error, match=message):
        lora_linears(*arguments(), **options)


def test_a_quantised_weight_is_a_call_of_its_own():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    generator = torch.Generator().manual_seed(0)
    x, dense = (torch.randn(s, generator=generator) for s in ((3, 64), (8, 64)))
    codes, state = bitsandbytes.functional.quantize_4bit(torch.randn(8, 64, generator=generator), quant_type="nf4")
    packed = bitsandbytes.nn.Params4bit(codes, requires_grad=False, quant_state=state, bnb_quantized=True)
    a, b = torch.randn(2, 64, generator=generator), torch.randn(8, 2, generator=generator)
    fastlora.reset_dispatch_counts()
    ys = lora_linears(x, [packed, dense], [a, a], [b, b], [2.0, 2.0])
    assert all(torch.equal(y, lora_linear(x, w, a, b, 2.0)) for y, w in zip(ys, (packed, dense), strict=True))
    assert "shared input: a Params4bit" in fastlora.dispatch_counts()["fallbacks"]
    with pytest.raises(TypeError, match="projection 0: without an adapter its weight must be dense"):
        lora_linears(x, [packed], [None], [None], [0.0])
