"""What every kernel may take for granted of its operands, and the description of a call."""

import dataclasses

import pytest
import torch

import fastlora
from fastlora import dispatch, routes
from fastlora.backends import reference, tuning
from fastlora.operands import as_rows, describe_backward, describe_forward, is_aligned
from fastlora.problem import BackwardOperands, ForwardOperands, Needs, Sizes, split_scaling
from tests.support import numerics

ALL = Needs(True, True, True, True)
# One matrix in ways that users lay it out.
LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "cut out": lambda t: torch.nn.functional.pad(t, (8, 8), value=7.0)[:, 8:-8],
    "transposed": lambda t: t.t().contiguous().t(),
    "every other column": lambda t: torch.stack([t, torch.full_like(t, 7.0)], 2)[:, :, 0],
    "offset by one": lambda t: torch.cat([t.new_full((1,), 7.0), t.flatten()])[1:].view(t.shape),
}


def forward_operands(case, **changes) -> ForwardOperands:
    c = dataclasses.replace(case, **changes)
    return ForwardOperands(c.x, c.weight, c.lora_a, c.lora_b, c.bias, c.scaling, c.dropout_p, c.seed)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ("x", "weight", "lora_a", "lora_b"))
def test_matrices_come_as_rows_with_the_same_values(name, layout):
    case = numerics.draw_case(9, 16, 24, 8, torch.bfloat16)
    laid_out = LAYOUTS[layout](getattr(case, name))
    described, spec = describe_forward(forward_operands(case, **{name: laid_out}))
    matrix = getattr(described, name)
    assert torch.equal(matrix, getattr(case, name))
    if name == "weight" and layout == "transposed":  # as it lies; see test_conv1d
        assert matrix is laid_out and spec.base_format == "transposed"
        return
    assert matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1] and spec.base_format == "dense"
    field = {"x": "act"}.get(name, name)
    assert getattr(spec.aligned, field) is (matrix.data_ptr() % 16 == 0 and matrix.stride(0) * 2 % 16 == 0)


def test_rows_that_overlap_are_copied():
    """The driver wants a row stride of at least a row for a tensor map; an expanded gradient's is 0."""
    expanded = torch.arange(64.0)[None].expand(8, 64)
    windows = torch.arange(80.0).as_strided((8, 64), (2, 1))
    for matrix in (expanded, windows):
        rows = as_rows(matrix)
        assert torch.equal(rows, matrix) and rows.stride() == (64, 1)


@pytest.mark.parametrize("step", (2, 3, 0))
def test_a_bias_with_gaps_is_made_contiguous(step):
    """Every vector: kernels read element after element, whatever its stride."""
    case = numerics.draw_case(5, 24, 16, 8, torch.float16)
    if step:
        wide = torch.full((24, step), 7.0, dtype=torch.float16)
        wide[:, 1 % step] = case.bias
        bias = wide[:, 1 % step]
    else:
        bias = case.bias[:1].expand(24)
    described, _ = describe_forward(forward_operands(case, bias=bias))
    assert described.bias.stride() == (1,) and described.bias.data_ptr() % 16 == 0
    assert torch.equal(described.bias, bias)


def test_a_saved_s_of_other_strides_is_made_contiguous():
    """Hooks on saved tensors may give back what they like, so long as the values are the same."""
    c = numerics.draw_case(12, 16, 24, 8, torch.bfloat16)
    s = torch.randn(8, 12).bfloat16().t()
    operands = BackwardOperands(c.dy, c.x, c.weight, c.lora_a, c.lora_b, s, c.scaling, 0.0, None)
    described, spec = describe_backward(operands, ALL)
    assert described.s.is_contiguous() and torch.equal(described.s, s)
    assert spec.sizes == Sizes(12, 16, 24, 8) and spec.direction == "backward" and spec.needs == ALL


def test_what_no_gradient_reads_is_left_out():
    c = numerics.draw_case(12, 16, 24, 8, torch.bfloat16)
    operands = BackwardOperands(c.dy, c.x, c.weight, c.lora_a, c.lora_b, c.x[:, :8], c.scaling, 0.0, None)
    described, _ = describe_backward(operands, Needs(True, False, False, True))
    assert described.x is None and described.s is None


def test_one_row_is_aligned_only_if_its_stride_is():
    """A tensor map checks the stride of a single row as well."""
    assert is_aligned(torch.zeros(1, 8, dtype=torch.bfloat16))
    assert not is_aligned(torch.zeros(1, 7, dtype=torch.bfloat16))
    assert not is_aligned(torch.zeros(17, dtype=torch.bfloat16)[1:].view(2, 8))


@pytest.mark.parametrize("m, n, k", ((0, 6, 7), (5, 0, 7), (5, 6, 0), (0, 0, 0)))
@pytest.mark.parametrize("requested", (None, "composed", "triton", "cuda"))
def test_empty_calls_are_the_references_whatever_is_requested(m, n, k, requested):
    fastlora.reset_dispatch_counts()
    x, weight = torch.ones(m, k), torch.ones(n, k)
    lora_a, lora_b, bias = torch.ones(2, k), torch.ones(n, 2), torch.ones(n)
    y, s = dispatch.forward(ForwardOperands(x, weight, lora_a, lora_b, bias, 2.0, 0.0, None), requested)
    assert torch.equal(y, x @ weight.t() + bias + 2.0 * (x @ lora_a.t()) @ lora_b.t())
    operands = BackwardOperands(torch.ones(m, n), x, weight, lora_a, lora_b, s, 2.0, 0.0, None)
    gradients = dispatch.backward(operands, ALL, requested)
    assert (
        gradients.dx.shape == (m, k)
        and not gradients.db.any()
        and torch.equal(gradients.dbias, torch.ones(m, n).sum(0))
    )
    counts = fastlora.dispatch_counts()
    assert counts == {"cuda": 0, "triton": 0, "composed": 0, "reference": 2, "fallbacks": {}}


def test_a_backward_that_wants_nothing_is_the_references():
    c = numerics.draw_case(4, 8, 8, 8, torch.float32)
    operands = BackwardOperands(c.dy, None, c.weight, c.lora_a, c.lora_b, None, 1.0, 0.0, None)
    assert dispatch.backward(operands, Needs(False, False, False, False), "triton") == (None,) * 4


def test_one_description_is_prepared_once(monkeypatch):
    """A call of a known description looks its launcher up; what was tuned since is not missed."""
    prepared = []
    real = reference.prepare
    monkeypatch.setattr(reference, "prepare", lambda spec: prepared.append(spec) or real(spec))
    monkeypatch.setattr(dispatch, "_PLAIN", ())
    routes.forget_routes()
    case = numerics.draw_case(4, 8, 8, 8, torch.float32)
    for _ in range(3):
        dispatch.forward(forward_operands(case), None)
    assert len(prepared) == 1
    tuning.forget_choices()
    dispatch.forward(forward_operands(case), None)
    assert len(prepared) == 2


@pytest.mark.parametrize("scaling", (0.0, 0.3, 1.0, 1.5, 2.0, -3.0, 32.0, 1e-6, 7e4, -1.0))
def test_a_scaling_is_shared_out_exactly(scaling):
    in_s, on_branch = split_scaling(scaling, torch.float16)
    assert in_s * on_branch == scaling and abs(in_s) <= 1.0
    assert on_branch >= 1.0 and on_branch == 2.0 ** round(torch.tensor(on_branch).log2().item())
    assert abs(scaling) <= 1.0 or abs(in_s) > 0.5
    assert split_scaling(scaling, torch.bfloat16) == split_scaling(scaling, torch.float32) == (scaling, 1.0)
