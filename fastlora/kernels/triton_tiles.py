"""The tiles of a LoRA layer: the product with its low-rank branch, and the gradients of A and B."""

import triton
import triton.language as tl

from fastlora import philox
from fastlora.kernels.triton_schedule import publish, wait_for

PHILOX_ROUNDS = tl.constexpr(philox.ROUNDS)
PER_CALL = tl.constexpr(philox.ELEMENTS_PER_CALL)


@triton.jit
def keep_mask(seed, threshold, offs_m, column, n_columns, BLOCK: tl.constexpr):
    """The dropout mask of rows offs_m and BLOCK columns from ``column`` (a multiple of 8) on, of a matrix with
    ``n_columns``: the same bits as fastlora.philox.keep_mask."""
    offs_call = column // PER_CALL + tl.arange(0, BLOCK // PER_CALL)
    call = offs_m[:, None].to(tl.int64) * tl.cdiv(n_columns, PER_CALL) + offs_call[None, :]
    low, high = call.to(tl.uint32), (call >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0, PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., i, j] is word 2i + j
    bits = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(bits, (offs_m.shape[0], BLOCK)) >= threshold


@triton.jit
def load_block(ptr, stride, offs_row, offs_col, n_rows, n_cols, EVEN_ROWS: tl.constexpr, EVEN_COLS: tl.constexpr):
    """A block of a row-major matrix, zero outside [n_rows, n_cols]; an EVEN side is known to be inside."""
    ptrs = ptr + offs_row[:, None].to(tl.int64) * stride + offs_col[None, :]
    if EVEN_ROWS and EVEN_COLS:
        return tl.load(ptrs)
    if EVEN_ROWS:
        return tl.load(ptrs, mask=(offs_col < n_cols)[None, :], other=0.0)
    if EVEN_COLS:
        return tl.load(ptrs, mask=(offs_row < n_rows)[:, None], other=0.0)
    return tl.load(ptrs, mask=(offs_row < n_rows)[:, None] & (offs_col < n_cols)[None, :], other=0.0)


@triton.jit
def low_rank_tile(
    u, v, d, p_ptr, bias_ptr, c_ptr, s_ptr, flags_ptr, row, column, M, N, K, R,
    stride_um, stride_v, stride_d, stride_p, stride_cm, scale_s, inverse_keep, seed, threshold,
    FORWARD: tl.constexpr, FUSED: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    TMA: tl.constexpr, TMA_D: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, SLICE_N: tl.constexpr,
):  # fmt: skip
    """One tile of C = U·Vᵀ + S·Pᵀ [M, N], contracting K. Column 0 makes S = scale_s·U·Dᵀ [M, R] for its row block.

    Forward: U = X, V = W0 [N, K], D = A [R, K], P = B [N, R].
    dX:      U = dY, V = W0ᵀ, D = Bᵀ, P = Aᵀ. They lie in memory as W0 [K, N], B [K, R] and A [R, N], by this function's
             names: what the forward contracts, dX puts out.

    Where FUSED, column 0 makes S beside its own tile of C, from the block of U that is in shared memory anyway. Else it
    makes S alone, and column n + 1 is tile n of C: two accumulators do not fit beyond a rank of 64.
    u, v (and d) are TMA descriptors where TMA (TMA_D) says so, else pointers.
    """
    makes_s = column == 0
    n = column if FUSED else column - 1
    offs_m = row * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    rows = tl.minimum(offs_m, M - 1)  # a row past the end repeats the last one; it is not stored
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if makes_s:
        acc_s = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            u_block = _load_u(u, stride_um, row * BLOCK_M, rows, k, offs_k, K, TMA, EVEN_K)
            if FUSED:
                v_block = _load_v(v, stride_v, n * BLOCK_N, offs_n, N, k, offs_k, K, FORWARD, TMA, EVEN_K)
                acc = tl.dot(u_block, v_block, acc, input_precision=PRECISION)
            d_block = _load_d(d, stride_d, offs_r, R, k, offs_k, K, FORWARD, TMA_D, EVEN_K)
            if DROPOUT and FORWARD:
                keep = keep_mask(seed, threshold, offs_m, k, K, BLOCK_K)
                u_block = tl.where(keep, u_block, 0.0)
            acc_s = tl.dot(u_block, d_block.to(u_block.dtype), acc_s, input_precision=PRECISION)
        s = (acc_s * scale_s).to(s_ptr.dtype.element_ty)
        s_ptrs = s_ptr + offs_m[:, None].to(tl.int64) * R + offs_r[None, :]
        tl.store(s_ptrs, s, mask=(offs_m < M)[:, None] & (offs_r < R)[None, :])
        publish(flags_ptr + row)
    else:
        for k in range(0, K, BLOCK_K):
            offs_k = k + tl.arange(0, BLOCK_K)
            u_block = _load_u(u, stride_um, row * BLOCK_M, rows, k, offs_k, K, TMA, EVEN_K)
            v_block = _load_v(v, stride_v, n * BLOCK_N, offs_n, N, k, offs_k, K, FORWARD, TMA, EVEN_K)
            acc = tl.dot(u_block, v_block, acc, input_precision=PRECISION)
        wait_for(flags_ptr + row, 1)
    if FUSED or not makes_s:
        _finish_tile(
            acc, s_ptr, p_ptr, bias_ptr, c_ptr, offs_m, rows, n * BLOCK_N, M, N, R, stride_p, stride_cm,
            inverse_keep, seed, threshold, FORWARD, HAS_BIAS, DROPOUT, PRECISION, BLOCK_N, BLOCK_R, SLICE_N,
        )  # fmt: skip


