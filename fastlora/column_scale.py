"""The columns of Y scaled by a magnitude over a norm, by torch's own operators: behind a launch that has no scale."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

_ROWS_AT_A_TIME = 256  # of dY∘Z that are summed at once


class Kept(Protocol):
    """What is kept of a layer's norms between calls."""

    def forget_branch(self) -> None:
        """A and B are about to change, perhaps unseen."""


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Whatever autocast surrounds it."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def scaled(y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """y∘scale + bias of y [..., N], rounded once to y's dtype."""
    wide = y * scale
    return (wide if bias is None else wide + bias).to(y.dtype)


def scaled_in_one_pass(y: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """Likewise, without a wider copy on a GPU; not differentiable."""
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return torch.mul(y, scale, out=out) if bias is None else torch.addcmul(bias, y, scale, out=out)


def magnitude_gradient(dy: Tensor, unscaled: Tensor, magnitude: Tensor, norm: Tensor) -> Tensor:
    """Σ dY∘Z / norm [N] of [..., N], in the magnitude's dtype; differentiable where gradients are recorded."""
    products = _differentiable_sum(dy, unscaled) if torch.is_grad_enabled() else _column_sum(dy, unscaled, norm.dtype)
    return (products / norm).to(magnitude.dtype)


def bias_gradient(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ dY [N] of [..., N]."""
    return dy.flatten(0, -2).sum(0).to(dtype) if dy.dim() > 1 else dy.to(dtype)


def _differentiable_sum(dy: Tensor, y: Tensor) -> Tensor:
    dtype = torch.promote_types(dy.dtype, torch.float32)
    return (dy.to(dtype) * y.to(dtype)).sum(tuple(range(dy.dim() - 1)))


def _column_sum(dy: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """A few rows at a time."""
    n = y.shape[-1]
    dy, y = dy.reshape(-1, n) if n else dy.new_empty(0, 0), y.reshape(-1, n) if n else y.new_empty(0, 0)
    total = torch.zeros(n, dtype=dtype, device=dy.device)
    for some, others in zip(dy.split(_ROWS_AT_A_TIME), y.split(_ROWS_AT_A_TIME), strict=True):
        total += (some.to(dtype) * others).sum(0)
    return total


class ScaledColumns(torch.autograd.Function):
    """``y∘(m / norm) + bias`` of y [..., N]: what its backward reads of y is kept where m trains."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, magnitude: Tensor, norm: Tensor, bias: Tensor | None, norms: Kept | None):
        ctx.save_for_backward(y if ctx.needs_input_grad[1] else None, magnitude, norm)
        ctx.norms, ctx.bias_dtype = norms, None if bias is None else bias.dtype
        return scaled_in_one_pass(y, magnitude / norm, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        y, magnitude, norm = ctx.saved_tensors
        need_y, need_m, _, need_bias, _ = ctx.needs_input_grad
        if ctx.norms is not None:
            ctx.norms.forget_branch()
        in_y = dm = dbias = None
        with without_autocast(dy):
            if need_y:
                scale = scaled if torch.is_grad_enabled() else scaled_in_one_pass
                in_y = scale(dy, magnitude / norm)
            if need_m:
                dm = magnitude_gradient(dy, y, magnitude, norm)
            if need_bias:
                dbias = bias_gradient(dy, ctx.bias_dtype)
        return in_y, dm, None, dbias, None
