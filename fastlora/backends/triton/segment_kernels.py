"""The two kernels of a LoRA layer on rows in segments: its forward, and its whole backward."""

import triton
import triton.language as tl

from fastlora.backends.triton.memory import dropout_of
from fastlora.backends.triton.row_map import count_chunks
from fastlora.backends.triton.schedule import N_COUNTERS, claim, locate, reset_if_last
from fastlora.backends.triton.segments import OWNERS, count_blocks, segment_gradients, segment_tile, zero_tile
from fastlora.backends.triton.structs import (
    BranchScales,
    ColumnScale,
    Gradient,
    Matrix,
    Owners,
    Product,
    RowSum,
    Segments,
    Shape,
)
from fastlora.backends.triton.variant import variant_of

# As for the kernels of one adapter; and whatever the segments' number and place in memory, one kernel serves.
UNSPECIALISED = (
    "M", "n_words", "wave", "n_columns", "gradients_last", "seed_ptr", "seed", "threshold",
    "ends_ptr", "experts_ptr", "adapters_ptr", "biases_ptr", "scalings_ptr",
    "n_segments", "n_weights", "n_adapters", "n_biases", "n_flags",
)  # fmt: skip


@triton.jit(do_not_specialize=UNSPECIALISED)
def segments_forward_kernel(
    x_ptr, weight_ptr, lora_a_ptr, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr,
    ends_ptr, experts_ptr, adapters_ptr, biases_ptr, scalings_ptr, M, N, K, R, n_segments, n_weights, n_adapters,
    n_biases, n_words, wave, stride_xm, stride_wn, stride_we, scale_s, in_s, on_branch, seed_ptr, seed, threshold,
    plain_variant: tl.constexpr,
):  # fmt: skip
    """Y = X·W0ᵀ + on_branch·S·Bᵀ + bias and S = scale_s·in_s·drop(X)·Aᵀ, of the weight, adapter and bias of each row's
    segment; zeros in Y past the last end. S of rows without an adapter is left as it was.

    With ``scalings_ptr`` each adapter's own scaling takes the place of in_s and on_branch; in float16 in_s then says
    that it is to be split.
    """
    variant: tl.constexpr = variant_of(plain_variant)
    experts, adapters = Owners(experts_ptr, n_weights), Owners(adapters_ptr, n_adapters)
    segments = Segments(ends_ptr, experts, adapters, Owners(biases_ptr, n_biases), n_segments, M)
    n_rows = count_blocks(segments, variant)
    n_columns = tl.cdiv(N, variant.tile.block_n) + variant.shrink_columns
    dropout = dropout_of(seed_ptr, seed, threshold, 1.0)
    ticket = claim(workspace_ptr)
    if ticket < n_rows * n_columns:  # the grid is as large as it may have to be
        row, column, _, _ = locate(ticket, n_rows, n_columns, 0, 0, wave, variant.tile.group_m)
        product = Product(
            act=Matrix(x_ptr, stride_xm),
            weight=Matrix(weight_ptr, stride_wn),
            down=Matrix(lora_a_ptr, K),
            up=Matrix(lora_b_ptr, R),
            bias_ptr=bias_ptr,
            bias_size=N,
            out=Matrix(y_ptr, N),
            s=Matrix(s_ptr, R),
            column_scale=ColumnScale(None, None, None),
        )
        scales, flags_ptr = BranchScales(scale_s, in_s, on_branch), workspace_ptr + N_COUNTERS
        segment_tile(
            product, stride_we, flags_ptr, row, column, Shape(M, N, K, R), scales, scalings_ptr, dropout, segments,
            variant,
        )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)


