"""The differentiable LoRA layer on rows in segments: ops, the autograd.Function over them, ``grouped_lora_linear``."""

import torch
from torch import Tensor

from fastlora import dispatch
from fastlora.checks import FROZEN_WEIGHT, as_number, check_dropout
from fastlora.counts import count_fallback
from fastlora.differentiable import FORWARD_MODE, TRACE, backward_reason, transform_reason
from fastlora.grouped.checks import check_dtypes, check_grouped
from fastlora.grouped.differentiable import gradients as differentiable_gradients
from fastlora.grouped.differentiable import layer as differentiable_layer
from fastlora.op_tools import grouped_backward_flops, grouped_forward_flops, register_flops
from fastlora.philox import draw_seed
from fastlora.problem import Gradients, Needs
from fastlora.segments import GroupedBackward, GroupedForward, Segments, as_gradients, describe_segments
from fastlora.selection import environment_backend

_library = torch.library.Library("fastlora", "FRAGMENT")
_SEGMENTS = (
    "float scaling, Tensor? scalings, Tensor offsets, Tensor? experts, Tensor? adapters, bool transposed,"
    " float dropout_p, Tensor? seed"
)
_library.define(
    f"grouped_forward(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, {_SEGMENTS}, str? backend)"
    " -> (Tensor y, Tensor s)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "grouped_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? s, int bias_dims,"
    f" {_SEGMENTS}, bool[] needs, str? backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
_N_INPUTS = 14  # of grouped_forward


def _forward_op(x, weight, lora_a, lora_b, bias, scaling, scalings, offsets, experts, adapters, *rest):
    transposed, dropout_p, seed, backend = rest
    segments = Segments(offsets, experts, adapters)
    operands = GroupedForward(x, weight, lora_a, lora_b, bias, scaling, scalings, segments, transposed, dropout_p, seed)
    return dispatch.segmented(*describe_segments(operands), backend or environment_backend())


def _backward_op(dy, x, weight, lora_a, lora_b, s, bias_dims, *rest):
    *given, needs, backend = rest
    operands, needs = _backward_operands(dy, x, weight, lora_a, lora_b, s, bias_dims, *given), Needs(*needs)
    described = describe_segments(operands, needs)
    computed: Gradients = dispatch.segmented(*described, backend or environment_backend())
    return [gradient for gradient in computed if gradient is not None]


def _backward_operands(dy, x, weight, lora_a, lora_b, s, bias_dims, scaling, scalings, *rest) -> GroupedBackward:
    offsets, experts, adapters, transposed, dropout_p, seed = rest
    segments = Segments(offsets, experts, adapters)
    return GroupedBackward(
        dy, x, weight, lora_a, lora_b, s, bias_dims, scaling, scalings, segments, transposed, dropout_p, seed
    )


def _out_features(weight, transposed):
    return weight.shape[2 if transposed else 1]


def _fake_forward(x, weight, lora_a, lora_b, bias, scaling, scalings, offsets, experts, adapters, transposed, *_):
    return x.new_empty(x.shape[0], _out_features(weight, transposed)), x.new_empty(x.shape[0], lora_a.shape[1])


def _fake_backward(dy, x, weight, lora_a, lora_b, s, bias_dims, *rest):
    needs = rest[-2]
    n = dy.shape[1]
    shapes = (
        (dy.shape[0], lora_a.shape[2]),
        lora_a.shape,
        lora_b.shape,
        (n,) if bias_dims == 1 else (weight.shape[0], n),
    )
    dtypes = (dy.dtype, lora_a.dtype, lora_b.dtype, dy.dtype)
    return [dy.new_empty(z, dtype=t) for z, t, need in zip(shapes, dtypes, needs, strict=True) if need]


def _save(ctx, s, inputs):
    """Keeps what the backward reads: x itself and S (M×R), each only where a gradient does."""
    x, weight, lora_a, lora_b, bias, scaling, scalings, offsets, experts, adapters, *rest = inputs
    transposed, dropout_p, seed, backend = rest
    _, _, need_da, need_db, *_ = ctx.needs_input_grad
    x = x if need_da else None
    s = s if need_db else None
    ctx.save_for_backward(x, weight, lora_a, lora_b, s, scalings, offsets, experts, adapters, seed)
    ctx.numbers = scaling, transposed, dropout_p
    ctx.bias_shape, ctx.backend = None if bias is None else bias.shape, backend


def _gradients(ctx, dy):
    """What a node returns for each input of grouped_forward, whatever autocast surrounds the call of backward."""
    device_type = dy.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _gradients(ctx, dy)
    need_dx, _, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
    needs = Needs(need_dx, need_da, need_db, need_dbias)
    x, weight, lora_a, lora_b, s, scalings, offsets, experts, adapters, seed = ctx.saved_tensors
    scaling, transposed, dropout_p = ctx.numbers
    bias_dims = 0 if ctx.bias_shape is None else len(ctx.bias_shape)
    args = (
        *(dy, x, weight, lora_a, lora_b, s, bias_dims, scaling, scalings),
        *(offsets, experts, adapters, transposed, dropout_p, seed),
    )
    reason = backward_reason()
    if reason is None:
        computed = _call(torch.ops.fastlora.grouped_backward.default, *args, needs, ctx.backend)
    else:
        count_fallback(reason)
        computed = differentiable_gradients(_backward_operands(*args), ctx.bias_shape, needs)
    dx, da, db, dbias = as_gradients(computed, needs)
    return dx, None, da, db, dbias, *[None] * (_N_INPUTS - 5)


def _call(op, *args):
    """Calls an op from within an autograd.Function, where its own autograd formula has nothing to record."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class GroupedLoRAFunction(torch.autograd.Function):
    """One LoRA layer on rows in segments as one autograd node.

    ``apply`` takes the arguments of ``torch.ops.fastlora.grouped_forward``, checked; use :func:`grouped_lora_linear`.
    It saves x itself and S (M×R), and only where a gradient reads them; everything else goes by reference. Where its
    backward is to be differentiated itself, torch's own operators make the gradients, counted as a fallback.
    """

    @staticmethod
    def forward(ctx, *inputs):
        y, s = _call(torch.ops.fastlora.grouped_forward.default, *inputs)
        _save(ctx, s, inputs)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy)


def _setup(ctx, inputs, output):
    """What the op's own node keeps, which graphs train through."""
    if ctx.needs_input_grad[1]:
        raise ValueError(FROZEN_WEIGHT)
    _, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    _save(ctx, s, inputs)


def _op_gradients(ctx, dy, _):
    return (None,) * _N_INPUTS if dy is None else _gradients(ctx, dy)


for _name, _kernel, _fake in (
    ("grouped_forward", _forward_op, _fake_forward),
    ("grouped_backward", _backward_op, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)
register_flops({"grouped_forward": grouped_forward_flops, "grouped_backward": grouped_backward_flops})
torch.library.register_autograd("fastlora::grouped_forward", _op_gradients, setup_context=_setup, lib=_library)


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float | Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    experts: Tensor | None = None,
    adapters: Tensor | None = None,
    transposed: bool = False,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A LoRA layer on rows sorted into G segments, each with a weight and an adapter of its own choice.

    For the rows X of a segment with weight W and adapter t:
    ``X·Wᵀ + scaling[t]·(dropout(X)·lora_a[t]ᵀ)·lora_b[t]ᵀ + bias``. MoE experts are segments whose weight and adapter
    is the expert's; a batch of several adapters has one weight.

    Args:
        x: input [M, in_features]; float16, bfloat16, float32 or float64.
        weight: frozen weights [E, out_features, in_features], or one [out_features, in_features]; of x's dtype.
        lora_a: [T, r, in_features]; x's dtype, or float32 over a 16-bit x.
        lora_b: [T, out_features, r]; likewise.
        scaling: factor of the branches, or one for each adapter: [T], floating-point.
        offsets: int32 [G]: the row before which each segment ends, never decreasing. Rows past the last end give
            zeros. On a GPU its values are not read on the host.
        bias: [E, out_features], or [out_features] for all segments, of x's dtype, or None; trainable if it requires a
            gradient.
        experts: int32 or int64 [G]: the weight of each segment; by default its own number, or the only weight.
        adapters: int32 or int64 [G]: the adapter of each segment, -1 for none; by default its own number. Without an
            adapter no branch is computed, and nothing of any factor gets into the segment's rows. By the kernels, rows
            whose weight or adapter does not exist are NaN, and offsets that decrease or pass M are clamped; under
            ``TRITON_DEBUG=1`` Triton's kernels serve such calls, and either traps.
        transposed: each weight lies as [in_features, out_features].
        dropout_p: probability of dropping an element of x in front of the branch; the mask depends on an element's
            place in all of x and on the seed, as ``lora_linear``'s does.
        training: whether dropout applies.
        backend: "cuda", "triton", "composed" or "reference" to insist on one; None for the best that serves the call.

    Returns:
        Tensor [M, out_features] of x's dtype. Under ``torch.autocast``, x and bias are cast to its dtype, each weight
        where it is used, unless x is float64. Under a transform of ``torch.func`` and in forward-mode AD, torch's own
        operators make it, counted as a fallback; these read the offsets on the host.

    Raises:
        ValueError: shapes or devices do not fit, a gradient of weight or scaling is asked for, no backend serves the
            call, the call is traced by ``torch.jit.trace``; on a CPU, offsets that decrease or pass M, and indices out
            of range.
        TypeError: dtypes do not fit, or a tensor is nested or a DTensor.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3, for each segment.
    """
    if weight.dim() == 2:
        weight = weight.unsqueeze(0)
    scalings = scaling if isinstance(scaling, Tensor) else None
    number = as_number("scaling", scaling) if scalings is None else 1.0
    compiles = torch.compiler.is_compiling()
    reason = None if compiles else transform_reason()
    if reason == TRACE:
        raise ValueError("torch.jit.trace would keep where the segments of one batch end; use torch.export")
    check_grouped(x, weight, lora_a, lora_b, scalings, offsets, bias, experts, adapters, transposed)
    check_dropout(dropout_p)
    x, bias, lora_a, lora_b, casts = _under_autocast(x, bias, lora_a, lora_b)
    check_dtypes(x, x if casts and weight.is_floating_point() else weight, lora_a, lora_b, bias)
    if not training:
        dropout_p = 0.0
    seed = draw_seed(x.device) if dropout_p > 0.0 and reason in (None, FORWARD_MODE) else None
    if reason is not None:
        if backend is not None:
            raise ValueError(f"backend {backend!r} cannot serve a call under a {reason}")
        count_fallback(reason)
        segments = Segments(offsets, experts, adapters)
        return differentiable_layer(
            GroupedForward(x, weight, lora_a, lora_b, bias, number, scalings, segments, transposed, dropout_p, seed)
        )
    inputs = (
        *(x, weight, lora_a, lora_b, bias, number, scalings),
        *(offsets, experts, adapters, transposed, dropout_p, seed, backend),
    )
    if compiles or not torch.is_grad_enabled():
        return torch.ops.fastlora.grouped_forward.default(*inputs)[0]
    return GroupedLoRAFunction.apply(*inputs)


def _under_autocast(x, bias, lora_a, lora_b) -> tuple[Tensor, Tensor | None, Tensor, Tensor, bool]:
    """What autocast makes of x, bias, A and B, and whether the weights are to be cast where they are used."""
    device_type = x.device.type
    # torch refuses to say for "meta", where shapes alone are computed.
    if device_type == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(device_type):
        return x, bias, lora_a, lora_b, False
    dtype = torch.get_autocast_dtype(device_type)
    bias = None if bias is None else bias.to(dtype)
    lora_a, lora_b = (t if t.dtype == torch.float32 else t.to(dtype) for t in (lora_a, lora_b))
    return x.to(dtype), bias, lora_a, lora_b, True
