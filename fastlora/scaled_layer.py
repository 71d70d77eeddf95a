"""A DoRA layer in one launch each way, as one autograd node.

The forward's epilogue scales Y's columns and, where the magnitude trains, stores Z = X·W0ᵀ + s·X·Aᵀ·Bᵀ as well: M·N
elements that are written once and kept. dm[n] = Σ_m dY∘Z / norm reads them. Nothing cheaper is exact: Z out of Y, as
(Y - bias) / g, fails where g is 0 or small against the bias; Σ_m dY∘Z without Z takes dYᵀ·X, which is as large as W0
and as dear as dX, and Z made anew is no cheaper. The backward's first tiles read dY and Z once: they store g∘dY,
rounded once, in scratch of M·N elements that the launch's products read, and sum dm and dbias, in one order always.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora import counts, dispatch, one_launch
from fastlora.checks import as_number, check_arguments, frozen_weight_reason
from fastlora.column_scale import Kept, bias_gradient, magnitude_gradient, scaled, scaled_in_one_pass, without_autocast
from fastlora.differentiable import backward_reason
from fastlora.differentiable import gradients as differentiable_gradients
from fastlora.ops import in_dtype
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients, Needs, ScaledBackward, ScaledForward
from fastlora.rows import flat
from fastlora.saved_tensors import saved_tensors


def scaled_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    magnitude: Tensor,
    norm: Tensor,
    bias: Tensor | None,
    norms: Kept | None,
    backend: str | None,
    copy_input: bool,
) -> Tensor | None:
    """``magnitude/norm∘(x·weightᵀ + scaling·x·lora_aᵀ·lora_bᵀ) + bias`` [..., N] by one launch; None where none serves
    the call, which is counted (``one_launch.scaled_forward``).

    Args:
        norm: [N], a constant; norms: what keeps it, and forgets it where A or B trains.
        the others: as for ``fastlora.dora.dora_linear``.

    Raises:
        ValueError, TypeError: as ``fastlora.lora_linear``.
    """
    given, device_type = x, x.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight, lora_a, lora_b, bias = in_dtype(dtype, x, weight, lora_a, lora_b, bias)
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    scaling = as_number("scaling", scaling)
    check_arguments(x, weight, lora_a, lora_b, bias)
    if magnitude.device != x.device:
        raise ValueError(f"x is on {x.device} but magnitude is on {magnitude.device}; move them to one device")
    trains = torch.is_grad_enabled()
    if trains and weight.requires_grad:
        raise ValueError(frozen_weight_reason(weight))
    keeps_unscaled = trains and magnitude.requires_grad
    trained = (lora_a, lora_b, magnitude)
    if copy_input and trains and x is given and any(t.requires_grad for t in trained):
        x = x.clone()
    with torch.no_grad():
        layer = ForwardOperands(flat(x), weight, lora_a, lora_b, bias, scaling, 0.0, None)
        launch = one_launch.scaled_forward(ScaledForward(layer, magnitude, norm, keeps_unscaled), backend)
    if launch is None:
        return None
    if not trains:
        return _as_given(launch()[0], x)
    tensors = (x, lora_a, lora_b, bias, magnitude, weight, norm)
    return _ScaledLoRAFunction.apply(*tensors, scaling, launch, norms, backend)


def _as_given(rows: Tensor, like: Tensor) -> Tensor:
    """[M, N] as [..., N]. A tracked view could not be modified in place by what follows the layer."""
    return torch.ops.aten._unsafe_view.default(rows, [*like.shape[:-1], rows.shape[1]])


class _ScaledLoRAFunction(torch.autograd.Function):
    """Saves x, S and Z, each where a gradient reads it: x for dA, and for what a gradient of dB or dm would need."""

    @staticmethod
    def forward(ctx: Any, x, lora_a, lora_b, bias, magnitude, weight, norm, scaling, launch, norms, backend):
        y, s, unscaled = launch()
        _, need_a, need_b, _, need_m, *_ = ctx.needs_input_grad
        kept_x = x if need_a or need_b or need_m else None
        ctx.save_for_backward(kept_x, weight, lora_a, lora_b, s if need_b else None, magnitude, norm, unscaled)
        ctx.scaling, ctx.norms, ctx.backend = scaling, norms, backend
        return _as_given(y, x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        saved: Any = saved_tensors(ctx)
        x, weight, lora_a, lora_b, s, magnitude, norm, unscaled = saved
        if ctx.norms is not None and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2]):
            ctx.norms.forget_branch()
        needs = Needs(*ctx.needs_input_grad[:4])
        rows = None if x is None else flat(x)
        layer = BackwardOperands(flat(dy), rows, weight, lora_a, lora_b, s, ctx.scaling, 0.0, None)
        operands = ScaledBackward(layer, magnitude, norm, unscaled)
        with without_autocast(dy):
            (dx, da, db, dbias), dm = _gradients(operands, needs, ctx.backend)
        dx = None if dx is None else dx.view(*dy.shape[:-1], weight.shape[1])
        return dx, da, db, dbias, dm, *(None,) * 6


def _gradients(operands: ScaledBackward, needs: Needs, backend: str | None) -> tuple[Gradients, Tensor | None]:
    """By one launch; where they are to be differentiated, by torch's operators; and where no launch scales dY, by one
    without a scale behind a pass that does."""
    reason = backward_reason()
    if reason is not None:
        counts.count_fallback(reason)
        return _differentiable(operands, needs)
    launch = one_launch.scaled_backward(operands, needs, backend)
    if launch is not None:
        return launch()
    layer, magnitude, norm, unscaled = operands
    dy, through = layer.dy, needs._replace(dbias=False)
    layer = layer._replace(dy=scaled_in_one_pass(dy, magnitude / norm))
    gradients = dispatch.backward(layer, through, backend) if any(through) else Gradients(None, None, None, None)
    dm = None if unscaled is None else magnitude_gradient(dy, unscaled, magnitude, norm)
    return gradients._replace(dbias=bias_gradient(dy, dy.dtype) if needs.dbias else None), dm


def _differentiable(operands: ScaledBackward, needs: Needs) -> tuple[Gradients, Tensor | None]:
    """Z is a function of x, A and B, and so it and S are made anew."""
    layer, magnitude, norm, unscaled = operands
    dy, x = layer.dy, layer.x
    scaled_layer = layer._replace(dy=scaled(dy, magnitude / norm), s=None)
    gradients = differentiable_gradients(*scaled_layer, needs._replace(dbias=False))
    dm = None
    if unscaled is not None and x is not None:
        a, b = layer.lora_a.to(dy.dtype), layer.lora_b.to(dy.dtype)
        unscaled = x @ layer.weight.t() + layer.scaling * ((x @ a.t()) @ b.t())
        dm = magnitude_gradient(dy, unscaled, magnitude, norm)
    return gradients._replace(dbias=bias_gradient(dy, dy.dtype) if needs.dbias else None), dm
