"""``grouped_lora_linear``: rows in segments, against a loop over the segments."""

import pytest
import torch

import fastlora
from fastlora import grouped_lora_linear
from fastlora.bench.memory import saved_bytes
from tests.support.numerics import assert_reordered
from tests.support.segments import assert_accurate, assert_exact, by_loop, changed, compute, draw_case

# Lengths of the segments, and what else draw_case takes: two shapes of rows and of factors with each.
LAYOUTS = {
    "experts": ([5, 0, 17, 1, 9], {}),
    "one segment": ([11], {}),
    "all rows in one": ([0, 0, 13, 0], {}),
    "of one row": ([1] * 6, {}),
    "no rows": ([0, 0], {}),
    "rows past the last end": ([4, 0, 6], {"rows_after": 5}),
    "only rows past the last end": ([0, 0], {"rows_after": 3}),
    "one weight": ([5, 2, 7, 3], {"n_weights": 1, "n_adapters": 2, "adapters": [1, -1, 0, 1], "rows_after": 2}),
    "experts and tenants": (
        [3, 4, 0, 5, 2, 6],
        {"n_weights": 3, "n_adapters": 4, "experts": [0, 0, 1, 2, 2, 0], "adapters": [2, -1, 3, 3, 0, 2]},
    ),
    "no branch at all": ([4, 5], {"n_adapters": 1, "adapters": [-1, -1]}),
}
WAYS = {
    "plain": {},
    "bias each, scaling each, transposed": {"bias": "each", "scaling": "each", "transposed": True},
    "one bias, dropout": {"bias": "one", "dropout_p": 0.3},
}


def case_of(layout, **options):
    lengths, given = LAYOUTS[layout]
    return draw_case(lengths, 12, 10, 3, **{**given, **options})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loop_over_segments(poisoned, layout, way, dtype):
    case = case_of(layout, dtype=dtype, **WAYS[way])
    results = compute(case)
    # In float32 the order of a product's sums is its shape's and the processor's, and so is its error within the bound.
    assert_accurate(results, case, against_eager=dtype != torch.float32)
    assert all(torch.equal(again, results[name]) for name, again in compute(case).items())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_integers_are_exact(poisoned, layout, transposed):
    case = case_of(layout, integers=True, scaling="each", bias="each", transposed=transposed)
    assert_exact(compute(case), case)


def test_float64_and_gradcheck():
    segments = {"n_weights": 2, "n_adapters": 2, "experts": [1, 0, 0], "adapters": [0, 1, 0], "rows_after": 1}
    case = draw_case([2, 1, 2], 3, 4, 2, torch.float64, bias="each", **segments)
    arguments, options = case.arguments()
    leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, case.bias)]

    def layer(x, a, b, bias):
        return grouped_lora_linear(x, case.weight, a, b, *arguments, bias, **options)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_over_a_16_bit_base(dtype):
    case = case_of("experts and tenants", dtype=dtype, adapter_dtype=torch.float32, scaling="each")
    results = compute(case)
    assert results["da"].dtype == results["db"].dtype == torch.float32
    assert_accurate(results, case)


def test_float16_overflows_where_the_loop_does_and_nowhere_else():
    case = case_of("one weight", dtype=torch.float16)
    case = changed(case, x=case.x * 1000, scaling=64.0, lora_b=case.lora_b / 64)
    results = compute(case)["y"], by_loop(case)["y"]
    assert results[1].isfinite().all() and results[0].isfinite().all()


def test_a_single_matrix_is_a_stack_of_one():
    case = case_of("one weight", bias="one")
    arguments, options = case.arguments()
    stacked = grouped_lora_linear(case.x, case.weight, case.lora_a, case.lora_b, *arguments, case.bias, **options)
    single = grouped_lora_linear(case.x, case.weight[0], case.lora_a, case.lora_b, *arguments, case.bias, **options)
    assert torch.equal(stacked, single)


