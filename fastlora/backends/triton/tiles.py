"""The tiles of a LoRA layer: the product with its low-rank branch, and the gradients of A and B."""

import dataclasses
from typing import Any, NamedTuple

import triton
import triton.language as tl

from fastlora import philox
from fastlora.backends.configs import TileConfig
from fastlora.backends.triton.schedule import publish, wait_for

PHILOX_ROUNDS = tl.constexpr(philox.ROUNDS)
PER_CALL = tl.constexpr(philox.ELEMENTS_PER_CALL)


@dataclasses.dataclass(frozen=True)
class Variant:
    """What is fixed when a kernel is compiled. Kernels take it ``as_plain``, for Triton's hooks and ``preload``
    keep a kernel's constants as JSON. (Texts in it Triton would take for attributes of arguments.)

    forward: the operands lie in memory as the forward has them; else as dX does (see low_rank_tile).
    fused: column 0 makes S beside a tile of the product, not alone.
    tma, tma_d: U and V (D) are TMA descriptors, not pointers.
    even_k: the contracted dimension is a multiple of block_k.
    tf32: float32 products are products of TF32.
    wgmma: compiled for Hopper, whose products read registers while the program runs on.
    """

    tile: TileConfig
    block_r: int
    forward: bool
    fused: bool
    dropout: bool
    tma: bool
    tma_d: bool
    even_k: bool
    tf32: bool
    wgmma: bool

    @property
    def s_columns(self) -> int:
        """Columns of the queue that hold no tile of the product."""
        return 0 if self.fused else 1

    @property
    def precision(self) -> str:
        """tl.dot's name for it."""
        return "tf32" if self.tf32 else "ieee"

    def as_plain(self) -> tuple:
        """The fields in their order, the tile's as a tuple within."""
        return dataclasses.astuple(self)


@triton.constexpr_function
def variant_of(plain):
    """The Variant that was made plain."""
    return Variant(TileConfig(*plain[0]), *plain[1:])


class Matrix(NamedTuple):
    """A row-major matrix: a pointer or a TMA descriptor, and its row stride in elements."""

    data: Any
    stride: Any


class Dropout(NamedTuple):
    seed: Any
    threshold: Any
    inverse_keep: Any


class BranchScales(NamedTuple):
    """The scaling of the branch. ``of_sum`` multiplies the fp32 sums of S. Float16 alone knows the others, see
    fastlora.problem.split_scaling: ``in_s`` multiplies what then is not beyond its range, and ``on_branch`` S·Pᵀ; it is
    None where it is 1."""

    of_sum: Any
    in_s: Any
    on_branch: Any


class Shape(NamedTuple):
    """Of a product with a low-rank branch: C is M x N, K is contracted, R is the rank."""

    M: Any
    N: Any
    K: Any
    R: Any


@triton.jit
def keep_mask(dropout, offs_m, column, n_columns, BLOCK: tl.constexpr):
    """The dropout mask of rows offs_m and BLOCK columns from ``column`` (a multiple of 8) on, of a matrix with
    ``n_columns``: the same bits as fastlora.philox.keep_mask."""
    offs_call = column // PER_CALL + tl.arange(0, BLOCK // PER_CALL)
    call = offs_m[:, None].to(tl.int64) * tl.cdiv(n_columns, PER_CALL) + offs_call[None, :]
    low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(dropout.seed, low, high, low * 0, low * 0, PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] is word 2i + j
    keep = tl.join((words & 0xFFFF) >= dropout.threshold, (words >> 16) >= dropout.threshold)
    return tl.reshape(keep, (offs_m.shape[0], BLOCK))


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
def low_rank_tile(u, v, d, p, bias_ptr, c, s, flags_ptr, row, column, shape, scales, dropout, variant: tl.constexpr):
    """One tile of C = U·Vᵀ + S·Pᵀ [M, N], contracting K. Column 0 makes S = U·Dᵀ [M, R], scaled, for its row block.

    Forward: U = X, V = W0 [N, K], D = A [R, K], P = B [N, R].
    dX:      U = dY, V = W0ᵀ, D = Bᵀ, P = Aᵀ. They lie in memory as W0 [K, N], B [K, R] and A [R, N], by this function's
             names: what the forward contracts, dX puts out.

    Where fused, column 0 makes S beside its own tile of C, from the block of U that is in shared memory anyway. Else it
    makes S alone, and column n + 1 is tile n of C: two accumulators do not fit beyond a rank of 64.
    """
    if variant.fused:
        if column == 0:
            acc = _make_s(u, v, d, s, flags_ptr, row, shape, scales, dropout, variant)
        else:
            acc = _multiply(u, v, row, column, shape, variant)
            wait_for(flags_ptr + row, 1)
        first_n = column * variant.tile.block_n
        _finish_tile(acc, p, bias_ptr, c, s, row, first_n, shape, scales.on_branch, dropout, variant)
    else:
        if column == 0:
            _make_s(u, v, d, s, flags_ptr, row, shape, scales, dropout, variant)
        elif c.data is not None:
            acc = _multiply(u, v, row, column - 1, shape, variant)
            wait_for(flags_ptr + row, 1)
            first_n = (column - 1) * variant.tile.block_n
            _finish_tile(acc, p, bias_ptr, c, s, row, first_n, shape, scales.on_branch, dropout, variant)


