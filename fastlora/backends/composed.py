"""A layer composed of torch's own products, for GPUs: cuBLAS makes the base product and the thin ones, the branch is
added in place, and dropout costs one kernel each way.

Three products forward and five backward, with dropout too, and no pass over Y or dX but the addition of the branch.
With dropout the backward writes a masked X besides, as large as X, which dA reads and which is freed then. It is what a
call gets where one launch each way is not known to be faster. Without dropout it needs no Triton. What it saves is the
same as every backend's, x and S, and the mask has the same bits; it is as deterministic as torch's own products are.
"""

from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastlora.backends import reference
from fastlora.philox import inverse_keep
from fastlora.problem import BackwardOperands, ForwardOperands, Gradients, Launcher, LaunchSpec, split_scaling


def why_unsupported(spec: LaunchSpec) -> str | None:
    """Why a call cannot be composed, or None. With dropout, Triton must be usable."""
    if spec.base_format not in ("dense", "transposed") or spec.branch != "single":
        return f"no code for a {spec.base_format} base weight with a {spec.branch} branch"
    if spec.column_scale is not None:
        return reference.NO_COLUMN_SCALE
    return _masked().why_unsupported(spec) if spec.dropout else None


def _masked() -> ModuleType:
    """Imported for dropout alone, since Triton may be absent."""
    from fastlora.backends.triton import masked

    return masked


def prepare(spec: LaunchSpec) -> Launcher:
    """What serves every call of this description."""
    return partial(_forward if spec.direction == "forward" else _backward, spec)


def compile_all(calls: Iterable[tuple[Launcher, Any]], workers: int) -> int:
    """Compiles what calls with dropout would launch of Triton's, several kernels side by side, and loads it.

    Args:
        calls: of what ``prepare`` has returned with operands of its description on the "meta" device.
        workers: threads that compile.

    Returns:
        The number of kernels.
    """
    return _masked().compile_all([partial(launcher, operands) for launcher, operands in calls], workers)


def _forward(spec: LaunchSpec, operands: ForwardOperands) -> tuple[Tensor, Tensor]:
    """Y [M, N] and S [M, R]; see backends.reference."""
    x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed = operands
    scales = split_scaling(scaling, x.dtype)
    if spec.dropout:
        s = _masked().masked_shrink(x, lora_a, scales, dropout_p, seed, device=spec.device, tf32=spec.tf32)
    else:
        s = _shrink(x, lora_a.to(x.dtype), scales.in_s)
        if x.dtype == torch.float16 and scales.in_s != 1.0:
            # |in_s| < 1 must not hide an overflow that the layer of framework operations has.
            unscaled = _shrink(x, lora_a.to(x.dtype), 1.0)
            s = torch.where(unscaled.isinf(), unscaled * scales.in_s, s)
    y = linear(x, weight, bias)
    y.addmm_(s, lora_b.to(x.dtype).t(), alpha=scales.on_branch)
    return y, s


def _backward(spec: LaunchSpec, operands: BackwardOperands, into: Tensor | None = None) -> Gradients:
    """The gradients that the description needs; see backends.reference."""
    dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
    needs = spec.needs
    dx = da = db = dbias = None
    dropped, kept_scale = x, 1.0
    if needs.dx:
        dx = torch.mm(dy, weight) if into is None else into.addmm_(dy, weight)
    if needs.dx or needs.da:
        ds = _shrink(dy, lora_b.to(dy.dtype).t(), scaling)  # [M, R]
        if spec.dropout:
            kept_scale = inverse_keep(dropout_p)
            some_x = x if needs.da else None
            given = (some_x, dx, ds, lora_a, dropout_p, seed)
            dropped = _masked().mask_and_add(*given, device=spec.device, tf32=spec.tf32)
        elif dx is not None:
            dx.addmm_(ds, lora_a.to(dy.dtype))
    if needs.da:
        da = _row_sum(ds, dropped, kept_scale, lora_a)  # type: ignore[arg-type]  # x is there
    if needs.db:
        db = _row_sum(dy, s, split_scaling(scaling, dy.dtype).on_branch, lora_b)  # type: ignore[arg-type]  # so is s
    if needs.dbias:
        dbias = dy.sum(0)
    return Gradients(dx, da, db, dbias)


def _shrink(rows: Tensor, factor: Tensor, scale: float) -> Tensor:
    """scale · rows [M, ·]·factorᵀ [·, R] with one rounding (beta = 0 leaves the uninitialised output unread)."""
    return torch.addmm(rows.new_empty(rows.shape[0], factor.shape[0]), rows, factor.t(), beta=0, alpha=scale)


def _row_sum(left: Tensor, right: Tensor, scale: float, parameter: Tensor) -> Tensor:
    """scale · leftᵀ [·, M]·right [M, ·], of ``parameter``'s shape and dtype: a float32 parameter's gradient is added up
    in float32."""
    if parameter.dtype != left.dtype and left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):  # since torch 2.8
        total = torch.mm(left.t(), right, out_dtype=parameter.dtype)
        return total if scale == 1.0 else total.mul_(scale)
    return reference.gradient(left.t(), right, scale, parameter)
