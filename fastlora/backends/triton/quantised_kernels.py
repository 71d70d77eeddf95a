"""The two kernels over a packed base weight: those of kernels.py behind tiles that decode it."""

import triton
import triton.language as tl

from fastlora.backends.triton.kernels import UNSPECIALISED, backward_tile, forward_tile
from fastlora.backends.triton.packed_weight import PackedWeight, decode_part
from fastlora.backends.triton.schedule import claim, publish, reset_if_last
from fastlora.backends.triton.structs import ColumnScale, DecodedWeight
from fastlora.backends.triton.variant import variant_of

# Arguments beyond those of the dense kernels whose values are compiled for no more than theirs.
_COUNTS = ("n_panels", "parts")


@triton.jit(do_not_specialize=(*UNSPECIALISED, *_COUNTS))
def quantised_forward_kernel(
    x, scratch_ptr, lora_a, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, n_words, wave,
    stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold,
    codes_ptr, scales_ptr, zeros_ptr, absmax2_ptr, code2_ptr, offset_ptr, block, n_panels, parts,
    plain_variant: tl.constexpr,
):  # fmt: skip
    """kernels.lora_forward_kernel with W0 = scratch_ptr [N, K], which the first n_panels·parts tickets decode. A panel
    is the rows of a column block of Y; each of its parts adds one to its word, the last ones of the workspace. Where
    products decode the weight themselves (PackedFormat.in_loop), there are no such tickets."""
    variant: tl.constexpr = variant_of(plain_variant)
    packed = PackedWeight(codes_ptr, scales_ptr, zeros_ptr, absmax2_ptr, code2_ptr, offset_ptr, block)
    panels_ptr = workspace_ptr + n_words - n_panels
    ticket = claim(workspace_ptr)
    decoding = n_panels * parts
    if variant.packed.in_loop:
        forward_tile(
            ticket, x, packed, lora_a, lora_b_ptr, bias_ptr, y_ptr, s_ptr, workspace_ptr, M, N, K, R, wave, stride_xm,
            stride_wn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold,
            ColumnScale(None, None, None), variant,
        )  # fmt: skip
    elif ticket < decoding:
        panel = ticket // parts
        first_row = panel * variant.tile.block_n
        rows = tl.minimum(variant.tile.block_n, N - first_row)
        decode_tile(packed, scratch_ptr, first_row, rows, K, ticket % parts, variant)
        publish(panels_ptr + panel)
    else:
        forward_tile(
            ticket - decoding, x, DecodedWeight(scratch_ptr, panels_ptr, parts), lora_a, lora_b_ptr, bias_ptr, y_ptr,
            s_ptr, workspace_ptr, M, N, K, R, wave, stride_xm, stride_wn, stride_ar, stride_bn, scale_s, in_s,
            on_branch, seed_ptr, seed, threshold, ColumnScale(None, None, None), variant,
        )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)


@triton.jit(do_not_specialize=(*UNSPECIALISED, *_COUNTS))
def quantised_backward_kernel(
    dy, scratch_ptr, lora_b, dy_ptr, x_ptr, lora_a_ptr, s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr,
    partial_a_ptr, partial_b_ptr, partial_bias_ptr, workspace_ptr, M, N, K, R, n_words, wave, n_columns,
    gradients_last, stride_dym, stride_xm, stride_wn, stride_ar, stride_bn, scaling, on_branch, inverse_keep, seed_ptr,
    seed, threshold,
    codes_ptr, scales_ptr, zeros_ptr, absmax2_ptr, code2_ptr, offset_ptr, block, n_panels, parts,
    plain_variant: tl.constexpr,
):  # fmt: skip
    """kernels.lora_backward_kernel, likewise. Every tile of dX reads all rows of W0: they are one panel. Without dX
    there is none, and scratch_ptr is not read."""
    variant: tl.constexpr = variant_of(plain_variant)
    panels_ptr = workspace_ptr + n_words - n_panels
    ticket = claim(workspace_ptr)
    decoding = n_panels * parts
    if ticket < decoding:
        packed = PackedWeight(codes_ptr, scales_ptr, zeros_ptr, absmax2_ptr, code2_ptr, offset_ptr, block)
        decode_tile(packed, scratch_ptr, 0, N, K, ticket, variant)
        publish(panels_ptr)
    else:
        backward_tile(
            ticket - decoding, dy, DecodedWeight(scratch_ptr, panels_ptr, parts), lora_b, dy_ptr, x_ptr, lora_a_ptr,
            s_ptr, dx_ptr, ds_ptr, da_ptr, db_ptr, dbias_ptr, partial_a_ptr, partial_b_ptr, partial_bias_ptr,
            workspace_ptr, M, N, K, R, wave, n_columns, gradients_last, stride_dym, stride_xm, stride_wn, stride_ar,
            stride_bn, scaling, on_branch, inverse_keep, seed_ptr, seed, threshold, variant,
        )  # fmt: skip
    reset_if_last(workspace_ptr, n_words, 1024)


@triton.jit
def decode_tile(packed, scratch_ptr, first_row, rows, K, part, variant: tl.constexpr):
    """Part ``part`` of a panel of the weight: of ``rows`` rows of K elements from first_row, a multiple of eight, on.
    Behind the end of a panel that is shorter than others there are parts without an element."""
    PART: tl.constexpr = variant.packed.part
    first = tl.cast(first_row, tl.int64) * K
    done = part.to(tl.int64) * PART
    left = tl.maximum(tl.minimum(tl.cast(rows, tl.int64) * K - done, PART), 0).to(tl.int32)
    decode_part(packed, scratch_ptr, first + done, left, variant)