@triton.jit
def _load_u(u, stride, first_row, rows, k, offs_k, K, TMA: tl.constexpr, EVEN_K: tl.constexpr):
    if TMA:
        return u.load([first_row, k])
    return load_block(u, stride, rows, offs_k, 0, K, True, EVEN_K)


@triton.jit
def _load_v(v, stride, first_n, offs_n, N, k, offs_k, K, FORWARD: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of Vᵀ."""
    if FORWARD:
        if TMA:
            return v.load([first_n, k]).T
        return load_block(v, stride, tl.minimum(offs_n, N - 1), offs_k, 0, K, True, EVEN_K).T
    if TMA:
        return v.load([k, first_n])
    return load_block(v, stride, offs_k, offs_n, K, N, EVEN_K, False)


@triton.jit
def _load_d(d, stride, offs_r, R, k, offs_k, K, FORWARD: tl.constexpr, TMA: tl.constexpr, EVEN_K: tl.constexpr):
    """[BLOCK_K, BLOCK_R] of Dᵀ. Columns from R on hold anything: that part of S is not stored."""
    if FORWARD:
        if TMA:
            return d.load([0, k]).T
        return load_block(d, stride, tl.minimum(offs_r, R - 1), offs_k, 0, K, True, EVEN_K).T
    if TMA:
        return d.load([k, 0])
    return load_block(d, stride, offs_k, tl.minimum(offs_r, R - 1), K, 0, EVEN_K, True)


@triton.jit
def _finish_tile(
    acc, s_ptr, p_ptr, bias_ptr, c_ptr, offs_m, rows, first_n, M, N, R, stride_p, stride_cm,
    inverse_keep, seed, threshold, FORWARD: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, SLICE_N: tl.constexpr,
):  # fmt: skip
    """Adds S·Pᵀ and the bias to a tile and stores it, in column slices of SLICE_N."""
    if BLOCK_N > SLICE_N:
        # With dropout the branch needs registers of its own until it is masked: a narrow slice of it at a time.
        half: tl.constexpr = BLOCK_N // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (acc.shape[0], 2, half)), (0, 2, 1)))
        _finish_tile(
            left, s_ptr, p_ptr, bias_ptr, c_ptr, offs_m, rows, first_n, M, N, R, stride_p, stride_cm,
            inverse_keep, seed, threshold, FORWARD, HAS_BIAS, DROPOUT, PRECISION, half, BLOCK_R, SLICE_N,
        )  # fmt: skip
        _finish_tile(
            right, s_ptr, p_ptr, bias_ptr, c_ptr, offs_m, rows, first_n + half, M, N, R, stride_p, stride_cm,
            inverse_keep, seed, threshold, FORWARD, HAS_BIAS, DROPOUT, PRECISION, half, BLOCK_R, SLICE_N,
        )  # fmt: skip
    else:
        offs_n = first_n + tl.arange(0, BLOCK_N)
        step: tl.constexpr = 64 if BLOCK_R > 64 else BLOCK_R
        masked: tl.constexpr = DROPOUT and not FORWARD
        branch = tl.zeros_like(acc) if masked else acc
        for r in tl.static_range(0, BLOCK_R, step):
            offs_r = r + tl.arange(0, step)
            s_block = load_block(s_ptr, R, rows, offs_r, 0, R, True, False)
            if FORWARD:
                p_block = load_block(p_ptr, stride_p, tl.minimum(offs_n, N - 1), offs_r, 0, R, True, False).T
            else:
                p_block = load_block(p_ptr, stride_p, offs_r, offs_n, R, N, False, False)
            branch = tl.dot(s_block, p_block.to(s_block.dtype), branch, input_precision=PRECISION)
        if masked:
            keep = keep_mask(seed, threshold, offs_m, first_n, N, BLOCK_N)
            branch = acc + tl.where(keep, branch * inverse_keep, 0.0)
        mask_n = offs_n < N
        if HAS_BIAS:
            branch += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :].to(tl.float32)
        c_ptrs = c_ptr + offs_m[:, None].to(tl.int64) * stride_cm + offs_n[None, :]
        tl.store(c_ptrs, branch.to(c_ptr.dtype.element_ty), mask=(offs_m < M)[:, None] & mask_n[None, :])


@triton.jit
def gradient_tile(
    left_ptr, right_ptr, grad_ptr, column_sum_ptr, partial_ptr, sum_partial_ptr, count_ptr,
    block, first_row, end_row, part, n_parts, N, R, stride_left, stride_gn, stride_gr, scale, seed, threshold,
    PRODUCT: tl.constexpr, COLUMN_SUM: tl.constexpr, CHAINED: tl.constexpr, DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """G[n, :] = scale·Σ_m L[m, n]·T[m, :] over the rows of one part, and where COLUMN_SUM Σ_m L[m, n].

    dB and dbias: L = dY, T = S. dA (stored transposed): L = X, T = dS.

    The parts of a block are added up as a chain: each waits for the one before it, adds its own sum to the fp32 partial
    and passes it on; the last stores the gradient. So the order of the additions is fixed, results are the same bits in
    every run, and memory does not grow with M. The part before was queued a whole row group earlier: nobody waits.
    """
    offs_n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < N
    mask = mask_n[:, None] & (offs_r < R)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    acc_sum = tl.zeros((BLOCK_N,), tl.float32)
    for m in range(first_row, end_row, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        left = load_block(left_ptr, stride_left, offs_m, offs_n, end_row, N, False, False)
        if COLUMN_SUM:
            acc_sum += tl.sum(left.to(tl.float32), axis=0)
        if PRODUCT:
            if DROPOUT:
                keep = keep_mask(seed, threshold, offs_m, block * BLOCK_N, N, BLOCK_N)
                left = tl.where(keep, left, 0.0)
            right = load_block(right_ptr, R, offs_m, offs_r, end_row, R, False, False)
            acc = tl.dot(left.T, right, acc, input_precision=PRECISION)
    if CHAINED and part > 0:
        wait_for(count_ptr + block, part)
        if PRODUCT:
            acc += tl.load(partial_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :], mask=mask, other=0.0)
        if COLUMN_SUM:
            acc_sum += tl.load(sum_partial_ptr + offs_n, mask=mask_n, other=0.0)
    if CHAINED and part < n_parts - 1:
        if PRODUCT:
            tl.store(partial_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :], acc, mask=mask)
        if COLUMN_SUM:
            tl.store(sum_partial_ptr + offs_n, acc_sum, mask=mask_n)
        publish(count_ptr + block)
    else:
        if PRODUCT:
            grad_ptrs = grad_ptr + offs_n[:, None].to(tl.int64) * stride_gn + offs_r[None, :].to(tl.int64) * stride_gr
            tl.store(grad_ptrs, (acc * scale).to(grad_ptr.dtype.element_ty), mask=mask)
        if COLUMN_SUM:
            tl.store(column_sum_ptr + offs_n, acc_sum.to(column_sum_ptr.dtype.element_ty), mask=mask_n)