def test_one_adapter_for_all_rows_is_the_plain_layer_with_its_mask():
    case = draw_case([30], 12, 10, 3, bias="one", dropout_p=0.4)
    plain = {"x": case.x, "a": case.lora_a[0], "b": case.lora_b[0]}
    plain = {name: t.clone().requires_grad_() for name, t in plain.items()}
    torch.manual_seed(0)
    y = fastlora.lora_linear(plain["x"], case.weight[0], plain["a"], plain["b"], 1.7, case.bias, dropout_p=0.4)
    gradients = torch.autograd.grad(y, list(plain.values()), case.dy)
    results = compute(case)
    for got, wanted in zip((results[n] for n in ("y", "dx", "da", "db")), (y, *gradients), strict=True):
        torch.testing.assert_close(got.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("backend", ["reference", "composed"])
def test_nothing_of_a_skipped_adapter_gets_into_its_rows(backend):
    lengths, given = LAYOUTS["one weight"]
    case = draw_case(lengths, 16, 24, 3, dtype=torch.bfloat16, **given)
    broken = changed(case, lora_a=case.lora_a.clone(), lora_b=case.lora_b.clone(), x=case.x.clone())
    broken.lora_a[0], broken.lora_b[0] = torch.nan, torch.inf  # of the rows 7 to 13; -1 has 5 and 6
    broken.x[5, 0] = torch.inf  # nor does a product of it with the zeros of no adapter
    results, wanted = compute(broken, backend=backend), compute(case, backend=backend)
    assert results["y"][5].isinf().all()
    clean = [*range(5), 6, *range(14, 19)]
    for name in ("y", "dx"):
        assert torch.equal(results[name][clean], wanted[name][clean])
        assert results[name][7:14].isnan().all()
    assert torch.equal(results["da"][1], wanted["da"][1]) and torch.equal(results["db"][1], wanted["db"][1])


def test_a_row_past_the_last_end_gets_into_nothing():
    case = case_of("rows past the last end", bias="each")
    broken = changed(case, x=case.x.clone(), dy=case.dy.clone())
    broken.x[10:], broken.dy[10:] = torch.nan, torch.nan
    assert all(torch.equal(compute(broken)[name], value) for name, value in compute(case).items())


@pytest.mark.parametrize("needs", ["x", "a", "b", "bias"])
def test_only_what_a_gradient_reads_is_saved_and_computed(needs):
    m, k, n, r = 400, 32, 24, 4
    case = draw_case([100] * 4, n, k, r, bias="each")
    tensors = {"x": case.x, "a": case.lora_a, "b": case.lora_b, "bias": case.bias}
    tensors = {name: t.requires_grad_(name == needs) for name, t in tensors.items()}
    given = [case.weight, case.ends, *tensors.values()]

    def layer():
        return grouped_lora_linear(case.x, case.weight, case.lora_a, case.lora_b, *case.arguments()[0], case.bias)

    size = 4  # bytes of a float32
    x_bytes = saved_bytes(layer, [t for t in given if t is not case.x])
    assert x_bytes == {"x": 0, "a": m * k * size, "b": m * r * size, "bias": 0}[needs]
    (gradient,) = torch.autograd.grad(layer(), [tensors[needs]], case.dy)
    wanted = by_loop(case)[{"x": "dx"}.get(needs, f"d{needs}")]
    assert_reordered([gradient], [wanted], 100 + n)


REFUSED = {
    "decreasing offsets": ({"ends": torch.tensor([3, 2, 4, 5], dtype=torch.int32)}, r"offsets\[1\] is 2 after 3"),
    "offsets past M": ({"ends": torch.tensor([3, 4, 5, 99], dtype=torch.int32)}, r"at most the 19 rows of x"),
    "negative offsets": ({"ends": torch.tensor([-1, 4, 5, 9], dtype=torch.int32)}, r"offsets\[0\] is -1 after 0"),
    "an adapter that is none": (
        {"adapters": torch.tensor([0, 1, 2, 0])},
        r"adapters\[2\] is 2; it must be from -1 to 1",
    ),
    "adapter -2": ({"adapters": torch.tensor([0, -2, 1, 0])}, r"adapters\[1\] is -2; it must be from -1 to 1"),
    "a weight that is none": ({"experts": torch.tensor([0, 0, 1, 0])}, r"experts\[2\] is 1; it must be from 0 to 0"),
    "adapters by default": ({"adapters": None}, "4 segments and 2 adapters: give adapters"),
    "weights by default": ({"weight": torch.randn(2, 12, 10)}, "4 segments and 2 weights: give experts"),
    "as many indices": ({"adapters": torch.tensor([0, 1])}, r"adapters must be \[4\], one for each segment"),
    "no segment": ({"ends": torch.tensor([], dtype=torch.int32)}, "each of at least one segment"),
    "x of three dimensions": ({"x": torch.randn(2, 9, 10)}, r"expected x \[M, K\], weight \[E, N, K\]"),
    "a transposed weight": ({"transposed": True}, r"expected x \[M, K\], weight \[E, K, N\]"),
    "a bias of another size": ({"bias": torch.randn(2, 12)}, r"bias \[E, N\] or \[N\]; got .* bias \[2, 12\]"),
    "rank 0": ({"lora_a": torch.randn(2, 0, 10), "lora_b": torch.randn(2, 12, 0)}, "must be at least 1"),
    "as many scalings": ({"scaling": torch.ones(3)}, r"scaling has shape \[3\]; it must be a number or \[2\]"),
    "scaling that trains": ({"scaling": torch.ones(2, requires_grad=True)}, "multiply lora_b by it"),
    "dropout": ({"dropout_p": 1.5}, "dropout_p must be between 0 and 1"),
    "a weight that trains": ({"weight": torch.randn(1, 12, 10, requires_grad=True)}, "weight requires a gradient"),
    "two devices": ({"ends": torch.zeros(4, dtype=torch.int32, device="meta")}, "x is on cpu but offsets is on meta"),
}
REFUSED_TYPES = {
    "int64 offsets": ({"ends": torch.tensor([3, 4, 5, 9])}, "offsets must be int32, got torch.int64"),
    "floating-point adapters": ({"adapters": torch.ones(4)}, "adapters must be int32 or int64"),
    "another dtype": ({"x": torch.randn(19, 10).half()}, "x is torch.float16, weight torch.float32"),
    "adapters of another dtype": ({"lora_a": torch.randn(2, 3, 10).double()}, "lora_a is torch.float64"),
    "scaling of integers": ({"scaling": torch.tensor([1, 2])}, "floating-point"),
    "a packed weight": ({"weight": torch.zeros(1, 12, 10, dtype=torch.uint8)}, "weight torch.uint8"),
    "scaling as text": ({"scaling": "2"}, "scaling must be a number"),
    "offsets as a list": ({"ends": [1, 2, 3, 4]}, "offsets must be a tensor, got a list"),
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_TYPES])
def test_one_clear_error(name):
    fields, message = {**REFUSED, **REFUSED_TYPES}[name]
    case = changed(case_of("one weight"), **fields)
    arguments, options = case.arguments()
    for autocast in (False, True) if name == "a packed weight" else (False,):
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            pytest.raises(ValueError if name in REFUSED else TypeError, match=message),
        ):
            grouped_lora_linear(case.x, case.weight, case.lora_a, case.lora_b, *arguments, case.bias, **options)