@triton.jit
def _rows(row, M, variant: tl.constexpr):
    """Row numbers of a row block; one past the end repeats the last row, and is not stored."""
    return tl.minimum(row * variant.tile.block_m + tl.arange(0, variant.tile.block_m), M - 1)


@triton.jit
def _load_u(u, row, k, shape, variant: tl.constexpr):
    """[BLOCK_M, BLOCK_K] of U."""
    if variant.tma:
        return u.data.load([row * variant.tile.block_m, k])
    else:
        offs_k = k + tl.arange(0, variant.tile.block_k)
        return load_block(u, _rows(row, shape.M, variant), offs_k, 0, shape.K, True, variant.even_k)


@triton.jit
def _load_v(v, n, k, shape, variant: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of Vᵀ."""
    offs_k = k + tl.arange(0, variant.tile.block_k)
    offs_n = n * variant.tile.block_n + tl.arange(0, variant.tile.block_n)
    if variant.forward and variant.tma:
        return v.data.load([n * variant.tile.block_n, k]).T
    elif variant.forward:
        return load_block(v, tl.minimum(offs_n, shape.N - 1), offs_k, 0, shape.K, True, variant.even_k).T
    elif variant.tma:
        return v.data.load([k, n * variant.tile.block_n])
    else:
        return load_block(v, offs_k, offs_n, shape.K, shape.N, variant.even_k, False)


@triton.jit
def _load_d(d, k, shape, variant: tl.constexpr):
    """[BLOCK_K, BLOCK_R] of Dᵀ. Columns from R on hold anything: that part of S is not stored."""
    offs_k = k + tl.arange(0, variant.tile.block_k)
    offs_r = tl.minimum(tl.arange(0, variant.block_r), shape.R - 1)
    if variant.forward and variant.tma_d:
        return d.data.load([0, k]).T
    elif variant.forward:
        return load_block(d, offs_r, offs_k, 0, shape.K, True, variant.even_k).T
    elif variant.tma_d:
        return d.data.load([k, 0])
    else:
        return load_block(d, offs_k, offs_r, shape.K, 0, variant.even_k, True)


@triton.jit
def _multiply(u, v, row, n, shape, variant: tl.constexpr):
    """A tile of U·Vᵀ, in fp32 registers."""
    BLOCK_M: tl.constexpr = variant.tile.block_m
    BLOCK_N: tl.constexpr = variant.tile.block_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, shape.K, variant.tile.block_k):
        u_block = _load_u(u, row, k, shape, variant)
        acc = tl.dot(u_block, _load_v(v, n, k, shape, variant), acc, input_precision=variant.precision)
    return acc


@triton.jit
def _make_s(u, v, d, s, flags_ptr, row, shape, scales, dropout, variant: tl.constexpr):
    """Stores a row block of S = U·Dᵀ, scaled, and raises its flag. Returns, where fused, tile 0 of U·Vᵀ, made in the
    same pass over U."""
    BLOCK_M: tl.constexpr = variant.tile.block_m
    BLOCK_N: tl.constexpr = variant.tile.block_n
    BLOCK_K: tl.constexpr = variant.tile.block_k
    BLOCK_R: tl.constexpr = variant.block_r
    offs_m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    MASKED: tl.constexpr = variant.dropout and variant.forward
    TRANSPOSED: tl.constexpr = MASKED and s.data.dtype.element_ty.primitive_bitwidth == 16
    acc_s = tl.zeros((BLOCK_R, BLOCK_M) if TRANSPOSED else (BLOCK_M, BLOCK_R), tl.float32)
    for k in range(0, shape.K, BLOCK_K):
        u_block = _load_u(u, row, k, shape, variant)
        if variant.fused:
            acc = tl.dot(u_block, _load_v(v, 0, k, shape, variant), acc, input_precision=variant.precision)
        d_block = _load_d(d, k, shape, variant).to(u_block.dtype)
        if MASKED:
            u_block = tl.where(keep_mask(dropout, offs_m, k, shape.K, BLOCK_K), u_block, 0.0)
        if TRANSPOSED:
            # The masked block is the right operand, which lies in shared memory. A left one Triton would keep in
            # registers and overwrite while wgmma still reads them; ptxas mends that by waiting for every single wgmma
            # of the kernel.
            acc_s = tl.dot(d_block.T, u_block.T, acc_s, input_precision=variant.precision)
        else:
            acc_s = tl.dot(u_block, d_block, acc_s, input_precision=variant.precision)
    if TRANSPOSED:
        acc_s = acc_s.T
    s_ptrs = s.data + offs_m[:, None].to(tl.int64) * s.stride + offs_r[None, :]
    mask = (offs_m < shape.M)[:, None] & (offs_r < shape.R)[None, :]
    acc_s *= scales.of_sum
    if scales.in_s is not None:
        # Infinite where the composed layer's x·Aᵀ is, which a factor below 1 would hide, and nowhere else.
        rounded = acc_s.to(s.data.dtype.element_ty).to(tl.float32)
        acc_s = tl.where(tl.abs(rounded) == float("inf"), rounded, acc_s) * scales.in_s
    tl.store(s_ptrs, acc_s.to(s.data.dtype.element_ty), mask=mask)
    publish(flags_ptr + row)
    return acc


@triton.jit
def _finish_tile(acc, p, bias_ptr, c, s, row, first_n, shape, on_branch, dropout, variant: tl.constexpr):
    """Adds on_branch·S·Pᵀ and the bias to the columns of C from ``first_n`` on and stores them. The branch of dX, which
    dropout masks before it may be added, is made slice_n columns at a time: it needs registers of its own."""
    BLOCK_N: tl.constexpr = acc.shape[1]
    MASKED: tl.constexpr = variant.dropout and not variant.forward
    if MASKED and variant.tile.slice_n < BLOCK_N:
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, BLOCK_N // 2)), (0, 2, 1)))
        _finish_tile(left, p, bias_ptr, c, s, row, first_n, shape, on_branch, dropout, variant)
        _finish_tile(right, p, bias_ptr, c, s, row, first_n + BLOCK_N // 2, shape, on_branch, dropout, variant)
    else:
        BLOCK_R: tl.constexpr = variant.block_r
        STEP_R: tl.constexpr = min(BLOCK_R, 64)
        offs_m = row * variant.tile.block_m + tl.arange(0, variant.tile.block_m)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        branch = tl.zeros_like(acc) if MASKED else acc
        if on_branch is not None:  # a power of two: exact, and cheaper than an accumulator of the branch's own
            branch *= tl.div_rn(1.0, on_branch)
        for r in tl.range(0, shape.R, STEP_R, num_stages=1):
            offs_r = r + tl.arange(0, STEP_R)
            s_block = load_block(s, _rows(row, shape.M, variant), offs_r, 0, shape.R, True, False)
            if variant.forward:
                p_block = load_block(p, tl.minimum(offs_n, shape.N - 1), offs_r, 0, shape.R, True, False).T
            else:
                p_block = load_block(p, offs_r, offs_n, shape.R, shape.N, False, False)
            branch = tl.dot(s_block, p_block.to(s_block.dtype), branch, input_precision=variant.precision)
        if MASKED:
            keep = keep_mask(dropout, offs_m, first_n, shape.N, BLOCK_N)
            branch = acc + tl.where(keep, branch * dropout.inverse_keep, 0.0)
        if on_branch is not None:
            branch *= on_branch
        if bias_ptr is not None:
            branch += tl.load(bias_ptr + offs_n, mask=offs_n < shape.N, other=0.0)[None, :].to(tl.float32)
        c_ptrs = c.data + offs_m[:, None].to(tl.int64) * c.stride + offs_n[None, :]
        mask = (offs_m < shape.M)[:, None] & (offs_n < shape.N)[None, :]
        tl.store(c_ptrs, branch.to(c.data.dtype.element_ty), mask=mask)


class Gradient(NamedTuple):
    """A sum over rows: where its fp32 partials go between parts and where the result does, with both strides."""

    partial_ptr: Any
    ptr: Any
    stride_n: Any
    stride_r: Any


class Part(NamedTuple):
    """The rows of the input that one link of a chain adds up."""

    index: Any
    count: Any
    first_row: Any
    end_row: Any


@triton.jit
def gradient_tile(
    left, right, product, column_sum, count_ptr, tile, part, N, R, scale, dropout,
    CHAINED: tl.constexpr, DROPOUT: tl.constexpr, variant: tl.constexpr,
):  # fmt: skip
    """G[n, :] = scale·Σ_m L[m, n]·T[m, :] and Σ_m L[m, n] over the rows of one part. One whose pointer is None is not
    wanted.

    dB and dbias: L = dY, T = S. dA (by its strides stored transposed): L = X, T = dS.

    The parts of a block are added up as a chain: each waits for the one before it, adds its own sum to the fp32 partial
    and passes it on; the last stores the gradient. So the order of the additions is fixed, results are the same bits in
    every run, and memory does not grow with M. The part before was queued a whole row group earlier: nobody waits.
    """
    BLOCK_M: tl.constexpr = variant.tile.gradient_m
    BLOCK_N: tl.constexpr = variant.tile.gradient_n
    WGMMA: tl.constexpr = variant.wgmma and left.data.dtype.element_ty.primitive_bitwidth == 16
    # wgmma's masked operand has to be the right one, as in _make_s; the left one then has the rank for its height.
    TRANSPOSED: tl.constexpr = DROPOUT and WGMMA
    BLOCK_R: tl.constexpr = max(variant.block_r, 64) if TRANSPOSED else variant.block_r
    first_n = tile * BLOCK_N
    offs_n = first_n + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_r < R)[None, :]
    acc = tl.zeros((BLOCK_R, BLOCK_N) if TRANSPOSED else (BLOCK_N, BLOCK_R), tl.float32)
    # With wgmma, Σ_m L[m, n] is column 0 of a product with [1, 0, 0, ...]: if L were read into registers beside dB's
    # product, Triton 3.6 would pipeline it with a buffer too few, and overwrite it while wgmma reads it. The other
    # columns are NaN where L holds an infinity.
    ones = tl.zeros((BLOCK_M, 16), left.data.dtype.element_ty) + (tl.arange(0, 16) == 0)[None, :]
    acc_sum = tl.zeros((BLOCK_N, 16) if WGMMA else (BLOCK_N,), tl.float32)
    for m in tl.range(part.first_row, part.end_row, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        left_block = load_block(left, offs_m, offs_n, part.end_row, N, False, False)
        if column_sum.ptr is not None:
            if WGMMA:
                acc_sum = tl.dot(left_block.T, ones.to(left_block.dtype), acc_sum)
            else:
                acc_sum += tl.sum(left_block.to(tl.float32), axis=0)
        if product.ptr is not None:
            if DROPOUT:
                left_block = tl.where(keep_mask(dropout, offs_m, first_n, N, BLOCK_N), left_block, 0.0)
            right_block = load_block(right, offs_m, offs_r, part.end_row, R, False, False)
            if TRANSPOSED:
                acc = tl.dot(right_block.T, left_block, acc, input_precision=variant.precision)
            else:
                acc = tl.dot(left_block.T, right_block, acc, input_precision=variant.precision)
    if TRANSPOSED:
        acc = acc.T
    if WGMMA:
        acc_sum = tl.sum(tl.where((tl.arange(0, 16) == 0)[None, :], acc_sum, 0.0), axis=1)
    if CHAINED and part.index > 0:
        wait_for(count_ptr + tile, part.index)
        if product.ptr is not None:
            partial_ptrs = product.partial_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :]
            acc += tl.load(partial_ptrs, mask=mask, other=0.0)
        if column_sum.ptr is not None:
            acc_sum += tl.load(column_sum.partial_ptr + offs_n, mask=mask_n, other=0.0)
        # A value that several threads hold is loaded by each and stored by one, who may not be ahead of the others.
        tl.debug_barrier()
    if CHAINED and part.index < part.count - 1:
        if product.ptr is not None:
            partial_ptrs = product.partial_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :]
            tl.store(partial_ptrs, acc, mask=mask)
        if column_sum.ptr is not None:
            tl.store(column_sum.partial_ptr + offs_n, acc_sum, mask=mask_n)
        publish(count_ptr + tile)
    else:
        if product.ptr is not None:
            ptrs = product.ptr + offs_n[:, None].to(tl.int64) * product.stride_n + offs_r[None, :] * product.stride_r
            tl.store(ptrs, (acc * scale).to(product.ptr.dtype.element_ty), mask=mask)
        if column_sum.ptr is not None:
            tl.store(column_sum.ptr + offs_n, acc_sum.to(column_sum.ptr.dtype.element_ty), mask=mask_n)
