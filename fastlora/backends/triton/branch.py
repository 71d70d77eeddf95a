"""Policy: the low-rank branch. Which rows of its factors a tile reads, which ranks of S, and the branch's scale."""

import triton
import triton.language as tl

from fastlora.backends.triton.memory import keep_mask, load_block
from fastlora.backends.triton.row_map import rows_of_block, rows_to_load

# One adapter serves a tile, whatever others a launch has: segments.py hands each tile that of its rows, projections.py
# that of its columns, as factors by themselves.


@triton.jit
def s_is_made(shape, variant: tl.constexpr):
    """What a row block's flag says once its S is stored. Rows without an adapter, whose rank is 0, have no S: 0, which
    every flag says from the start."""
    if variant.may_lack_adapter:
        return tl.minimum(shape.R, 1)
    else:
        return 1


@triton.jit
def load_down(product, k, shape, variant: tl.constexpr):
    """[BLOCK_K, BLOCK_R] of downᵀ. Columns from R on hold anything: that part of S is not stored."""
    offs_k = k + tl.arange(0, variant.tile.block_k)
    offs_r = tl.minimum(tl.arange(0, variant.block_r), shape.R - 1)
    if variant.forward and variant.tma_down:
        return product.down.data.load([0, k]).T
    elif variant.forward:
        return load_block(product.down, offs_r, offs_k, 0, shape.K, True, variant.even_k).T
    elif variant.tma_down:
        return product.down.data.load([k, 0])
    else:
        return load_block(product.down, offs_k, offs_r, shape.K, 0, variant.even_k, True)


@triton.jit
def rounded_s(acc_s, scales, dtype: tl.constexpr):
    """The sums of S, scaled and rounded once."""
    acc_s *= scales.of_sum
    if scales.in_s is not None:
        # Infinite where the composed layer's x·Aᵀ is, which a factor below 1 would hide, and nowhere else.
        rounded = acc_s.to(dtype).to(tl.float32)
        acc_s = tl.where(tl.abs(rounded) == float("inf"), rounded, acc_s) * scales.in_s
    return acc_s.to(dtype)


@triton.jit
def add_branch(acc, product, row, first_n, shape, on_branch, dropout, variant: tl.constexpr):
    """acc + the branch of a row block, from column ``first_n`` on; see ``expand``. That of dX dropout masks before it
    is added."""
    BLOCK_N: tl.constexpr = acc.shape[1]
    MASKED: tl.constexpr = variant.dropout and not variant.forward
    offs_n = first_n + tl.arange(0, BLOCK_N)
    branch = tl.zeros_like(acc) if MASKED else acc
    branch = expand(branch, product, row, offs_n, shape, on_branch, variant)
    if MASKED:
        keep = keep_mask(dropout, rows_of_block(row, variant), first_n, shape.N, BLOCK_N)
        branch = acc + tl.where(keep, branch * dropout.inverse_keep, 0.0)
    return branch


@triton.jit
def expand(acc, product, row, offs_n, shape, on_branch, variant: tl.constexpr):
    """acc + s·upᵀ, for the row block and columns offs_n; with ``on_branch``, acc / on_branch + s·upᵀ."""
    STEP_R: tl.constexpr = min(variant.block_r, 64)
    if on_branch is not None:  # a power of two: exact, and cheaper than an accumulator of the branch's own
        acc *= tl.div_rn(1.0, on_branch)
    for r in tl.range(0, shape.R, STEP_R, num_stages=1):
        offs_r = r + tl.arange(0, STEP_R)
        s_block = load_block(product.s, rows_to_load(row, shape.M, variant), offs_r, 0, shape.R, True, False)
        if variant.forward:
            up_block = load_block(product.up, tl.minimum(offs_n, shape.N - 1), offs_r, 0, shape.R, True, False).T
        else:
            up_block = load_block(product.up, offs_r, offs_n, shape.R, shape.N, False, False)
        acc = tl.dot(s_block, up_block.to(s_block.dtype), acc, input_precision=variant.precision)
    return acc
