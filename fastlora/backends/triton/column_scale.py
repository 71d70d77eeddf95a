"""Policy: the column scale of DoRA. Factors of Y's columns; dY scaled by them, with the gradients that this makes."""

import triton
import triton.language as tl

from fastlora.backends.triton.memory import load_block
from fastlora.backends.triton.schedule import publish, wait_for


@triton.jit
def column_factors(column_scale, offs_n, N):
    """magnitude / norm of columns offs_n in fp32, rounded as torch does; 1 behind the last."""
    mask = offs_n < N
    magnitude = tl.load(column_scale.magnitude_ptr + offs_n, mask=mask, other=1.0).to(tl.float32)
    return tl.div_rn(magnitude, tl.load(column_scale.norm_ptr + offs_n, mask=mask, other=1.0))


@triton.jit
def await_rows(act, group, variant: tl.constexpr):
    """Until the rows of a row group may be loaded, where other tiles scale them (structs.ScaledRows)."""
    if variant.scaled:
        wait_for(act.flags_ptr + group, act.parts)


@triton.jit
def scale_tile(dy, column_scale, scaled_ptr, flags_ptr, counts_ptr, column, chunk, dm, dbias, N, variant: tl.constexpr):
    """Column block ``column`` of the rows of one chunk: dY scaled and rounded once, where products read it
    (``scaled_ptr``, rows of N elements); dm = Σ_m dY∘Y_unscaled / norm and dbias = Σ_m dY (structs.Gradient).

    It is a pass of its own because with an operand that was scaled in registers ptxas waits for every single wgmma of
    the kernel (C7515), and dX's tiles would scale each row once a column block. dm and dbias are its by-product, for dY
    is here; they are summed by the serial reduction of gradients.gradient_tile.
    """
    BLOCK_M: tl.constexpr = variant.tile.gradient_m
    BLOCK_N: tl.constexpr = variant.tile.gradient_n
    offs_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    factors = column_factors(column_scale, offs_n, N)[None, :]
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    rows = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in tl.range(chunk.first_row, chunk.end_row, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        block = load_block(dy, offs_m, offs_n, chunk.end_row, N, False, False).to(tl.float32)
        offs = offs_m[:, None].to(tl.int64) * N + offs_n[None, :]
        mask = (offs_m < chunk.end_row)[:, None] & mask_n[None, :]
        if scaled_ptr is not None:
            tl.store(scaled_ptr + offs, (block * factors).to(scaled_ptr.dtype.element_ty), mask=mask)
        if dm.ptr is not None:
            products += block * tl.load(column_scale.unscaled_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if dbias.ptr is not None:
            rows += block
    if scaled_ptr is not None:
        publish(flags_ptr + chunk.index)
    if dm.ptr is not None or dbias.ptr is not None:
        sum_m, sum_bias = tl.sum(products, axis=0), tl.sum(rows, axis=0)
        if chunk.index > 0:
            wait_for(counts_ptr + column, chunk.index)
            if dm.ptr is not None:
                sum_m += tl.load(dm.partial_ptr + offs_n, mask=mask_n, other=0.0)
            if dbias.ptr is not None:
                sum_bias += tl.load(dbias.partial_ptr + offs_n, mask=mask_n, other=0.0)
            # A value that several threads hold is loaded by each and stored by one, not ahead of the others.
            tl.debug_barrier()
        if chunk.index < chunk.count - 1:
            if dm.ptr is not None:
                tl.store(dm.partial_ptr + offs_n, sum_m, mask=mask_n)
            if dbias.ptr is not None:
                tl.store(dbias.partial_ptr + offs_n, sum_bias, mask=mask_n)
            publish(counts_ptr + column)
        else:
            if dm.ptr is not None:
                norm = tl.load(column_scale.norm_ptr + offs_n, mask=mask_n, other=1.0)
                tl.store(dm.ptr + offs_n, tl.div_rn(sum_m, norm).to(dm.ptr.dtype.element_ty), mask=mask_n)
            if dbias.ptr is not None:
                tl.store(dbias.ptr + offs_n, sum_bias.to(dbias.ptr.dtype.element_ty), mask=mask_n)
