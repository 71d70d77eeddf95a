"""The differentiable LoRA layer: torch.library ops, the autograd.Function over them, and ``lora_linear``."""

import math
from typing import Any

import torch
from torch import Tensor

from fastlora import dispatch
from fastlora.checks import FROZEN_WEIGHT, as_number, check_arguments, check_dropout, frozen_weight_reason
from fastlora.counts import count_fallback
from fastlora.differentiable import FORWARD_MODE, TRACE, backward_reason, composed, linked, transform_reason
from fastlora.differentiable import gradients as differentiable_gradients
from fastlora.op_tools import register_tools
from fastlora.philox import draw_seed
from fastlora.problem import Needs
from fastlora.quantised_layer import quantised_linear
from fastlora.quantised_weight import QuantisedWeight, check_decoded_dtype, is_packed, quantised
from fastlora.rows import flat, in_rows, on_jagged
from fastlora.saved_tensors import saved_tensors
from fastlora.selection import environment_backend

_dispatch_modes = torch._C._len_torch_dispatch_stack

_library = torch.library.Library("fastlora", "DEF")
_library.define(
    "lora_forward(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, float scaling, float dropout_p,"
    " Tensor? seed, str? backend) -> (Tensor y, Tensor s)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "lora_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? s, float scaling,"
    " float dropout_p, Tensor? seed, bool[] needs, str? backend) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def _forward(x, *rest):
    """Y [..., N] and S [M, R] of x [..., K]: ``ForwardOperands``, and the backend that is insisted on or None."""
    *operands, backend = rest
    if x.dim() == 2:
        return dispatch.forward((x, *operands), backend)
    y, s = dispatch.forward((flat(x), *operands), backend)
    # A tracked view made in here could not be modified in place by what follows the layer.
    return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], y.shape[1]]), s


def _backward_in_rows(*args):
    *operands, needs, backend = args
    return dispatch.backward(operands, needs, backend)


def _backward(dy, *rest):
    """The gradients of ``_forward`` for dY [..., N]: ``BackwardOperands``, needs, and the backend or None."""
    if dy.dim() != 2:
        return in_rows(_backward_in_rows, dy, *rest)
    *operands, needs, backend = rest
    return dispatch.backward((dy, *operands), needs, backend)


def _forward_op(*args):
    *operands, backend = args
    y, s = _forward(*operands, backend or environment_backend())
    return y, s.contiguous()  # as its fake says; the reference's may be a transposed view, as its dB is


def _backward_op(*args):
    *operands, needs, backend = args
    gradients = _backward(*operands, Needs(*needs), backend or environment_backend())
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


def _fake_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(math.prod(x.shape[:-1]), lora_a.shape[0])


def _fake_backward(dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, needs, backend):
    shapes = ((*dy.shape[:-1], weight.shape[1]), lora_a.shape, lora_b.shape, (weight.shape[0],))
    dtypes = (dy.dtype, lora_a.dtype, lora_b.dtype, dy.dtype)
    return [dy.new_empty(z, dtype=t) for z, t, need in zip(shapes, dtypes, needs, strict=True) if need]


