"""The two kernels: a whole LoRA layer forward, and its whole backward."""

import triton
import triton.language as tl

from fastlora.backends.triton.column_scale import await_rows
from fastlora.backends.triton.gradients import gradient_tile
from fastlora.backends.triton.memory import dropout_of
from fastlora.backends.triton.row_map import count_chunks, row_chunk
from fastlora.backends.triton.schedule import N_COUNTERS, claim, locate, reset_if_last, wait_for
from fastlora.backends.triton.structs import BranchScales, ColumnScale, Gradient, Matrix, Product, RowSum, Shape
from fastlora.backends.triton.tiles import product_tile
from fastlora.backends.triton.variant import variant_of

# Arguments whose values Triton must not compile for: every sixteenth seed, and each kind of sequence length, would
# bring a compilation into training. The machine code is the same without: no address is a multiple of theirs.
UNSPECIALISED = ("M", "n_words", "wave", "n_columns", "gradients_last", "seed_ptr", "seed", "threshold")


@triton.jit(do_not_specialize=UNSPECIALISED)
def lora_forward_kernel(
    x, weight, lora_a, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, n_words, wave,
    stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold,
    plain_variant: tl.constexpr,
):  # fmt: skip
    """Y = X·W0ᵀ + on_branch·S·Bᵀ + bias and S = scale_s·in_s·drop(X)·Aᵀ; the two are None where they are 1."""
    forward_tile(
        None, x, weight, lora_a, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, wave,
        stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold,
        ColumnScale(None, None, None), variant_of(plain_variant),
    )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)


@triton.jit
def forward_tile(
    ticket, x, weight, lora_a, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, wave,
    stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold, column_scale,
    variant: tl.constexpr,
):  # fmt: skip
    """What a ticket of the forward's queue stands for; of the next one, where it is None."""
    n_rows = tl.cdiv(M, variant.tile.block_m)
    n_columns = tl.cdiv(N, variant.tile.block_n) + variant.shrink_columns
    dropout = dropout_of(seed_ptr, seed, threshold, 1.0)
    claimed = claim(workspace_ptr) if ticket is None else ticket
    row, column, _, _ = locate(claimed, n_rows, n_columns, 0, 0, wave, variant.tile.group_m)
    product = Product(
        act=Matrix(x, stride_xm),
        weight=Matrix(weight, stride_wn),
        down=Matrix(lora_a, stride_ar),
        up=Matrix(lora_b_ptr, stride_bn),
        bias_ptr=bias_ptr,
        bias_size=N,
        out=Matrix(y_ptr, N),
        s=Matrix(s_ptr, R),
        column_scale=column_scale,
    )
    scales = BranchScales(scale_s, in_s, on_branch)
    product_tile(product, workspace_ptr + N_COUNTERS, row, column, Shape(M, N, K, R), scales, dropout, variant)


@triton.jit(do_not_specialize=UNSPECIALISED)
def lora_backward_kernel(
    dy, weight, lora_b, dy_ptr, x_ptr, lora_a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr,
    partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr, M, N, K, R, n_words, wave, n_columns,
    gradients_last, stride_dym, stride_xm, stride_wn, stride_ar, stride_bn, scaling, on_branch, inverse_keep, seed_ptr,
    seed, threshold, plain_variant: tl.constexpr,
):  # fmt: skip
    """dX = dY·W0 + mask∘(dS·A)/(1-p), dS = scaling·dY·B, dA = dSᵀ·drop(X), dB = on_branch·dYᵀ·S, dbias = Σ_m dY.

    A gradient whose pointer is None is not wanted, and no tile is queued for it. Without dX the queue has one of its
    ``n_columns`` (dS alone is made), or none; then dx_ptr may be null. Partial sums are read and written where there is
    more than one row chunk; else their pointers may be null. dX contracts N: variant.tile.block_k runs along N and
    block_n along K. dY comes as operand of dX (perhaps a TMA descriptor) and as a pointer.
    """
    backward_tile(
        None, dy, weight, lora_b, dy_ptr, x_ptr, lora_a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr,
        partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr, M, N, K, R, wave, n_columns,
        gradients_last, stride_dym, stride_xm, stride_wn, stride_ar, stride_bn, scaling, on_branch, inverse_keep,
        seed_ptr, seed, threshold, variant_of(plain_variant),
    )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)


