"""Tiles of the gradients of A, B and the bias: sums over rows."""

import triton
import triton.language as tl

from fastlora.backends.triton.memory import keep_mask, load_block
from fastlora.backends.triton.schedule import publish, wait_for


@triton.jit
def gradient_tile(sums, counts_ptr, tile, chunk, dropout, DROPOUT: tl.constexpr, variant: tl.constexpr):
    """Column block ``tile`` of the sums of structs.RowSum, over the rows of one chunk.

    The chunks are summed by a serial (ordered) reduction: a tile waits for the one of the chunk before, adds its own
    sum to the fp32 partial sum and raises the count; the last one stores the gradient. So the order of the additions
    is fixed, results are the same bits in every run, and memory does not grow with M. The tile of the chunk before has
    been queued a whole row group earlier: the wait is short.
    """
    BLOCK_M: tl.constexpr = variant.tile.gradient_m
    BLOCK_N: tl.constexpr = variant.tile.gradient_n
    WGMMA: tl.constexpr = variant.wgmma and sums.left.data.dtype.element_ty.primitive_bitwidth == 16
    # wgmma's masked operand has to be the right one, as in tiles.shrink; the rank is then the height of the left one.
    TRANSPOSED: tl.constexpr = DROPOUT and WGMMA
    BLOCK_R: tl.constexpr = max(variant.block_r, 64) if TRANSPOSED and variant.tile.block_m >= 64 else variant.block_r
    first_n = tile * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < sums.N
    mask = mask_n[:, None] & (offs_r < sums.R)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_N) if TRANSPOSED else (BLOCK_N, BLOCK_R), tl.float32)
    # With wgmma, Σ_m left[m, n] is column 0 of a product with [1, 0, 0, ...]: if left were read into registers as well
    # as by dB's product, Triton 3.6 would pipeline it with a buffer too few, and overwrite it while wgmma reads it. The
    # other columns are NaN where left holds an infinity.
    ones = tl.zeros((BLOCK_M, 16), sums.left.data.dtype.element_ty) + (tl.arange(0, 16) == 0)[None, :]
    acc_sum = tl.zeros((BLOCK_N, 16) if WGMMA else (BLOCK_N,), tl.float32)
    for m in tl.range(chunk.first_row, chunk.end_row, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        left_block = load_block(sums.left, offs_m, offs_n, chunk.end_row, sums.N, False, False)
        if sums.column_sum.ptr is not None:
            if WGMMA:
                acc_sum = tl.dot(left_block.T, ones.to(left_block.dtype), acc_sum)
            else:
                acc_sum += tl.sum(left_block.to(tl.float32), axis=0)
        if sums.product.ptr is not None:
            if DROPOUT:
                left_block = tl.where(keep_mask(dropout, offs_m, first_n, sums.N, BLOCK_N), left_block, 0.0)
            right_block = load_block(sums.right, offs_m, offs_r, chunk.end_row, sums.R, False, False)
            if TRANSPOSED:
                acc = tl.dot(right_block.T, left_block, acc, input_precision=variant.precision)
            else:
                acc = tl.dot(left_block.T, right_block, acc, input_precision=variant.precision)
    if TRANSPOSED:
        acc = acc.T
    if WGMMA:
        acc_sum = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], acc_sum, 0.0), axis=1)
    if chunk.index > 0:
        wait_for(counts_ptr + tile, chunk.index)
        if sums.product.ptr is not None:
            partial_ptrs = sums.product.partial_ptr + offs_n[:, None].to(tl.int64) * sums.R + offs_r[None, :]
            acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        if sums.column_sum.ptr is not None:
            acc_sum += tl.load(sums.column_sum.partial_ptr + offs_n, mask=mask_n, other=0.0)
        # A value that several threads hold is loaded by each and stored by one, which may not be ahead of the others.
        tl.debug_barrier()
    if chunk.index < chunk.count - 1:
        if sums.product.ptr is not None:
            partial_ptrs = sums.product.partial_ptr + offs_n[:, None].to(tl.int64) * sums.R + offs_r[None, :]
            tl.store(partial_ptrs, acc, mask=mask)
        if sums.column_sum.ptr is not None:
            tl.store(sums.column_sum.partial_ptr + offs_n, acc_sum, mask=mask_n)
        publish(counts_ptr + tile)
    else:
        if sums.product.ptr is not None:
            gradient = sums.product
            ptrs = gradient.ptr + offs_n[:, None].to(tl.int64) * gradient.stride_n + offs_r[None, :] * gradient.stride_r
            tl.store(ptrs, (acc * sums.scale).to(gradient.ptr.dtype.element_ty), mask=mask)
        if sums.column_sum.ptr is not None:
            tl.store(sums.column_sum.ptr + offs_n, acc_sum.to(sums.column_sum.ptr.dtype.element_ty), mask=mask_n)