def _skips_ops(tensor: Tensor) -> bool:
    """Whether to call a backend directly. On the CPU it is made of ATen calls, which whoever traces sees as well; an op
    around them would cost as much as a small layer's whole forward. A dispatch mode gets the op: selective
    checkpointing may keep a result that the reference goes on to add to in place."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not _dispatch_modes()


def _call(op, *args):
    """Calls an op from within an autograd.Function, where its own autograd formula has nothing to record."""
    if torch.compiler.is_compiling():
        return op(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def _save(ctx, s, x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend):
    """Keeps what the backward reads: x itself and S (M×R), each only where a gradient does."""
    need_dx, _, need_da, need_db, *_ = ctx.needs_input_grad
    if not need_db:
        s = None
    elif need_dx and not need_da and not torch.compiler.is_compiling():
        s = linked(s, x, lora_a, scaling, dropout_p, seed)
    ctx.save_for_backward(x if need_da else None, weight, lora_a, lora_b, s, seed)
    ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend


def _gradients(ctx, dy, skips_ops):
    """What a node returns for x, weight, lora_a, lora_b and bias, whatever autocast surrounds the call of backward."""
    device_type = "cpu" if dy.is_cpu else dy.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _gradients(ctx, dy, skips_ops)
    need_dx, _, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
    x, weight, lora_a, lora_b, s, seed = saved_tensors(ctx)
    needs = Needs(need_dx, need_da, need_db, need_dbias)
    reason = backward_reason()
    if reason is not None:
        count_fallback(reason)
        s = s if x is None else None  # S of x and A: a constant would hide that dB depends on them
    args = (dy, x, weight, lora_a, lora_b, s, ctx.scaling, ctx.dropout_p, seed, needs)
    if reason is not None:
        dx, da, db, dbias = in_rows(differentiable_gradients, *args)
    elif skips_ops:
        dx, da, db, dbias = _backward(*args, ctx.backend)
    else:
        computed = iter(_call(torch.ops.fastlora.lora_backward.default, *args, ctx.backend))
        dx, da, db, dbias = [next(computed) if need else None for need in needs]
    return dx, None, da, db, dbias, None, None, None, None


def _without_node(*args):
    """Y past LoRALinearFunction: without gradients, or in a graph, which trains through the op's own formula."""
    if _skips_ops(args[0]):
        return _forward(*args)[0]
    forward = torch.ops.fastlora.lora_forward.default
    return (forward(*args) if torch.compiler.is_compiling() else _call(forward, *args))[0]


