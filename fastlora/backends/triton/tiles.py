"""A tile of the product with its low-rank branch, of Y or of dX."""

import triton
import triton.language as tl

from fastlora.backends.triton.base_weight import await_weight, load_weight
from fastlora.backends.triton.branch import load_down, rounded_s, s_is_made
from fastlora.backends.triton.column_scale import await_rows
from fastlora.backends.triton.epilogue import finish_tile
from fastlora.backends.triton.memory import keep_mask, load_block
from fastlora.backends.triton.row_map import rows_of_block, rows_to_load
from fastlora.backends.triton.schedule import publish, wait_for
from fastlora.backends.triton.structs import Matrix


@triton.jit
def product_tile(product, flags_ptr, row, column, shape, scales, dropout, variant: tl.constexpr):
    """One tile of out [M, N] (structs.Product). Column 0 makes S [M, R] for its row block.

    With the fused shrink, column 0 makes S together with its own tile, from the block of act that is in shared memory
    anyway. With the separate shrink column 0 makes S only, and column n + 1 is tile n of out: two accumulators do not
    fit beyond a rank of 64.
    """
    makes_s = column == 0
    if variant.may_lack_adapter:
        makes_s = makes_s & (shape.R > 0)
    BLOCK_M: tl.constexpr = variant.tile.block_m
    BLOCK_N: tl.constexpr = variant.tile.block_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if variant.fused:
        if makes_s:
            acc = shrink(acc, product, flags_ptr, row, shape, scales, dropout, variant)
        else:
            acc = multiply(acc, product, row, column, shape, variant)
            wait_for(flags_ptr + row, s_is_made(shape, variant))
        first_n = column * variant.tile.block_n
        finish_tile(acc, product, row, first_n, shape, scales.on_branch, dropout, variant)
    else:
        if column == 0:
            shrink(acc, product, flags_ptr, row, shape, scales, dropout, variant)
        elif product.out.data is not None:
            acc = multiply(acc, product, row, column - 1, shape, variant)
            wait_for(flags_ptr + row, s_is_made(shape, variant))
            first_n = (column - 1) * variant.tile.block_n
            finish_tile(acc, product, row, first_n, shape, scales.on_branch, dropout, variant)


@triton.jit
def _load_act(product, row, k, shape, variant: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of act."""
    if variant.tma:
        return product.act.data.load([row * variant.tile.block_m, k])
    else:
        offs_k = k + tl.arange(0, variant.tile.block_k)
        act = Matrix(product.act.data.ptr, product.act.stride) if variant.scaled else product.act
        return load_block(act, rows_to_load(row, shape.M, variant), offs_k, 0, shape.K, True, variant.even_k)


@triton.jit
def multiply(acc, product, row, n, shape, variant: tl.constexpr):
    """acc + a tile of act·weightᵀ, in fp32 registers."""
    await_rows(product.act.data, row // variant.tile.group_m, variant)
    await_weight(product, n, variant)
    for k in range(0, shape.K, variant.tile.block_k):
        act_block = _load_act(product, row, k, shape, variant)
        weight_block = load_weight(product, n, k, shape, variant)
        acc = tl.dot(act_block, weight_block, acc, input_precision=variant.precision)
    return acc


@triton.jit
def shrink(acc, product, flags_ptr, row, shape, scales, dropout, variant: tl.constexpr):
    """Stores a row block of S and raises its flag. Returns acc, where fused with tile 0 of act·weightᵀ added, made in
    the same pass over act."""
    BLOCK_M: tl.constexpr = variant.tile.block_m
    BLOCK_K: tl.constexpr = variant.tile.block_k
    BLOCK_R: tl.constexpr = variant.block_r
    offs_m = rows_of_block(row, variant)
    offs_r = tl.arange(0, BLOCK_R)
    MASKED: tl.constexpr = variant.dropout and variant.forward
    TRANSPOSED: tl.constexpr = MASKED and product.s.data.dtype.element_ty.primitive_bitwidth == 16
    acc_s = tl.zeros((BLOCK_R, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_R), tl.float32)
    await_rows(product.act.data, row // variant.tile.group_m, variant)
    if variant.fused:
        await_weight(product, 0, variant)
    for k in range(0, shape.K, BLOCK_K):
        act_block = _load_act(product, row, k, shape, variant)
        if variant.fused:
            weight_block = load_weight(product, 0, k, shape, variant)
            acc = tl.dot(act_block, weight_block, acc, input_precision=variant.precision)
        down_block = load_down(product, k, shape, variant).to(act_block.dtype)
        if MASKED:
            act_block = tl.where(keep_mask(dropout, offs_m, k, shape.K, BLOCK_K), act_block, 0.0)
        if TRANSPOSED:
            # The masked block is the right operand, which lies in shared memory. A left one Triton would keep in
            # registers and overwrite while wgmma still reads them; ptxas mends that by waiting for every single wgmma
            # of the kernel.
            acc_s = tl.dot(down_block.T, act_block.T, acc_s, input_precision=variant.precision)
        else:
            acc_s = tl.dot(act_block, down_block, acc_s, input_precision=variant.precision)
    if TRANSPOSED:
        acc_s = acc_s.T
    s_ptrs = product.s.data + offs_m[:, None].to(tl.int64) * product.s.stride + offs_r[None, :]
    mask = (offs_m < shape.M)[:, None] & (offs_r < shape.R)[None, :]
    tl.store(s_ptrs, rounded_s(acc_s, scales, product.s.data.dtype.element_ty), mask=mask)
    publish(flags_ptr + row)
    return acc
