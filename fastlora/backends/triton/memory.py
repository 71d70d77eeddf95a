"""Blocks of matrices in memory, and the dropout mask of a block."""

import triton
import triton.language as tl

from fastlora import philox
from fastlora.backends.triton.structs import Dropout

PHILOX_ROUNDS = tl.constexpr(philox.ROUNDS)
PER_CALL = tl.constexpr(philox.ELEMENTS_PER_CALL)


@triton.jit
def load_block(matrix, offs_row, offs_col, n_rows, n_cols, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    """A block of a matrix, zero outside [n_rows, n_cols]; an EVEN side is known to be inside."""
    ptrs = matrix.data + offs_row[:, None].to(tl.int64) * matrix.stride + offs_col[None, :]
    if EVEN_ROWS and EVEN_COLS:
        return tl.load(ptrs)
    elif EVEN_ROWS:
        return tl.load(ptrs, mask=(offs_col < n_cols)[None, :], other=0.0)
    elif EVEN_COLS:
        return tl.load(ptrs, mask=(offs_row < n_rows)[:, None], other=0.0)
    else:
        return tl.load(ptrs, mask=(offs_row < n_rows)[:, None] & (offs_col < n_cols)[None, :], other=0.0)


@triton.jit
def dropout_of(seed_ptr, seed, threshold, inverse_keep):
    """A seed is passed by value, or by address where a CUDA graph draws it: one kernel for both, for no capture should
    have to compile. The pointer is null, and not read, where the seed is a value."""
    if seed is None:
        return Dropout(0, 0, 1.0, 0)
    else:
        given = tl.load(seed_ptr, mask=seed_ptr.to(tl.int64) != 0, other=seed)
        return Dropout(given, threshold, inverse_keep, 0)


@triton.jit
def keep_mask(dropout, offs_m, column, n_columns, BLOCK: tl.constexpr):
    """The dropout mask of rows offs_m and BLOCK columns from ``column`` (a multiple of 8) on, of a matrix with
    ``n_columns``: the same bits as fastlora.philox.keep_mask."""
    offs_m += dropout.first_row
    offs_call = column // PER_CALL + tl.arange(0, BLOCK // PER_CALL)
    call = offs_m[:, None].to(tl.int64) * tl.cdiv(n_columns, PER_CALL) + offs_call[None, :]
    low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(dropout.seed, low, high, low * 0, low * 0, PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] is word 2i + j
    keep = tl.join((words & 0xFFFF) >= dropout.threshold, (words >> 16) >= dropout.threshold)
    return tl.reshape(keep, (offs_m.shape[0], BLOCK))