@triton.jit(do_not_specialize=UNSPECIALISED)
def segments_backward_kernel(
    dy_ptr, weight_ptr, lora_b_ptr, x_ptr, lora_a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr,
    partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr,
    ends_ptr, experts_ptr, adapters_ptr, biases_ptr, scalings_ptr, M, N, K, R, n_segments, n_weights, n_adapters,
    n_biases, n_words, wave, n_columns, gradients_last, n_flags, stride_dym, stride_xm, stride_wn, stride_we,
    scaling, on_branch, inverse_keep, seed_ptr, seed, threshold, plain_variant: tl.constexpr,
):  # fmt: skip
    """dX = dY·W0 + mask∘(dS·A)/(1-p), dS = scaling·dY·B, of the weight and adapter of each row's segment; of each
    adapter dA = dSᵀ·drop(X) and dB = on_branch·dYᵀ·S over its rows, of each bias dbias = Σ_m dY over its own. Zeros in
    dX past the last end, and in the gradients of what has no rows.

    Pointers as in kernels.lora_backward_kernel; workspace_ptr has ``n_flags`` flags. dbias has tiles of its own, since
    a bias is a segment's by other numbers than an adapter.
    """
    variant: tl.constexpr = variant_of(plain_variant)
    experts, adapters = Owners(experts_ptr, n_weights), Owners(adapters_ptr, n_adapters)
    biases = Owners(biases_ptr, n_biases)
    segments = Segments(ends_ptr, experts, adapters, biases, n_segments, M)
    n_rows = count_blocks(segments, variant)
    tiles_b, tiles_a, tiles_bias = 0, 0, 0
    if db_ptr is not None:
        tiles_b = tl.cdiv(N, variant.tile.gradient_n)
    if da_ptr is not None:
        tiles_a = tl.cdiv(K, variant.tile.gradient_n)
    if dbias_ptr is not None:
        tiles_bias = tl.cdiv(N, variant.tile.gradient_n)
    n_gradients = tiles_b + tiles_a + tiles_bias
    flags_ptr = workspace_ptr + N_COUNTERS
    counts_b_ptr = flags_ptr + n_flags
    counts_a_ptr = counts_b_ptr + n_adapters * tiles_b
    counts_bias_ptr = counts_a_ptr + n_adapters * tiles_a
    dropout = dropout_of(seed_ptr, seed, threshold, inverse_keep)
    scale_b, scalings_b_ptr = 1.0, None
    if on_branch is not None:
        scale_b = on_branch
    if scalings_ptr is not None and dy_ptr.dtype.element_ty == tl.float16:
        scalings_b_ptr = scalings_ptr
    none = Gradient(None, None, 1, 1)
    sums_b = RowSum(
        Matrix(dy_ptr, stride_dym), Matrix(s_ptr, R), Gradient(partial_b_ptr, db_ptr, R, 1), none, scale_b, N, R
    )
    sums_a = RowSum(
        Matrix(x_ptr, stride_xm), Matrix(ds_ptr, R), Gradient(partial_a_ptr, da_ptr, 1, K), none, inverse_keep, K, R
    )
    column_sum = Gradient(partial_bias_ptr, dbias_ptr, 1, 1)
    sums_bias = RowSum(Matrix(dy_ptr, stride_dym), Matrix(None, R), none, column_sum, 1.0, N, R)
    n_queued = n_rows * n_columns + count_chunks(n_rows, variant) * n_gradients
    ticket = claim(workspace_ptr)
    if ticket < n_queued:
        row, column, group, gradient = locate(
            ticket, n_rows, n_columns, n_gradients, gradients_last, wave, variant.tile.group_m
        )
        if gradient < 0:
            if ds_ptr is not None:
                product = Product(
                    act=Matrix(dy_ptr, stride_dym),
                    weight=Matrix(weight_ptr, stride_wn),
                    down=Matrix(lora_b_ptr, R),
                    up=Matrix(lora_a_ptr, K),
                    bias_ptr=None,
                    bias_size=0,
                    out=Matrix(dx_ptr, K),
                    s=Matrix(ds_ptr, R),
                    column_scale=ColumnScale(None, None, None),
                )
                scales, shape = BranchScales(scaling, None, None), Shape(M, K, N, R)
                segment_tile(
                    product, stride_we, flags_ptr, row, column, shape, scales, scalings_ptr, dropout, segments, variant
                )
        elif gradient < tiles_b:
            if db_ptr is not None:
                segment_gradients(
                    sums_b, adapters, scalings_b_ptr, counts_b_ptr, flags_ptr, gradient, tiles_b, group, n_rows,
                    dropout, segments, -1, False, False, variant,
                )  # fmt: skip
        elif gradient < tiles_b + tiles_a:
            if da_ptr is not None:
                segment_gradients(
                    sums_a, adapters, None, counts_a_ptr, flags_ptr, gradient - tiles_b, tiles_a, group, n_rows,
                    dropout, segments, -1, True, variant.dropout, variant,
                )  # fmt: skip
        else:
            if dbias_ptr is not None:
                segment_gradients(
                    sums_bias, biases, None, counts_bias_ptr, flags_ptr, gradient - tiles_b - tiles_a, tiles_bias,
                    group, n_rows, dropout, segments, 0, False, False, variant,
                )  # fmt: skip
    else:
        # Behind the queue: what no row adds anything to, OWNERS gradients at a time, and tickets too many.
        tile, zeroed = ticket - n_queued, 0
        if db_ptr is not None or da_ptr is not None:
            tiles_ab = tiles_b + tiles_a
            zeroed = tl.cdiv(n_adapters, OWNERS) * tiles_ab
            if tile < zeroed:
                first_adapter, of_adapter = tile // tiles_ab * OWNERS, tile % tiles_ab
                if of_adapter < tiles_b:
                    if db_ptr is not None:
                        zero_tile(sums_b, adapters, of_adapter, first_adapter, segments, -1, variant)
                else:
                    if da_ptr is not None:
                        zero_tile(sums_a, adapters, of_adapter - tiles_b, first_adapter, segments, -1, variant)
        if dbias_ptr is not None:  # noqa: SIM102  # by the compiler; the next one by the program
            if tile >= zeroed:
                of_bias = tile - zeroed
                zero_tile(sums_bias, biases, of_bias % tiles_bias, of_bias // tiles_bias * OWNERS, segments, 0, variant)
    reset_if_last(workspace_ptr, n_words, 1024)