@triton.jit
def backward_tile(
    ticket, dy, weight, lora_b, dy_ptr, x_ptr, lora_a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr,
    partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr, M, N, K, R, wave, n_columns,
    gradients_last, stride_dym, stride_xm, stride_wn, stride_ar, stride_bn, scaling, on_branch, inverse_keep,
    seed_ptr, seed, threshold, variant: tl.constexpr,
):  # fmt: skip
    """What a ticket of the backward's queue stands for; of the next one, where it is None."""
    n_rows = tl.cdiv(M, variant.tile.block_m)
    tiles_b = 0
    if db_ptr is not None or dbias_ptr is not None:
        tiles_b = tl.cdiv(N, variant.tile.gradient_n)
    tiles_a = 0
    if da_ptr is not None:
        tiles_a = tl.cdiv(K, variant.tile.gradient_n)
    n_chunks = count_chunks(n_rows, variant)
    flags_ptr = workspace_ptr + N_COUNTERS
    counts_b_ptr = flags_ptr + n_rows
    counts_a_ptr = counts_b_ptr + tiles_b
    dropout = dropout_of(seed_ptr, seed, threshold, inverse_keep)
    scale_b = 1.0
    if on_branch is not None:
        scale_b = on_branch
    claimed = claim(workspace_ptr) if ticket is None else ticket
    row, column, group, gradient = locate(
        claimed, n_rows, n_columns, tiles_b + tiles_a, gradients_last, wave, variant.tile.group_m
    )
    chunk = row_chunk(group, n_chunks, M, variant)
    if gradient < 0:
        if ds_ptr is not None:
            product = Product(
                act=Matrix(dy, stride_dym),
                weight=Matrix(weight, stride_wn),
                down=Matrix(lora_b, stride_bn),
                up=Matrix(lora_a_ptr, stride_ar),
                bias_ptr=None,
                bias_size=0,
                out=Matrix(dx_ptr, K),
                s=Matrix(ds_ptr, R),
                column_scale=ColumnScale(None, None, None),
            )
            scales = BranchScales(scaling, None, None)
            product_tile(product, flags_ptr, row, column, Shape(M, K, N, R), scales, dropout, variant)
    elif gradient < tiles_b:
        if db_ptr is not None or dbias_ptr is not None:
            await_rows(dy, group, variant)
            sums_b = RowSum(
                left=Matrix(dy_ptr, stride_dym),
                right=Matrix(s_ptr, R),
                product=Gradient(partial_b_ptr, db_ptr, R, 1),
                column_sum=Gradient(partial_bias_ptr, dbias_ptr, 1, 1),
                scale=scale_b,
                N=N,
                R=R,
            )
            gradient_tile(sums_b, counts_b_ptr, gradient, chunk, dropout, False, variant)
    else:
        if da_ptr is not None:
            for m in range(group * variant.tile.group_m, tl.minimum((group + 1) * variant.tile.group_m, n_rows)):
                wait_for(flags_ptr + m, 1)
            sums_a = RowSum(
                left=Matrix(x_ptr, stride_xm),
                right=Matrix(ds_ptr, R),
                product=Gradient(partial_a_ptr, da_ptr, 1, K),
                column_sum=Gradient(None, None, 1, 1),
                scale=inverse_keep,
                N=K,
                R=R,
            )
            gradient_tile(sums_a, counts_a_ptr, gradient - tiles_b, chunk, dropout, variant.dropout, variant)
