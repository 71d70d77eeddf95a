"""The two kernels of projections that share an input: their forward, and their whole backward."""

import triton
import triton.language as tl

from fastlora.backends.triton.gradients import gradient_tile
from fastlora.backends.triton.projections import (
    dropout_of_projection,
    dx_tile,
    elements_before,
    find,
    pick,
    pick_matrix,
    projection_tile,
    sum_before,
)
from fastlora.backends.triton.row_map import count_chunks, row_chunk
from fastlora.backends.triton.schedule import N_COUNTERS, claim, locate, reset_if_last, wait_for
from fastlora.backends.triton.structs import BranchScales, Dropout, Gradient, Matrix, Projections, RowSum
from fastlora.backends.triton.variant import variant_of

# As for a single layer; what a tuple holds is specialised whatever is said here, see projection_launch.py.
UNSPECIALISED = ("M", "n_words", "wave", "n_columns", "gradients_last")


@triton.jit(do_not_specialize=UNSPECIALISED)
def projections_forward_kernel(
    x_ptr, weights, lora_as, lora_bs, bias_ptrs, y_ptrs, s_ptrs, workspace_ptr, M, K, N, R, bias_sizes, columns,
    n_words, wave, n_columns, stride_xm, strides_wn, strides_ar, strides_bn, scale_s, in_s, on_branch, dropout,
    plain_variant: tl.constexpr,
):  # fmt: skip
    """Y_i = X·W_iᵀ + on_branch_i·S_i·B_iᵀ + bias_i and S_i = scale_s_i·in_s_i·drop_i(X)·A_iᵀ; in_s and on_branch are
    None but in float16. ``columns``: of the queue, those of each projection behind its column 0."""
    variant: tl.constexpr = variant_of(plain_variant)
    COUNT: tl.constexpr = variant.projections
    n_rows = tl.cdiv(M, variant.tile.block_m)
    ticket = claim(workspace_ptr)
    row, column, _, _ = locate(ticket, n_rows, n_columns, 0, 0, wave, variant.tile.group_m, COUNT)
    projections = Projections(
        acts=None,
        weights=Matrix(weights, strides_wn),
        lora_as=Matrix(lora_as, strides_ar),
        lora_bs=Matrix(lora_bs, strides_bn),
        N=N,
        R=R,
        scales=BranchScales(scale_s, in_s, on_branch),
        dropout=dropout,
    )
    projection_tile(
        projections, Matrix(x_ptr, stride_xm), bias_ptrs, bias_sizes, y_ptrs, s_ptrs, workspace_ptr + N_COUNTERS, row,
        column, columns, n_rows, M, K, variant,
    )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)


@triton.jit(do_not_specialize=UNSPECIALISED)
def projections_backward_kernel(
    dy_ptrs, weights, lora_bs, x_ptr, lora_as, s_ptrs, dx_ptr, ds_ptr, da_ptrs, db_ptrs, dbias_ptrs,
    partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr, M, K, N, R, tiles_a, tiles_b, tiles_bias, n_words,
    wave, n_columns, gradients_last, strides_dym, stride_xm, strides_wn, strides_ar, strides_bn, scaling, on_branch,
    dropout, plain_variant: tl.constexpr,
):  # fmt: skip
    """dX = Σ_i dY_i·W_i + mask_i∘(dS_i·A_i)/(1-p_i); of each projection dS_i = scaling_i·dY_i·B_i,
    dA_i = dS_iᵀ·drop_i(X), dB_i = on_branch_i·dY_iᵀ·S_i, dbias_i = Σ_m dY_i.

    Pointers as in kernels.lora_backward_kernel, tuples of them or None; ``tiles_a``, ``tiles_b``, ``tiles_bias``: the
    gradient tiles of each projection in a row group, 0 where it is not wanted. dS, and partial sums of all projections
    lie one behind the other. dbias has tiles of its own, for it may be another projection's than dB.
    """
    variant: tl.constexpr = variant_of(plain_variant)
    COUNT: tl.constexpr = variant.projections
    AHEAD: tl.constexpr = 1 if variant.fused else COUNT
    n_rows = tl.cdiv(M, variant.tile.block_m)
    n_chunks = count_chunks(n_rows, variant)
    n_a, n_b, n_bias = sum_before(tiles_a, COUNT), sum_before(tiles_b, COUNT), sum_before(tiles_bias, COUNT)
    flags_ptr = workspace_ptr + N_COUNTERS
    counts_ptr = flags_ptr + COUNT * n_rows
    projections = Projections(
        acts=Matrix(dy_ptrs, strides_dym),
        weights=Matrix(weights, strides_wn),
        lora_as=Matrix(lora_as, strides_ar),
        lora_bs=Matrix(lora_bs, strides_bn),
        N=N,
        R=R,
        scales=BranchScales(scaling, None, None),
        dropout=dropout,
    )
    none = Gradient(None, None, 1, 1)
    ticket = claim(workspace_ptr)
    row, column, group, gradient = locate(
        ticket, n_rows, n_columns, n_b + n_a + n_bias, gradients_last, wave, variant.tile.group_m, AHEAD
    )
    chunk = row_chunk(group, n_chunks, M, variant)
    if gradient < 0:
        if ds_ptr is not None:
            dx_tile(projections, dx_ptr, ds_ptr, flags_ptr, tiles_a, row, column, n_columns, n_rows, M, K, variant)
    elif gradient < n_b:
        if db_ptrs is not None:
            index, tile = find(gradient, tiles_b)
            n, r = pick(N, index), pick(R, index)
            first = elements_before(N, R, index)
            sums_b = RowSum(
                left=pick_matrix(projections.acts, index),
                right=Matrix(pick(s_ptrs, index), r),
                product=Gradient(partial_b_ptr + first, pick(db_ptrs, index), r, 1),
                column_sum=none,
                scale=pick(on_branch, index),
                N=n,
                R=r,
            )
            gradient_tile(sums_b, counts_ptr + gradient - tile, tile, chunk, Dropout(0, 0, 1.0, 0), False, variant)
    elif gradient < n_b + n_a:
        if da_ptrs is not None:
            index, tile = find(gradient - n_b, tiles_a)
            r = pick(R, index)
            for m in range(group * variant.tile.group_m, tl.minimum((group + 1) * variant.tile.group_m, n_rows)):
                wait_for(flags_ptr + index * n_rows + m, 1)
            dropped = dropout_of_projection(projections, index)
            before = tl.cast(sum_before(R, index), tl.int64)
            sums_a = RowSum(
                left=Matrix(x_ptr, stride_xm),
                right=Matrix(ds_ptr + before * M, r),
                product=Gradient(partial_a_ptr + before * K, pick(da_ptrs, index), 1, K),
                column_sum=none,
                scale=dropped.inverse_keep,
                N=K,
                R=r,
            )
            gradient_tile(sums_a, counts_ptr + gradient - tile, tile, chunk, dropped, variant.dropout, variant)
    else:
        if dbias_ptrs is not None:
            index, tile = find(gradient - n_b - n_a, tiles_bias)
            sums_bias = RowSum(
                left=pick_matrix(projections.acts, index),
                right=Matrix(None, 1),
                product=none,
                column_sum=Gradient(partial_bias_ptr + sum_before(N, index), pick(dbias_ptrs, index), 1, 1),
                scale=1.0,
                N=pick(N, index),
                R=1,
            )
            gradient_tile(sums_bias, counts_ptr + gradient - tile, tile, chunk, Dropout(0, 0, 1.0, 0), False, variant)
    reset_if_last(workspace_ptr, n_words, 1024)
