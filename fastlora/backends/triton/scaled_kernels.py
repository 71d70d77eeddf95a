"""The two kernels of a DoRA layer: those of kernels.py with Y's columns scaled, and dY's."""

import triton
import triton.language as tl

from fastlora.backends.triton.column_scale import scale_tile
from fastlora.backends.triton.kernels import UNSPECIALISED, backward_tile, forward_tile
from fastlora.backends.triton.row_map import count_chunks, row_chunk
from fastlora.backends.triton.schedule import claim, reset_if_last
from fastlora.backends.triton.structs import ColumnScale, Gradient, Matrix, ScaledRows
from fastlora.backends.triton.variant import variant_of


@triton.jit(do_not_specialize=UNSPECIALISED)
def scaled_forward_kernel(
    x, weight, lora_a, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, n_words, wave,
    stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold,
    magnitude_ptr, norm_ptr, unscaled_ptr, plain_variant: tl.constexpr,
):  # fmt: skip
    """kernels.lora_forward_kernel with Y = magnitude/norm∘Z + bias of Z = X·W0ᵀ + on_branch·S·Bᵀ, which is kept where
    ``unscaled_ptr`` is not None."""
    forward_tile(
        None, x, weight, lora_a, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, wave,
        stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold,
        ColumnScale(magnitude_ptr, norm_ptr, unscaled_ptr), variant_of(plain_variant),
    )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)


@triton.jit(do_not_specialize=UNSPECIALISED)
def scaled_backward_kernel(
    dy_ptr, weight, lora_b, scaled_ptr, x_ptr, lora_a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr,
    partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr, M, N, K, R, n_words, wave, n_columns,
    gradients_last, stride_dym, stride_xm, stride_wn, stride_ar, stride_bn, scaling, on_branch, inverse_keep, seed_ptr,
    seed, threshold, magnitude_ptr, norm_ptr, unscaled_ptr, dm_ptr, partial_m_ptr, plain_variant: tl.constexpr,
):  # fmt: skip
    """kernels.lora_backward_kernel with dY = ``scaled_ptr`` [M, N], which the first tickets make of the given one; they
    make dbias = Σ_m dY and dm = Σ_m dY∘Z / norm besides. Without ``scaled_ptr`` these two are all that is wanted. The
    workspace's last words are a flag a row group and a count a column block."""
    variant: tl.constexpr = variant_of(plain_variant)
    n_groups = count_chunks(tl.cdiv(M, variant.tile.block_m), variant)
    parts = tl.cdiv(N, variant.tile.gradient_n)
    flags_ptr = workspace_ptr + n_words - n_groups - parts
    ticket = claim(workspace_ptr)
    scaling_tiles = n_groups * parts
    if ticket < scaling_tiles:
        scale_tile(
            Matrix(dy_ptr, stride_dym), ColumnScale(magnitude_ptr, norm_ptr, unscaled_ptr), scaled_ptr, flags_ptr,
            flags_ptr + n_groups, ticket % parts, row_chunk(ticket // parts, n_groups, M, variant),
            Gradient(partial_m_ptr, dm_ptr, 1, 1), Gradient(partial_bias_ptr, dbias_ptr, 1, 1), N, variant,
        )  # fmt: skip
    elif scaled_ptr is not None:
        backward_tile(
            ticket - scaling_tiles, ScaledRows(scaled_ptr, flags_ptr, parts), weight, lora_b, scaled_ptr, x_ptr,
            lora_a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, None, partial_a_ptr, partial_b_ptr, None, workspace_ptr,
            M, N, K, R, wave, n_columns, gradients_last, N, stride_xm, stride_wn, stride_ar, stride_bn, scaling,
            on_branch, inverse_keep, seed_ptr, seed, threshold, variant,
        )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)