def test_other_backends_say_why_not():
    case = case_of("one weight")
    with pytest.raises(
        ValueError, match="'composed' cannot serve this call: composed: torch's grouped product of torch"
    ):
        compute(case, backend="composed")
    with pytest.raises(ValueError, match="'triton' cannot serve this call"):
        compute(case, backend="triton")
    with pytest.raises(ValueError, match="unknown backend 'fast'"):
        compute(case, backend="fast")


def test_calls_are_counted():
    fastlora.reset_dispatch_counts()
    compute(case_of("experts"))
    counts = fastlora.dispatch_counts()
    assert counts["reference"] == 2 and not counts["fallbacks"]


def test_autocast_casts_weights_where_they_are_used():
    case = case_of("one weight", bias="one")
    rounded = case.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        arguments, options = case.arguments()
        factors = [t.clone().requires_grad_() for t in (case.lora_a, case.lora_b)]
        y = grouped_lora_linear(case.x, case.weight, *factors, *arguments, case.bias, **options)
        saved = saved_bytes(
            lambda: grouped_lora_linear(case.x, case.weight, *factors, *arguments, case.bias, **options),
            [case.weight, *factors, case.ends, case.adapters],
        )
        gradients = torch.autograd.grad(y, factors, rounded.dy)
    assert saved == 2 * case.x.numel() + 2 * len(case.x) * 3  # X and S in bfloat16
    rounded = changed(rounded, lora_a=case.lora_a, lora_b=case.lora_b)
    assert_accurate({"y": y.detach(), "da": gradients[0], "db": gradients[1]}, rounded)


def test_transforms_and_second_derivatives_are_counted():
    case = case_of("one weight", dtype=torch.float64)
    arguments, options = case.arguments()

    def layer(x):
        return grouped_lora_linear(x, case.weight, case.lora_a, case.lora_b, *arguments, **options)

    stacked = torch.stack([case.x, case.x * 2])
    fastlora.reset_dispatch_counts()
    torch.testing.assert_close(torch.func.vmap(layer)(stacked), torch.stack([layer(x) for x in stacked]))
    assert fastlora.dispatch_counts()["fallbacks"] == {"torch.func transform": 1}
    _, tangent = torch.func.jvp(layer, (case.x,), (case.x,))
    torch.testing.assert_close(tangent, layer(case.x))
    x = case.x.clone().requires_grad_()
    a = case.lora_a.clone().requires_grad_()
    y = grouped_lora_linear(x, case.weight, a, case.lora_b, *arguments, **options)
    fastlora.reset_dispatch_counts()
    torch.autograd.grad(y.sum(), x, create_graph=True)
    assert fastlora.dispatch_counts()["fallbacks"] == {"create_graph=True": 1}
    with pytest.raises(ValueError, match="torch.jit.trace would keep"), torch.no_grad():
        torch.jit.trace(layer, (case.x,))
    with pytest.raises(ValueError, match="cannot serve a call under a torch.func transform"):
        torch.func.vmap(
            lambda x: grouped_lora_linear(x, case.weight, a, case.lora_b, *arguments, **options, backend="reference")
        )(stacked)


