"""Operands in the form that kernels take, and the LaunchSpec that describes them.

Empty inputs, strides and alignment are settled here, once for every backend: a matrix has unit inner strides and rows
that do not overlap, a vector and the saved S are contiguous and start on 16 bytes. What already has that form is passed
on as it is. So is a weight that lies as [K, N], whose copy at every call would cost more than the branch: its spec says
"transposed", and a backend that has no code for that refuses it.

A description takes longer than a launch. So a call is known by a key first: all that its description is made of, read
once and not looked into.
"""

from typing import Any

import torch
from torch import Tensor

from fastlora.problem import (
    Aligned,
    BackwardOperands,
    ForwardOperands,
    LaunchSpec,
    Needs,
    Sizes,
    Strides,
    scales_branch,
)

_ALIGNMENT = 16  # bytes: TMA and 128-bit loads


def describe_forward(operands: ForwardOperands) -> tuple[ForwardOperands, LaunchSpec]:
    """The operands of a forward as kernels take them, and the call's description."""
    x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed = operands
    x, lora_a, lora_b = as_rows(x), as_rows(lora_a), as_rows(lora_b)
    weight, stored = as_stored(weight)
    bias = None if bias is None else as_vector(bias)
    spec = LaunchSpec(
        "forward",
        Sizes(x.shape[0], weight.shape[0], weight.shape[1], lora_a.shape[0]),
        x.dtype,
        (lora_a.dtype, lora_b.dtype),
        x.device,
        base_format="dense" if stored is weight else "transposed",
        dropout=dropout_p > 0.0,
        bias=bias is not None,
        tf32=uses_tf32(x.dtype),
        scales_branch=scales_branch(scaling, x.dtype),
        **layout_of((x, stored, lora_a, lora_b, None)),
    )
    return ForwardOperands(x, weight, lora_a, lora_b, bias, scaling, dropout_p, seed), spec


def describe_backward(operands: BackwardOperands, needs: Needs) -> tuple[BackwardOperands, LaunchSpec]:
    """The operands of a backward as kernels take them, and the call's description."""
    dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed = operands
    dy, lora_a, lora_b = as_rows(dy), as_rows(lora_a), as_rows(lora_b)
    weight, stored = as_stored(weight)
    x = as_rows(x) if needs.da and x is not None else None
    # Hooks on saved tensors (offloading, compression) may give S back with other strides, or within something else.
    s = as_vector(s) if needs.db and s is not None else None
    spec = LaunchSpec(
        "backward",
        Sizes(dy.shape[0], weight.shape[0], weight.shape[1], lora_a.shape[0]),
        dy.dtype,
        (lora_a.dtype, lora_b.dtype),
        dy.device,
        base_format="dense" if stored is weight else "transposed",
        dropout=dropout_p > 0.0,
        needs=needs,
        tf32=uses_tf32(dy.dtype),
        scales_branch=scales_branch(scaling, dy.dtype),
        **layout_of((dy, stored, lora_a, lora_b, x)),
    )
    return BackwardOperands(dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, seed), spec


def forward_key(operands: ForwardOperands) -> tuple:
    """What ``describe_forward`` reads of operands: calls of one key have one description, and are in one form."""
    x, weight, lora_a, lora_b, bias, scaling, dropout_p, _ = operands
    dtype = x.dtype
    return (
        dtype, x.device, dropout_p > 0.0,
        x.shape, x.stride(), x.data_ptr() % _ALIGNMENT,
        weight.shape, weight.stride(), weight.data_ptr() % _ALIGNMENT,
        lora_a.dtype, lora_a.shape, lora_a.stride(), lora_a.data_ptr() % _ALIGNMENT,
        lora_b.dtype, lora_b.stride(), lora_b.data_ptr() % _ALIGNMENT,
        bias is None or (bias.stride(), bias.data_ptr() % _ALIGNMENT),
        dtype == torch.float16 and scales_branch(scaling, dtype),
        dtype == torch.float32 and uses_tf32(dtype),
    )  # fmt: skip


def backward_key(operands: BackwardOperands, needs: Needs) -> tuple:
    """Likewise of ``describe_backward``."""
    dy, x, weight, lora_a, lora_b, s, scaling, dropout_p, _ = operands
    dtype = dy.dtype
    return (
        dtype, dy.device, dropout_p > 0.0, needs,
        dy.shape, dy.stride(), dy.data_ptr() % _ALIGNMENT,
        weight.shape, weight.stride(), weight.data_ptr() % _ALIGNMENT,
        lora_a.dtype, lora_a.shape, lora_a.stride(), lora_a.data_ptr() % _ALIGNMENT,
        lora_b.dtype, lora_b.stride(), lora_b.data_ptr() % _ALIGNMENT,
        x is None or (x.stride(), x.data_ptr() % _ALIGNMENT),
        s is None or (s.stride(), s.data_ptr() % _ALIGNMENT),
        dtype == torch.float16 and scales_branch(scaling, dtype),
        dtype == torch.float32 and uses_tf32(dtype),
    )  # fmt: skip


def layout_of(matrices: tuple[Tensor | None, ...]) -> dict[str, Any]:
    """The fields of a LaunchSpec that say how matrices lie in memory; they are named as in Strides."""
    return {
        "aligned": Aligned(*(matrix is None or is_aligned(matrix) for matrix in matrices)),
        "starts": Aligned(*(matrix is None or matrix.data_ptr() % _ALIGNMENT == 0 for matrix in matrices)),
        "strides": Strides(*(0 if matrix is None else matrix.stride(0) for matrix in matrices)),
    }


def as_rows(matrix: Tensor) -> Tensor:
    """A 2-D tensor with unit inner strides and rows that do not overlap (an expanded gradient's do), without a copy
    where it has them."""
    rows, columns = matrix.shape
    if matrix.stride(1) == 1 and (rows <= 1 or matrix.stride(0) >= columns):
        return matrix
    return matrix.contiguous()


def as_stored(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight [N, K] as it is passed on, and as the matrix that lies in memory: itself, or [K, N] where it is the
    transposed view of that."""
    n, k = weight.shape
    if weight.stride(0) == 1 and weight.stride(1) >= n and n > 1 and k > 0:
        return weight, weight.t()
    weight = as_rows(weight)
    return weight, weight


def as_vector(vector: Tensor) -> Tensor:
    """A contiguous tensor that starts on 16 bytes."""
    vector = vector.contiguous()
    return vector if vector.data_ptr() % _ALIGNMENT == 0 else vector.clone()


def is_aligned(matrix: Tensor) -> bool:
    """Whether a matrix starts on 16 bytes and so does each of its rows."""
    return matrix.data_ptr() % _ALIGNMENT == 0 and matrix.stride(0) * matrix.element_size() % _ALIGNMENT == 0


def uses_tf32(dtype: torch.dtype) -> bool:
    """Whether torch's own products of a dtype would use TF32 on a GPU. Where old and new ways of setting it are mixed,
    torch 2.9 and later raise on a read of ``allow_tf32``; earlier versions have nothing else to read."""
    if dtype != torch.float32:
        return False
    flags = torch.backends.cuda.matmul
    precision = getattr(flags, "fp32_precision", None)
    return flags.allow_tf32 if precision is None else precision == "tf32"