class LoRALinearFunction(torch.autograd.Function):
    """One LoRA layer as one autograd node: one launch forward, one launch backward.

    ``apply(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)`` with checked arguments; use
    :func:`lora_linear`, which checks them. It saves x itself and S (M×R), and only where a gradient reads them; weights
    go by reference. It never computes a gradient of ``weight``. Where its backward is to be differentiated itself
    (``create_graph=True``), torch's own operators make the gradients, counted as a fallback.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend):
        args = (x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
        y, s = _forward(*args) if _skips_ops(x) else _call(torch.ops.fastlora.lora_forward.default, *args)
        _save(ctx, s, *args)
        return y

    @staticmethod
    def backward(ctx, dy):
        return _gradients(ctx, dy, _skips_ops(dy))


# What Function.apply comes to where no transform of torch.func is active; what it does before, in Python, takes longer
# than all checks here.
_apply = super(torch.autograd.Function, LoRALinearFunction).apply


def _setup(ctx, inputs, output):
    """What the node of ``torch.ops.fastlora.lora_forward`` keeps, which exported graphs train through."""
    if ctx.needs_input_grad[1]:
        raise ValueError(FROZEN_WEIGHT)
    y, s = output
    ctx.mark_non_differentiable(s)
    ctx.set_materialize_grads(False)
    _save(ctx, s, *inputs)


def _op_gradients(ctx, dy, _):
    return (None,) * 9 if dy is None else _gradients(ctx, dy, False)


for _name, _kernel, _fake in (
    ("lora_forward", _forward_op, _fake_forward),
    ("lora_backward", _backward_op, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)
torch.library.register_autograd("fastlora::lora_forward", _op_gradients, setup_context=_setup, lib=_library)
register_tools(_library)


def in_dtype(dtype, x, weight, lora_a, lora_b, bias):
    """A layer's operands in autocast's dtype; adapters in float32 stay."""
    lora_a, lora_b = (t if t.dtype == torch.float32 else t.to(dtype) for t in (lora_a, lora_b))
    return x.to(dtype), weight.to(dtype), lora_a, lora_b, None if bias is None else bias.to(dtype)


def lora_linear(
    x: Tensor,
    weight: Tensor | QuantisedWeight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
    copy_input: bool = False,
) -> Tensor:
    """A LoRA layer: ``x·weightᵀ + scaling·(dropout(x)·lora_aᵀ)·lora_bᵀ + bias``.

    Args:
        x: input [..., in_features]; float16, bfloat16, float32 or (in plain PyTorch) float64. A nested tensor of jagged
            layout is served where its last dimension is in_features.
        weight: frozen weight [out_features, in_features] of x's dtype; it must not require a gradient. Or what
            ``fastlora.quantised`` takes or returns; a library's own tensor is decoded to x's dtype.
        lora_a: [r, in_features]; x's dtype, or float32 over a 16-bit x.
        lora_b: [out_features, r]; likewise.
        scaling: factor of the low-rank branch (alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA).
        bias: [out_features] of x's dtype, or None; trainable if it requires a gradient.
        dropout_p: probability of dropping an element of x in front of the low-rank branch.
        training: whether dropout applies.
        backend: "cuda", "triton", "composed" or "reference" to insist on one; None for the best that serves the call.
        copy_input: save a copy of x for the backward, not x itself, so that x may be modified in place after the call.

    Returns:
        Tensor [..., out_features] of x's dtype. Under ``torch.autocast``, x, weight and bias are cast to its dtype,
        unless x is float64, which autocast leaves alone. Under a transform of ``torch.func``, in forward-mode AD and in
        ``torch.jit.trace``, torch's own operators make it, counted as a fallback.

    Raises:
        ValueError: shapes, devices or dropout_p do not fit, weight requires a gradient, or the backend insisted on
            cannot serve the call.
        TypeError: dtypes do not fit, scaling is no number, or x is a nested tensor of another layout.
        RuntimeError: in backward, where x was modified in place after the call and ``copy_input`` is not set.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.
    """
    if x.is_nested:
        options: dict[str, Any] = {
            "dropout_p": dropout_p,
            "training": training,
            "backend": backend,
            "copy_input": copy_input,
        }
        return on_jagged(lambda values: lora_linear(values, weight, lora_a, lora_b, scaling, bias, **options), x)
    base: Any = weight
    packed = type(base) is not torch.nn.Parameter and type(base) is not Tensor and is_packed(base)
    if packed:
        base = quantised(base, None if type(base) is QuantisedWeight else x.dtype)
    device_type = "cpu" if x.is_cpu else x.device.type
    given = x
    # torch refuses to say for "meta", where shapes alone are computed.
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, base, lora_a, lora_b, bias = in_dtype(dtype, x, base, lora_a, lora_b, bias)
    if type(scaling) is not float:
        scaling = as_number("scaling", scaling)
    trains = torch.is_grad_enabled()
    compiles = torch.compiler.is_compiling()
    reason = None if compiles else transform_reason()
    if packed:
        check_decoded_dtype(base, x.dtype)
    if reason != TRACE:  # where sizes are not numbers; torch's operators check them
        check_arguments(x, base, lora_a, lora_b, bias)
    if not 0.0 <= dropout_p <= 1.0:
        check_dropout(dropout_p)
    if trains and base.requires_grad:
        raise ValueError(frozen_weight_reason(base))
    if not training:
        dropout_p = 0.0
    if backend is None and not compiles:
        if reason is not None:
            seed = draw_seed(x.device) if dropout_p > 0.0 and reason == FORWARD_MODE else None
            dense = base.dequantize() if packed else base
            return composed(x, dense, lora_a, lora_b, scaling, bias, dropout_p, reason, seed)
        backend = environment_backend()
    elif reason == FORWARD_MODE and not _skips_ops(x):  # without gradients the tangents would be lost in silence
        raise ValueError(
            f"backend {backend!r} has no forward-mode derivative: leave backend out, and torch's own operators make it"
        )
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    if copy_input and trains and not compiles and x is given and lora_a.requires_grad:
        x = x.clone()
    if packed:
        return quantised_linear(x, base, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
    if compiles or not trains:
        return _without_node(x, base, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
    apply = _apply if reason is None else LoRALinearFunction.apply
    return apply(x, base, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