def test_vectorized_gradients_are_refused():
    case = case_of("one weight")
    x = case.x.requires_grad_()
    arguments, options = case.arguments()
    y = grouped_lora_linear(x, case.weight, case.lora_a, case.lora_b, *arguments, **options)
    with pytest.raises(RuntimeError, match="Batching rule not implemented for fastlora::grouped_backward"):
        torch.autograd.grad(y, x, torch.stack([case.dy] * 2), is_grads_batched=True)


def test_a_second_derivative_through_a_frozen_a_is_refused():
    case = case_of("experts")
    x, b = case.x.requires_grad_(), case.lora_b.requires_grad_()
    y = grouped_lora_linear(x, case.weight, case.lora_a, b, *case.arguments()[0])
    with pytest.raises(RuntimeError, match="let lora_a require a gradient as well"):
        torch.autograd.grad(y.sum(), [x, b], create_graph=True)


def test_the_ops_obey_torchs_rules():
    case = case_of("experts and tenants", bias="each", rows_after=2)
    x, a, b, bias = (t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b, case.bias))
    segments = (1.7, None, case.ends, case.experts, case.adapters, False, 0.0, None)
    arguments = (x, case.weight, a, b, bias, *segments, None)
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    torch.library.opcheck(torch.ops.fastlora.grouped_forward.default, arguments, test_utils=tests)
    s = torch.ops.fastlora.grouped_forward(*arguments)[1].detach()
    x, a, b = x.detach(), a.detach(), b.detach()
    backward = (case.dy, x, case.weight, a, b, s, 2, *segments, [True] * 4, None)
    torch.library.opcheck(torch.ops.fastlora.grouped_backward.default, backward, test_utils=tests)


def test_compiled():
    case = case_of("experts and tenants", dropout_p=0.0, bias="each", scaling="each")
    arguments, options = case.arguments()

    def step(x, a, b, ends):
        return grouped_lora_linear(x, case.weight, a, b, arguments[0], ends, case.bias, **options).tanh()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for ends in (case.ends, torch.tensor([1, 2, 2, 9, 9, 20], dtype=torch.int32)):
        results = []
        for call in (step, compiled):
            leaves = [t.clone().requires_grad_() for t in (case.x, case.lora_a, case.lora_b)]
            y = call(*leaves, ends)
            results.append((y, *torch.autograd.grad(y, leaves, case.dy)))
        for got, wanted in zip(*results, strict=True):
            torch.testing.assert_close(got, wanted)


def test_meta_tensors_have_shapes_alone():
    case = case_of("experts")
    tensors = [t.to("meta") for t in (case.x, case.weight, case.lora_a, case.lora_b)]
    y = grouped_lora_linear(*tensors, 1.0, case.ends.to("meta"))
    assert y.shape == case.dy.shape and y.device.type == "meta"


def poisoned_grouped_mm(left, right, offs, product=torch.nn.functional.grouped_mm):
    """torch's product, NaN wherever it need not write."""
    result = product(left, right, offs=offs)
    if right.dim() == 2:
        has_rows = torch.diff(offs, prepend=offs.new_zeros(1)) > 0
        return result.masked_fill(~has_rows[:, None, None], torch.nan)
    return result.masked_fill((torch.arange(left.shape[0]) >= offs[-1])[:, None], torch.nan)


COMPOSED = [name for name in LAYOUTS if name != "no rows"]  # which is the reference's, whoever is asked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", COMPOSED)
def test_composed_of_torchs_grouped_products(monkeypatch, poisoned, layout, way):
    """As on a GPU, where nothing of offsets, experts and adapters may be read on the host, and where torch's product
    leaves rows past the last end as they were, and perhaps the gradient of a segment without rows."""
    lengths, given = LAYOUTS[layout]
    case = draw_case(lengths, 16, 24, 3, dtype=torch.bfloat16, **{**given, **WAYS[way]})
    fastlora.reset_dispatch_counts()
    with monkeypatch.context() as patched:
        for name in ("tolist", "item", "__bool__", "__index__", "__len__"):
            patched.setattr(torch.Tensor, name, lambda *_: pytest.fail("read on the host"))
        patched.setattr(torch.nn.functional, "grouped_mm", poisoned_grouped_mm)
        results = compute(case, backend="composed")
    assert fastlora.dispatch_counts()["composed"] == 2
    assert_accurate(results, case)
    assert all(torch.equal(again, results[name]) for name, again in compute(case, backend="composed").items())
