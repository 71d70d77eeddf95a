"""Policy: the epilogue. From the accumulator of a tile and its branch to what is stored."""

import triton
import triton.language as tl

from fastlora.backends.triton.branch import add_branch
from fastlora.backends.triton.column_scale import column_factors
from fastlora.backends.triton.row_map import rows_of_block
from fastlora.backends.triton.structs import Matrix


@triton.jit
def finish_tile(acc, product, row, first_n, shape, on_branch, dropout, variant: tl.constexpr):
    """Adds the branch to the columns of out from ``first_n`` on, scales them, adds the bias and stores them. The branch
    of dX, which dropout masks before it may be added, is made slice_n columns at a time: it needs registers of its own.
    """
    BLOCK_N: tl.constexpr = acc.shape[1]
    MASKED: tl.constexpr = variant.dropout and not variant.forward
    if MASKED and variant.tile.slice_n < BLOCK_N:
        left, right = halves(acc)
        finish_tile(left, product, row, first_n, shape, on_branch, dropout, variant)
        finish_tile(right, product, row, first_n + BLOCK_N // 2, shape, on_branch, dropout, variant)
    else:
        offs_m = rows_of_block(row, variant)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        branch = add_branch(acc, product, row, first_n, shape, on_branch, dropout, variant)
        if on_branch is not None:
            branch *= on_branch
        if product.column_scale.magnitude_ptr is not None:
            if product.column_scale.unscaled_ptr is not None:
                store_tile(branch, Matrix(product.column_scale.unscaled_ptr, product.out.stride), offs_m, offs_n, shape)
            branch *= column_factors(product.column_scale, offs_n, shape.N)[None, :]
        # The next epilogue goes here.
        if product.bias_ptr is not None:
            bias = tl.load(product.bias_ptr + offs_n, mask=offs_n < product.bias_size, other=0.0)
            branch += bias[None, :].to(tl.float32)
        store_tile(branch, product.out, offs_m, offs_n, shape)


@triton.jit
def halves(acc):
    """The left and the right half of a tile."""
    return tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def store_tile(tile, out, offs_m, offs_n, shape):
    """Rounds a tile and stores what of it is in out."""
    out_ptrs = out.data + offs_m[:, None].to(tl.int64) * out.stride + offs_n[None, :]
    mask = (offs_m < shape.M)[:, None] & (offs_n < shape.N)[None, :]
    tl.store(out_ptrs, tile.to(out.data.dtype.element_ty), mask=mask)
