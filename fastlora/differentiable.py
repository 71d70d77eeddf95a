"""The layer and its gradients made of torch's own operators, which can be differentiated again.

For callers whose tensors a kernel cannot read (``torch.func``, dual numbers, DTensors, a trace) and for gradients of
gradients. The dropout mask is regenerated from the seed, so that it is the one that the fused layer applied.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from fastlora.counts import count_fallback
from fastlora.philox import drop_mask, inverse_keep
from fastlora.problem import Gradients, Needs, split_scaling

FORWARD_MODE, TRACE = "forward-mode AD", "torch.jit.trace"

_transforms_active = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state


def transform_reason() -> str | None:
    """What goes on around a call that only torch's own operators can take part in, or None."""
    if _transforms_active():
        return "torch.func transform"
    if forward_ad._current_level >= 0:
        return FORWARD_MODE
    return TRACE if _tracing_state() is not None else None


def backward_reason() -> str | None:
    """Why a backward has to be made of differentiable operators, or None."""
    if torch.compiler.is_compiling():
        return None
    return "create_graph=True" if torch.is_grad_enabled() else transform_reason()


def composed(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None,
    dropout_p: float,
    reason: str,
    seed: Tensor | None = None,
) -> Tensor:
    """The layer by torch's own operators; counted as a fallback.

    Args:
        x: [..., K]; the other operands as for ``fastlora.lora_linear``.
        reason: what it is counted under.
        seed: of the fused layer's mask; without one, torch draws a mask (as ``vmap`` and DTensors need).
    """
    count_fallback(reason)
    if seed is None:
        seen = F.dropout(x, dropout_p)
    else:
        drop = drop_mask(seed, dropout_p, x.shape[:-1].numel(), x.shape[-1], x.device)
        seen = dropped(x, drop.view(x.shape), dropout_p)
    shrunk = F.linear(seen, lora_a.to(x.dtype))
    return F.linear(x, weight, bias) + scaling * F.linear(shrunk, lora_b.to(x.dtype))


def gradients(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    s: Tensor | None,  # [M, R], what dB is made of; without it, dB is made of x
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> Gradients:
    """dX [M, K] and dbias [N] in dY's dtype, dA [R, K] and dB [N, R] in their parameters', as functions of every
    operand that they depend on. In the order of the composed layer's own backward, so that they overflow where it does.
    """
    dx = da = db = dbias = drop = seen = None
    # Autocast is whatever surrounds the call of backward; the operands have their dtypes already.
    with torch.autocast(dy.device.type, enabled=False):
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        scaled = dy * scaling
        if dropout_p > 0.0:
            drop = drop_mask(seed, dropout_p, dy.shape[0], weight.shape[1], dy.device)  # type: ignore[arg-type]
        if x is not None:
            seen = dropped(x, drop, dropout_p)
        if needs.dx or needs.da:
            ds = scaled @ b
        if needs.dx:
            dx = dy @ weight + dropped(ds @ a, drop, dropout_p)
        if needs.da:
            da = _product(ds, seen, lora_a.dtype)  # type: ignore[arg-type]  # x is there
        if needs.db and s is not None:
            db = _product(dy * split_scaling(scaling, dy.dtype).on_branch, s, lora_b.dtype)
        elif needs.db:
            db = _product(scaled, seen @ a.t(), lora_b.dtype)  # type: ignore[operator]  # x is there
        if needs.dbias:
            dbias = dy.sum(0)
    return Gradients(dx, da, db, dbias)


def linked(s: Tensor, x: Tensor, lora_a: Tensor, scaling: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    """S [M, R] as computed, and as a function of x [..., K] besides, whose elements are not kept for that.

    Where A is frozen no gradient reads x; dB is a function of it all the same, and a second derivative goes that way.
    """
    with torch.enable_grad():
        return _Shrunk.apply(x, lora_a, s, scaling, dropout_p, seed)


class _Shrunk(torch.autograd.Function):
    """S as a function of x, with A constant."""

    @staticmethod
    def forward(ctx, x, lora_a, s, scaling, dropout_p, seed):
        ctx.save_for_backward(lora_a, seed)
        ctx.x_shape, ctx.factor, ctx.dropout_p = x.shape, split_scaling(scaling, x.dtype).in_s, dropout_p
        return s.detach()

    @staticmethod
    def backward(ctx, ds):
        lora_a, seed = ctx.saved_tensors
        with torch.autocast(ds.device.type, enabled=False):
            dx = (ds * ctx.factor) @ lora_a.to(ds.dtype)
            drop = None if seed is None else drop_mask(seed, ctx.dropout_p, dx.shape[0], dx.shape[1], dx.device)
            return dropped(dx, drop, ctx.dropout_p).view(ctx.x_shape), None, None, None, None, None


def _product(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """leftᵀ [·, M]·right [M, ·], added up in a parameter's dtype."""
    return left.to(dtype).t() @ right.to(dtype)


def dropped(rows: Tensor, drop: Tensor | None, dropout_p: float) -> Tensor:
    return rows if drop is None else rows.masked_fill(drop, 0.0) * inverse_keep(dropout_p)
