"""The differentiable LoRA layer: torch.library ops, the autograd.Function over them, and ``lora_linear``."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastlora import dispatch
from fastlora.checks import check_arguments, check_dropout
from fastlora.dispatch import count_fallback, environment_backend
from fastlora.philox import draw_seed
from fastlora.problem import BackwardOperands, ForwardOperands, Needs

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


def _lora_forward_op(*args):
    *operands, backend = args
    y, s = dispatch.forward(ForwardOperands(*operands), backend or environment_backend())
    return y, s.contiguous()  # as its fake says; the reference's may be a transposed view, as its dB is


def _lora_backward_op(*args):
    *operands, needs, backend = args
    gradients = dispatch.backward(BackwardOperands(*operands), Needs(*needs), backend or environment_backend())
    return [gradient.contiguous() for gradient in gradients if gradient is not None]


def _fake_forward(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], lora_a.shape[0])


def _fake_backward(dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed, needs, backend):
    shapes = ((dy.shape[0], weight.shape[1]), lora_a.shape, lora_b.shape, (weight.shape[0],))
    dtypes = (dy.dtype, lora_a.dtype, lora_b.dtype, dy.dtype)
    return [dy.new_empty(z, dtype=t) for z, t, need in zip(shapes, dtypes, needs, strict=True) if need]


for _name, _kernel, _fake in (
    ("lora_forward", _lora_forward_op, _fake_forward),
    ("lora_backward", _lora_backward_op, _fake_backward),
):
    _library.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{_name}", _fake, lib=_library)


def _skips_ops(tensor: Tensor) -> bool:
    """Whether to call a backend directly. On the CPU it is made of ATen calls, which whoever traces sees as well; an op
    around them would cost as much as a small layer's whole forward."""
    return tensor.is_cpu and not torch.compiler.is_compiling()


class LoRALinearFunction(torch.autograd.Function):
    """One LoRA layer as one autograd node: one launch forward, one launch backward.

    ``apply(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)`` with checked arguments; use
    :func:`lora_linear`, which checks them. It saves x itself and S (M×R), and only where a gradient reads them; weights
    go by reference. It never computes a gradient of ``weight`` and cannot be differentiated twice.
    """

    @staticmethod
    def forward(ctx, x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend):
        is_flat = x.dim() == 2
        rows = x if is_flat else x.reshape(-1, x.shape[-1])
        operands = ForwardOperands(rows, weight, lora_a, lora_b, bias, scaling, dropout_p, seed)
        if _skips_ops(x):
            y, s = dispatch.forward(operands, backend)
        else:
            y, s = torch.ops.fastlora.lora_forward.default(*operands, backend)
        _, _, need_da, need_db, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_da else None, weight, lora_a, lora_b, s if need_db else None, seed)
        ctx.scaling, ctx.dropout_p, ctx.backend = scaling, dropout_p, backend
        ctx.x_shape = None if is_flat else x.shape
        if is_flat:
            return y
        # A tracked view made in here could not be modified in place by what follows the layer.
        return torch.ops.aten._unsafe_view.default(y, [*x.shape[:-1], weight.shape[0]])

    @staticmethod
    def backward(ctx, dy):
        # Only create_graph=True runs a backward with gradients on, and has to be told that it ends here.
        return _backward_once(ctx, dy) if torch.is_grad_enabled() else _backward(ctx, dy)


def _backward(ctx, dy):
    need_dx, _, need_da, need_db, need_dbias, *_ = ctx.needs_input_grad
    x, weight, lora_a, lora_b, s, seed = ctx.saved_tensors
    x_shape = ctx.x_shape
    if x_shape is not None:
        x = None if x is None else x.reshape(-1, x_shape[-1])
        dy = dy.reshape(-1, dy.shape[-1])
    needs = Needs(need_dx, need_da, need_db, need_dbias)
    operands = BackwardOperands(dy, x, weight, lora_a, lora_b, s, ctx.scaling, ctx.dropout_p, seed)
    if _skips_ops(dy):
        dx, da, db, dbias = dispatch.backward(operands, needs, ctx.backend)
    else:
        computed = iter(torch.ops.fastlora.lora_backward.default(*operands, needs, ctx.backend))
        dx, da, db, dbias = [next(computed) if need else None for need in needs]
    if x_shape is not None and dx is not None:
        dx = dx.view(x_shape)
    return dx, None, da, db, dbias, None, None, None, None


_backward_once = once_differentiable(_backward)


def composed(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    reason: str,
) -> Tensor:
    """The layer by torch's own operators, for tensors that only these understand; counted as a fallback."""
    count_fallback(reason)
    shrunk = F.linear(F.dropout(x, dropout_p), lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(shrunk, lora_b.to(x.dtype))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    training: bool = True,
    backend: str | None = None,
) -> Tensor:
    """A LoRA layer: ``x·weightᵀ + scaling·(dropout(x)·lora_aᵀ)·lora_bᵀ + bias``.

    Args:
        x: input [..., in_features]; float16, bfloat16, float32 or (on the reference backend) float64.
        weight: frozen weight [out_features, in_features] of x's dtype; it must not require a gradient.
        lora_a: [r, in_features]; x's dtype, or float32 over a 16-bit x.
        lora_b: [out_features, r]; likewise.
        scaling: factor of the low-rank branch (alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA).
        bias: [out_features] of x's dtype, or None; trainable if it requires a gradient.
        dropout_p: probability of dropping an element of x in front of the low-rank branch.
        training: whether dropout applies.
        backend: "cuda", "triton" or "reference" to insist on one; None for the best that serves the call.

    Returns:
        Tensor [..., out_features] of x's dtype. Under ``torch.autocast``, x, weight and bias are cast to its dtype.
        Under a transform of ``torch.func``, torch's own operators make it, counted as a fallback.

    Raises:
        ValueError: shapes, devices or dropout_p do not fit, weight requires a gradient, or the backend insisted on
            cannot serve the call.
        TypeError: dtypes do not fit.

    Source:
        Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, equation 3.
    """
    device_type = "cpu" if x.is_cpu else x.device.type
    # torch refuses to say for "meta", where shapes alone are computed.
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        lora_a, lora_b = (t if t.dtype == torch.float32 else t.to(dtype) for t in (lora_a, lora_b))
    check_arguments(x, weight, lora_a, lora_b, bias)
    check_dropout(dropout_p)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient, which a LoRA layer never computes: weight.requires_grad_(False)")
    if not training:
        dropout_p = 0.0
    if backend is None and not torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return composed(x, weight, lora_a, lora_b, scaling, bias, dropout_p, "torch.func transform")
        backend = environment_backend()
    seed = draw_seed(x.device) if dropout_p > 0.0 else None
    return LoRALinearFunction.apply(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed, backend)
