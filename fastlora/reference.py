"""A LoRA layer in plain PyTorch: the ground truth of the tests and the path that CPU users get.

``Y = X·W0ᵀ + s·(drop(X)·Aᵀ)·Bᵀ + bias``, contracted from the left so that nothing larger than M×R is made besides Y:
2·M·R·(K + N) FLOPs on top of the frozen layer, where forming B·A would cost 2·N·K·R and an N×K temporary. The
backward is written out by hand and needs X and S = s·drop(X)·Aᵀ alone.

S and dS are made as Sᵀ and dSᵀ [R, M], of which the others are views: the matrix libraries of CPUs are slower with a
tall and narrow operand that is stored by rows.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.philox import inverse_keep, keep_mask

_ROWS_AT_A_TIME = 1024  # that are widened to float32 at once


class Needs(NamedTuple):
    """Which gradients to compute."""

    dx: bool
    da: bool
    db: bool
    dbias: bool


class Gradients(NamedTuple):
    """What a backward returns; None where it was not asked for."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None


def lora_forward(
    x: Tensor,  # [M, K]
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    bias: Tensor | None,  # [N]
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns Y [M, N] and S [M, R], both in x's dtype; ``scaling`` and 1/(1-p) go into S before it is rounded."""
    lora_a, lora_b = _cast(lora_a, x.dtype), _cast(lora_b, x.dtype)
    seen = x
    if dropout_p > 0.0:
        seen = x.masked_fill(_drop_mask(seed, dropout_p, x.shape[0], weight), 0.0)
        scaling *= inverse_keep(dropout_p)
    s_t = torch.addmm(x.new_empty(lora_a.shape[0], x.shape[0]), lora_a, seen.t(), beta=0, alpha=scaling)
    y = linear(x, weight, bias)
    s = s_t.t()
    y.addmm_(s, lora_b.t())
    return y, s


def lora_backward(
    dy: Tensor,  # [M, N]
    x: Tensor | None,  # [M, K], read for dA alone
    weight: Tensor,  # [N, K]
    lora_a: Tensor,  # [R, K]
    lora_b: Tensor,  # [N, R]
    s: Tensor | None,  # [M, R], read for dB alone
    scaling: float,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> Gradients:
    """Returns dX [M, K] and dbias [N] in x's dtype, dA [R, K] and dB [N, R] in their parameters'."""
    dx = da = db = dbias = drop = None
    if dropout_p > 0.0 and (needs.dx or needs.da):
        drop = _drop_mask(seed, dropout_p, dy.shape[0], weight)
        scaling *= inverse_keep(dropout_p)
    a, b_t = _cast(lora_a, dy.dtype), _cast(lora_b, dy.dtype).t()
    if needs.dx or needs.da:
        product_t = linear(b_t, dy)  # Bᵀ·dYᵀ [R, M]
    if needs.dx:
        dx = torch.mm(dy, weight)
        if drop is None:
            dx.addmm_(product_t.t(), a, alpha=scaling)
        else:
            side = torch.mm(product_t.t(), a)
            dx.add_(side.masked_fill_(drop, 0.0), alpha=scaling)
    if needs.da:
        dropped = x if drop is None else x.masked_fill(drop, 0.0)
        da = _gradient(product_t, dropped, scaling, lora_a)
    if needs.db:
        db = _gradient(s.t(), dy, 1.0, b_t if lora_b.dtype == dy.dtype else lora_b.t()).t()
    if needs.dbias:
        dbias = dy.sum(0)
    return Gradients(dx, da, db, dbias)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call that does nothing is not free


def _gradient(left: Tensor, right: Tensor, scale: float, parameter: Tensor) -> Tensor:
    """scale · left [R, M]·right [M, ·], of ``parameter``'s shape and dtype: a float32 parameter's gradient is added up
    in float32, a few rows of ``right`` at a time."""
    if parameter.dtype == left.dtype:
        return torch.mm(left, right) if scale == 1.0 else torch.addmm(parameter, left, right, beta=0, alpha=scale)
    total = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    pieces = zip(left.split(_ROWS_AT_A_TIME, dim=1), right.split(_ROWS_AT_A_TIME), strict=True)
    for some_left, some_right in pieces:
        total.addmm_(some_left.to(parameter.dtype), some_right.to(parameter.dtype), alpha=scale)
    return total


def _drop_mask(seed: Tensor, dropout_p: float, m: int, weight: Tensor) -> Tensor:
    """[M, K]: True where the side branch does not see an element of x."""
    return keep_mask(seed, dropout_p, m, weight.shape[1], weight.device).logical_not_()
