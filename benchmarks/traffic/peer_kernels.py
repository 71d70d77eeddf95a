"""Plain kernels of our own, from which peer_orders.py puts together what other packages do.

A tiled product with what their kernels add to it, one elementwise kernel, dropout with a stored mask, and the pair of
products that LoRAFusion sums with atomics. They exist to be counted, not to be fast.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastlora import philox
from fastlora.backends.configs import TileConfig, padded_rank
from fastlora.backends.triton.memory import keep_mask
from fastlora.backends.triton.structs import Dropout

_ELEMENTS = 1024  # of a program of the elementwise kernel


@triton.jit
def load_block(ptr, rows, stride_row, n_rows, columns, stride_column, n_columns):
    """A block of a matrix of any strides, zero outside."""
    ptrs = ptr + rows[:, None].to(tl.int64) * stride_row + columns[None, :].to(tl.int64) * stride_column
    return tl.load(ptrs, mask=(rows < n_rows)[:, None] & (columns < n_columns)[None, :], other=0.0)


@triton.jit
def product_kernel(
    left_ptr, right_ptr, out_ptr, addend_ptr, s_ptr, p_ptr, mask_ptr, M, N, K, R,
    stride_lm, stride_lk, stride_rk, stride_rn, stride_sm, stride_pr, stride_pn, alpha, branch_scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """out = alpha·left·right + addend + branch_scale·mask∘(S·P), contiguous. What is None is left out."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        left = load_block(left_ptr, offs_m, stride_lm, M, offs_k, stride_lk, K)
        right = load_block(right_ptr, offs_k, stride_rk, K, offs_n, stride_rn, N)
        acc = tl.dot(left, right, acc)
    acc *= alpha
    out_offsets = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
    inside = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    if s_ptr is not None:
        offs_r = tl.arange(0, BLOCK_R)
        s = load_block(s_ptr, offs_m, stride_sm, M, offs_r, 1, R)
        p = load_block(p_ptr, offs_r, stride_pr, R, offs_n, stride_pn, N)
        branch = tl.dot(s, p) * branch_scale
        if mask_ptr is not None:
            branch = tl.where(tl.load(mask_ptr + out_offsets, mask=inside, other=0) != 0, branch, 0.0)
        acc += branch
    if addend_ptr is not None:
        acc += tl.load(addend_ptr + out_offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + out_offsets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def elementwise_kernel(out_ptr, x_ptr, y_ptr, mask_ptr, factor, n, BLOCK: tl.constexpr):
    """out = factor·mask∘x + y over n elements. What is None is left out; without x, zeros."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    value = tl.zeros((BLOCK,), tl.float32)
    if x_ptr is not None:
        value = tl.load(x_ptr + offs, mask=inside, other=0.0).to(tl.float32) * factor
    if mask_ptr is not None:
        value = tl.where(tl.load(mask_ptr + offs, mask=inside, other=0) != 0, value, 0.0)
    if y_ptr is not None:
        value += tl.load(y_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dropout_kernel(
    x_ptr, out_ptr, mask_ptr, M, K, seed, threshold, inverse_keep, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr
):
    """out = mask∘x / (1 - p) and the mask, a byte an element; the mask is fastlora's, so that results compare."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_K
    offs_k = column + tl.arange(0, BLOCK_K)
    keep = keep_mask(Dropout(seed, threshold, inverse_keep, 0), offs_m, column, K, BLOCK_K)
    x = load_block(x_ptr, offs_m, K, M, offs_k, 1, K)
    offsets = offs_m[:, None].to(tl.int64) * K + offs_k[None, :]
    inside = (offs_m < M)[:, None] & (offs_k < K)[None, :]
    dropped = tl.where(keep, x.to(tl.float32) * inverse_keep, 0.0)
    tl.store(out_ptr + offsets, dropped.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(mask_ptr + offsets, keep.to(tl.uint8), mask=inside)


@triton.jit
def gradient_pair_kernel(
    dy_ptr, s_ptr, b_ptr, db_ptr, ds_ptr, M, N, R, stride_dym, stride_sm, stride_bn, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """db += scale·dYᵀ·S and ds += scale·dY·B from one reading of dY, by float atomics into fp32."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    dy = load_block(dy_ptr, offs_m, stride_dym, M, offs_n, 1, N)
    s = load_block(s_ptr, offs_m, stride_sm, M, offs_r, 1, R)
    b = load_block(b_ptr, offs_n, stride_bn, N, offs_r, 1, R)
    db, ds = tl.dot(dy.T, s) * scale, tl.dot(dy, b) * scale
    inside_r = (offs_r < R)[None, :]
    tl.atomic_add(db_ptr + offs_n[:, None] * R + offs_r[None, :], db, mask=(offs_n < N)[:, None] & inside_r)
    tl.atomic_add(ds_ptr + offs_m[:, None] * R + offs_r[None, :], ds, mask=(offs_m < M)[:, None] & inside_r)


def _block(largest: int, extent: int) -> int:
    """A narrow side gets a narrow tile, so that a product with it reads the other operand once."""
    return min(largest, max(16, triton.next_power_of_2(extent)))


def product(
    left: Tensor,
    right: Tensor,
    tile: TileConfig,
    *,
    alpha: float = 1.0,
    onto: Tensor | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
    branch_scale: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """alpha·left·right [M, N], in one launch.

    Args:
        left: [M, K], any strides.
        right: [K, N], any strides.
        onto: [M, N]; the product is added to it in place, as ``addmm_`` does.
        branch: S [M, R] and P [R, N]; branch_scale·mask∘(S·P) is added.
        mask: [M, N] bytes.
    """
    (m, k), n = left.shape, right.shape[1]
    out = left.new_empty(m, n) if onto is None else onto
    s, p = branch or (None, None)
    r = 0 if p is None else p.shape[0]
    block_m, block_n = _block(tile.block_m, m), _block(tile.block_n, n)
    product_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        left, right, out, onto, s, p, mask, m, n, k, r, *left.stride(), *right.stride(),
        0 if s is None else s.stride(0), *((0, 0) if p is None else p.stride()), alpha, branch_scale,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=tile.block_k, BLOCK_R=padded_rank(max(r, 1)),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def elementwise(
    x: Tensor,
    *,
    factor: float = 1.0,
    mask: Tensor | None = None,
    plus: Tensor | None = None,
    out: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """factor·mask∘x + plus, in one launch; all contiguous and of one shape. Without ``out``, a new tensor."""
    out = torch.empty_like(x, dtype=dtype) if out is None else out
    grid = (triton.cdiv(x.numel(), _ELEMENTS),)
    elementwise_kernel[grid](out, x, plus, mask, factor, x.numel(), BLOCK=_ELEMENTS)
    return out


def zeros(*shape: int, like: Tensor) -> Tensor:
    """fp32 zeros, in one launch."""
    out = like.new_empty(shape, dtype=torch.float32)
    elementwise_kernel[(triton.cdiv(out.numel(), _ELEMENTS),)](out, None, None, None, 1.0, out.numel(), BLOCK=_ELEMENTS)
    return out


def dropout(x: Tensor, p: float, seed: Tensor, tile: TileConfig) -> tuple[Tensor, Tensor]:
    """mask∘x / (1 - p) and the mask (bytes), both [M, K], in one launch. x is contiguous."""
    (m, k), out, mask = x.shape, x.new_empty(x.shape), x.new_empty(x.shape, dtype=torch.uint8)
    grid = (triton.cdiv(m, tile.block_m), triton.cdiv(k, tile.block_k))
    dropout_kernel[grid](
        x, out, mask, m, k, int(seed), philox.threshold(p), philox.inverse_keep(p),
        BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, num_warps=tile.num_warps,
    )  # fmt: skip
    return out, mask


def gradient_pair(dy: Tensor, s: Tensor, b: Tensor, scale: float, tile: TileConfig, into: tuple[Tensor, Tensor]):
    """Adds scale·dYᵀ·S [N, R] and scale·dY·B [M, R] to the two fp32 tensors ``into``, in one launch."""
    (m, n), r = dy.shape, b.shape[1]
    block_m, block_n = _block(tile.block_m, m), _block(tile.block_n, n)
    gradient_pair_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        dy, s, b, *into, m, n, r, dy.stride(0), s.stride(0), b.stride(0), scale,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_R=padded_rank(r), num_warps=tile.num_warps,
    )  # fmt: skip
