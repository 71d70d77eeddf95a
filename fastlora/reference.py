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
    if dropout_p > 0.0:
        dropped = x.masked_fill(_drop_mask(seed, dropout_p, x.shape[0], weight), 0.0)
        s = _scaled_product(lora_a, dropped.t(), scaling * inverse_keep(dropout_p)).t()
    else:
        s = _scaled_product(lora_a, x.t(), scaling).t()
    y = linear(x, weight, bias)
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
    if needs.dx or needs.da:
        ds_t = _scaled_product(_cast(lora_b, dy.dtype).t(), dy.t(), scaling)  # [R, M]
        if dropout_p > 0.0:
            drop = _drop_mask(seed, dropout_p, dy.shape[0], weight)
    if needs.dx:
        dx = torch.mm(dy, weight)
        if drop is None:
            dx.addmm_(ds_t.t(), _cast(lora_a, dy.dtype))
        else:
            side = torch.mm(ds_t.t(), _cast(lora_a, dy.dtype)).mul_(inverse_keep(dropout_p))
            dx += side.masked_fill_(drop, 0.0)
    if needs.da:
        dropped = x if drop is None else x.masked_fill(drop, 0.0)
        da = _gradient(ds_t, dropped, inverse_keep(dropout_p), lora_a.dtype)
    if needs.db:
        db = _gradient(s.t(), dy, 1.0, lora_b.dtype).t()
    if needs.dbias:
        dbias = dy.sum(0)
    return Gradients(dx, da, db, dbias)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)  # a call that does nothing is not free


def _scaled_product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left·right with one rounding (beta = 0 leaves the uninitialised output unread)."""
    if scale == 1.0:
        return torch.mm(left, right)
    return torch.addmm(left.new_empty(left.shape[0], right.shape[1]), left, right, beta=0, alpha=scale)


def _gradient(left: Tensor, right: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale · left [R, M]·right [M, ·] in ``dtype``: a float32 parameter's gradient is added up in float32, a few rows
    of ``right`` at a time."""
    if dtype == left.dtype:
        return _scaled_product(left, right, scale)
    total = left.new_zeros(left.shape[0], right.shape[1], dtype=dtype)
    pieces = zip(left.split(_ROWS_AT_A_TIME, dim=1), right.split(_ROWS_AT_A_TIME), strict=True)
    for some_left, some_right in pieces:
        total.addmm_(some_left.to(dtype), some_right.to(dtype), alpha=scale)
    return total


def _drop_mask(seed: Tensor, dropout_p: float, m: int, weight: Tensor) -> Tensor:
    """[M, K]: True where the side branch does not see an element of x."""
    return keep_mask(seed, dropout_p, m, weight.shape[1], weight.device).logical_not_()
