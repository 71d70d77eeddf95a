"""A LoRA layer in plain PyTorch: the ground truth of the tests and the path that CPU users get.

``Y = X·W0ᵀ + s·(drop(X)·Aᵀ)·Bᵀ + bias``, contracted from the left so that nothing larger than M×R is made besides Y:
2·M·R·(K + N) FLOPs on top of the frozen layer, where forming B·A would cost 2·N·K·R and an N×K temporary. The
backward is written out by hand and needs X and S = s·drop(X)·Aᵀ alone.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.philox import drop_mask, inverse_keep
from fastlora.problem import Gradients, Launcher, LaunchSpec, Needs, split_scaling

_ROWS_AT_A_TIME = 1024  # that are widened to float32 at once
# CPUs make a narrow S [M, R] of many rows up to twice as fast as Sᵀ; any other by rows, up to a third faster.
_RANK_BY_ROWS, _FEW_ROWS = 16, 16
NO_COLUMN_SCALE = "no code scales the columns of Y"
_UNREAD = {
    dtype: torch.zeros((), dtype=dtype, device="cpu")
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why the reference cannot serve a call, or None."""
    if spec.base_format not in ("dense", "transposed") or spec.branch != "single":
        return f"no code for a {spec.base_format} base weight with a {spec.branch} branch"
    return NO_COLUMN_SCALE if spec.column_scale is not None else None


def prepare(spec: LaunchSpec) -> Launcher:
    """What serves every call of this description."""
    needs = spec.needs
    if spec.direction == "forward":
        return lambda operands: lora_forward(*operands)
    return lambda operands, into=None: lora_backward(*operands, needs, into)  # type: ignore[call-arg]  # nine fields


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
    """Returns Y [M, N] and S [M, R], both in x's dtype. What ``split_scaling`` gives S of the scaling, and 1/(1-p), go
    into S before it is rounded."""
    dtype = x.dtype
    if lora_a.dtype != dtype or lora_b.dtype != dtype:  # a call that does nothing is not free
        lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    dropped, kept_scale = x, 1.0
    if dropout_p > 0.0:
        dropped = x.masked_fill(drop_mask(seed, dropout_p, x.shape[0], x.shape[1], x.device), 0.0)  # type: ignore[arg-type]
        kept_scale = inverse_keep(dropout_p)
    s, on_branch = shrink(dropped, lora_a.t(), scaling, kept_scale)
    y = linear(x, weight, bias)
    y.addmm_(s, lora_b.t(), alpha=on_branch)
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
    into: Tensor | None = None,  # [M, K]
) -> Gradients:
    """Returns dX [M, K] and dbias [N] in x's dtype, dA [R, K] and dB [N, R] in their parameters'. ``s`` is the
    forward's, and dS takes the scaling before it is rounded. ``into`` is a dX of other projections of the same x, which
    this one is added to in place."""
    need_dx, need_da, need_db, need_dbias = needs
    dx = da = db = dbias = drop = None
    kept_scale = 1.0
    if dropout_p > 0.0 and (need_dx or need_da):
        drop = drop_mask(seed, dropout_p, dy.shape[0], weight.shape[1], dy.device)  # type: ignore[arg-type]
        kept_scale = inverse_keep(dropout_p)
    dtype = dy.dtype
    a = lora_a if lora_a.dtype == dtype else lora_a.to(dtype)
    if need_dx or need_da:
        ds = shrink_once(dy, lora_b if lora_b.dtype == dtype else lora_b.to(dtype), scaling)  # [M, R]
    if need_dx:
        dx = torch.mm(dy, weight) if into is None else into.addmm_(dy, weight)
        if drop is None:
            dx.addmm_(ds, a)
        else:
            side = torch.mm(ds, a)
            dx.add_(side.masked_fill_(drop, 0.0), alpha=kept_scale)
    if need_da:
        dropped = x if drop is None else x.masked_fill(drop, 0.0)  # type: ignore[union-attr]
        da = gradient(ds.t(), dropped, kept_scale, lora_a)  # type: ignore[arg-type]
    if need_db:
        on_branch = split_scaling(scaling, dtype).on_branch if dtype == torch.float16 else 1.0
        if dy.shape[0] <= _FEW_ROWS and lora_b.dtype == dtype:  # what is called takes longer than what is computed
            db = torch.addmm(lora_b, dy.t(), s, beta=0, alpha=on_branch)  # type: ignore[arg-type]
        else:
            db = gradient(s.t(), dy, on_branch, lora_b.t()).t()  # type: ignore[union-attr]
    if need_dbias:
        dbias = dy.sum(0)
    return Gradients(dx, da, db, dbias)


def shrink(dropped: Tensor, down: Tensor, scaling: float, kept_scale: float) -> tuple[Tensor, float]:
    """S of dropped rows [M, K] and Aᵀ [K, R], and what is left of the scaling to the branch (see split_scaling)."""
    dtype = dropped.dtype
    in_s, on_branch = split_scaling(scaling, dtype) if dtype == torch.float16 else (scaling, 1.0)
    s = shrink_once(dropped, down, in_s * kept_scale)
    if dtype == torch.float16 and in_s != 1.0:
        # |in_s| < 1 must not hide an overflow that the composed layer has.
        unscaled = shrink_once(dropped, down, kept_scale)
        s = torch.where(unscaled.isinf(), unscaled * in_s, s)
    return s, on_branch


def shrink_once(rows: Tensor, down: Tensor, scale: float = 1.0) -> Tensor:
    """scale · rows [M, ·]·down [·, R] with one rounding (beta = 0 leaves the sum's first operand unread)."""
    m, r = rows.shape[0], down.shape[1]
    if r < _RANK_BY_ROWS and m > _FEW_ROWS:
        if scale == 1.0:
            return linear(down.t(), rows).t()
        return torch.addmm(rows.new_empty(r, m), down.t(), rows.t(), beta=0, alpha=scale).t()
    if scale == 1.0:
        return torch.mm(rows, down)
    unread = _UNREAD[rows.dtype] if rows.is_cpu else rows.new_empty(m, r)
    return torch.addmm(unread, rows, down, beta=0, alpha=scale)


def gradient(left: Tensor, right: Tensor, scale: float, parameter: Tensor) -> Tensor:
    """scale · left [R, M]·right [M, ·], of ``parameter``'s shape and dtype: a float32 parameter's gradient is added up
    in float32, a few rows of ``right`` at a time."""
    if parameter.dtype == left.dtype:
        return torch.mm(left, right) if scale == 1.0 else torch.addmm(parameter, left, right, beta=0, alpha=scale)
    total = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
    pieces = zip(left.split(_ROWS_AT_A_TIME, dim=1), right.split(_ROWS_AT_A_TIME), strict=True)
    for some_left, some_right in pieces:
        total.addmm_(some_left.to(parameter.dtype), some_right.to(parameter.dtype), alpha=scale)
    return total
