"""Rows in segments: from a row block to its segment, whose rows are then a product of their own; from a row group to
the steps of its adapters' sums.

Where segments end is known on the device alone. Each holds its own row blocks, numbered over all segments, so that the
queue, the flags and the tiles are those of one product; the rows past the last end are a segment more, whose tiles
store zeros. Ends that decrease or pass M are taken for the largest before them, or for M: nothing outside of the
operands is touched, whatever they say. Every program reads all ends, block_g at a time.

The assertions are compiled where Triton debugs (TRITON_DEBUG=1): what else is clamped, or NaN, then ends the launch.
"""

import triton
import triton.language as tl

from fastlora.backends.triton.gradients import gradient_tile
from fastlora.backends.triton.schedule import wait_for
from fastlora.backends.triton.structs import (
    BranchScales,
    Dropout,
    Gradient,
    Matrix,
    Product,
    RowChunk,
    RowSum,
    Segment,
    Shape,
)
from fastlora.backends.triton.tiles import product_tile

OWNERS = tl.constexpr(16)  # gradients without a row that one tile zeroes


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _bounds(segments, first, before, variant: tl.constexpr):
    """First rows and ends of block_g segments from number ``first`` on, the one in front of which ends at ``before``.
    What is behind all of them has no rows."""
    g = first + tl.arange(0, variant.block_g)
    start = tl.load(segments.ends_ptr + g - 1, mask=(g > first) & (g <= segments.count), other=before)
    start = tl.where(g > segments.count, segments.M, tl.minimum(start, segments.M))
    start = tl.associative_scan(tl.maximum(start, before), 0, _larger)
    end = tl.load(segments.ends_ptr + g, mask=g < segments.count, other=segments.M)
    tl.device_assert((start <= end) & (end <= segments.M), "offsets decrease, begin below 0 or pass the rows of x")
    return start, tl.maximum(tl.minimum(end, segments.M), start)


@triton.jit
def count_blocks(segments, variant: tl.constexpr):
    """Row blocks of all segments."""
    total, before = 0, 0
    for first in range(0, segments.count + 1, variant.block_g):
        start, end = _bounds(segments, first, before, variant)
        total += tl.sum(tl.cdiv(end - start, variant.tile.block_m))
        before = tl.max(end)
    return total


@triton.jit
def segment_of(block, segments, variant: tl.constexpr):
    """The segment of a row block. All before it end in front of the block; those without rows are never found."""
    index, first_block, first_row, end_row = 0, 0, 0, segments.M
    total, before = 0, 0
    for first in range(0, segments.count + 1, variant.block_g):
        start, end = _bounds(segments, first, before, variant)
        n_blocks = tl.cdiv(end - start, variant.tile.block_m)
        passed = total + tl.cumsum(n_blocks, 0) <= block
        index += tl.sum(passed.to(tl.int32))
        first_block += tl.sum(tl.where(passed, n_blocks, 0))
        first_row = tl.maximum(first_row, tl.max(tl.where(passed, end, 0)))
        end_row = tl.minimum(end_row, tl.min(tl.where(passed, segments.M, end)))
        total += tl.sum(n_blocks)
        before = tl.max(end)
    return Segment(index, first_block, first_row, end_row)


@triton.jit
def _given(owners, g, n_segments):
    """What segments g have by ``owners``, unchecked; -1 behind the last segment."""
    if owners.ptr is None:
        return tl.where(g < n_segments, tl.minimum(g, owners.count - 1), -1)
    else:
        return tl.load(owners.ptr + g, mask=g < n_segments, other=-1)


@triton.jit
def _owner(owners, g, n_segments, LEAST: tl.constexpr):
    """The same, put where there is such a matrix: LEAST is -1 where a segment may have none, else 0."""
    found = _given(owners, g, n_segments)
    if owners.ptr is not None:
        found = tl.minimum(tl.maximum(found, LEAST), owners.count - 1).to(tl.int32)
    return tl.where(g < n_segments, found, -1)


@triton.jit
def segment_tile(
    product, weight_stride, flags_ptr, block, column, shape, scales, scalings_ptr, dropout, segments,
    variant: tl.constexpr,
):  # fmt: skip
    """tiles.product_tile for a row block of its segment, which is a product by itself: its rows, weight and adapter.
    ``product`` has whole stacks and all rows; ``weight_stride``: from one weight to the next.

    A rank of 0 stands for no adapter. Rows of a segment whose weight or adapter does not exist are NaN; on the CPU they
    are refused.
    """
    segment = segment_of(block, segments, variant)
    if segment.index < segments.count:
        expert = _owner(segments.experts, segment.index, segments.count, 0)
        adapter = _owner(segments.adapters, segment.index, segments.count, -1)
        bias = _owner(segments.biases, segment.index, segments.count, 0)
        if (adapter >= 0) | (column >= variant.shrink_columns):
            rank = tl.where(adapter >= 0, shape.R, 0)
            rows = Shape(segment.end_row - segment.first_row, shape.N, shape.K, rank)
            first_row, expert64, adapter64 = segment.first_row.to(tl.int64), expert.to(tl.int64), adapter.to(tl.int64)
            bias_ptr = None if product.bias_ptr is None else product.bias_ptr + bias.to(tl.int64) * shape.N
            # Adapter -1 points to what nobody reads.
            alone = Product(
                act=Matrix(product.act.data + first_row * product.act.stride, product.act.stride),
                weight=Matrix(product.weight.data + expert64 * weight_stride, product.weight.stride),
                down=Matrix(product.down.data + adapter64 * shape.K * shape.R, product.down.stride),
                up=Matrix(product.up.data + adapter64 * shape.N * shape.R, product.up.stride),
                bias_ptr=bias_ptr,
                bias_size=shape.N,
                out=Matrix(product.out.data + first_row * product.out.stride, product.out.stride),
                s=Matrix(product.s.data + first_row * product.s.stride, product.s.stride),
                column_scale=product.column_scale,
            )
            of_sum, in_s, on_branch = scales.of_sum, scales.in_s, scales.on_branch
            if scalings_ptr is not None:
                if in_s is None:
                    of_sum *= _scaling(adapter, scalings_ptr)
                else:
                    in_s, on_branch = _split_scaling(_scaling(adapter, scalings_ptr))
            dropped = Dropout(dropout.seed, dropout.threshold, dropout.inverse_keep, segment.first_row)
            product_tile(
                alone, flags_ptr + segment.first_block, block - segment.first_block, column, rows,
                BranchScales(of_sum, in_s, on_branch), dropped, variant,
            )  # fmt: skip
        exist = _given(segments.experts, segment.index, segments.count) == expert
        exist &= _given(segments.adapters, segment.index, segments.count) == adapter
        tl.device_assert(exist, "a segment's weight or adapter does not exist")
        if not exist:
            tl.debug_barrier()  # other threads may have stored what is written over
            _fill(product.out, float("nan"), block, column, shape, segment, variant)
    else:
        _fill(product.out, 0.0, block, column, shape, segment, variant)


@triton.jit
def _scaling(adapter, scalings_ptr):
    """Of one adapter; of none, 1."""
    return tl.load(scalings_ptr + adapter, mask=adapter >= 0, other=1.0).to(tl.float32)


@triton.jit
def _split_scaling(scaling):
    """fastlora.problem.split_scaling of a number on the device: (in_s, on_branch)."""
    bits = tl.abs(scaling).to(tl.int32, bitcast=True)
    # The next power of two: the exponent alone, and one more where anything stands behind it.
    power = ((bits + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    leaves = (bits > 0x3F800000) & (bits <= 0x7F000000)
    on_branch = tl.where(leaves, power, 1.0)
    return tl.div_rn(scaling, on_branch), on_branch


@triton.jit
def _fill(out, value, block, column, shape, segment, variant: tl.constexpr):
    """A value in the place of a tile of out; nothing in columns that hold no tile of it."""
    if out.data is not None:
        BLOCK_M: tl.constexpr = variant.tile.block_m
        BLOCK_N: tl.constexpr = variant.tile.block_n
        offs_m = segment.first_row + (block - segment.first_block) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = (column - variant.shrink_columns) * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (offs_m < segment.end_row)[:, None] & ((offs_n >= 0) & (offs_n < shape.N))[None, :]
        values = tl.full((BLOCK_M, BLOCK_N), value, out.data.dtype.element_ty)
        tl.store(out.data + offs_m[:, None].to(tl.int64) * out.stride + offs_n[None, :], values, mask=mask)


@triton.jit
def segment_gradients(
    sums, owners, scalings_ptr, counts_ptr, flags_ptr, tile, n_tiles, group, n_rows, dropout, segments,
    LEAST: tl.constexpr, WAITS: tl.constexpr, DROPOUT: tl.constexpr, variant: tl.constexpr,
):  # fmt: skip
    """gradients.gradient_tile for the rows of one row group: a step of its owner's sum for each segment that has rows
    in it.

    The steps of an owner are added up in their order in the queue. The one before is an earlier one of this very
    program, or was queued a row group earlier. WAITS: the right side is made by this launch.
    """
    block = group * variant.tile.group_m
    end_block = tl.minimum(block + variant.tile.group_m, n_rows)
    while block < end_block:
        segment = segment_of(block, segments, variant)
        n_blocks = tl.cdiv(segment.end_row - segment.first_row, variant.tile.block_m)
        next_block = tl.minimum(segment.first_block + n_blocks, end_block)
        owner = _owner(owners, segment.index, segments.count, LEAST)
        if owner >= 0:
            if WAITS:
                for each in range(block, next_block):
                    wait_for(flags_ptr + each, 1)
            index, count = _step(segment, group, owner, owners, segments, LEAST, variant)
            first_row = segment.first_row + (block - segment.first_block) * variant.tile.block_m
            end_row = segment.first_row + (next_block - segment.first_block) * variant.tile.block_m
            chunk = RowChunk(index, count, first_row, tl.minimum(end_row, segment.end_row))
            scale = sums.scale
            if scalings_ptr is not None:
                _, scale = _split_scaling(_scaling(owner, scalings_ptr))
            of_product, of_columns = owner.to(tl.int64) * sums.N * sums.R, owner.to(tl.int64) * sums.N
            product, column_sum = sums.product, sums.column_sum
            alone = RowSum(
                left=sums.left,
                right=sums.right,
                product=Gradient(
                    None if product.partial_ptr is None else product.partial_ptr + of_product,
                    None if product.ptr is None else product.ptr + of_product,
                    product.stride_n,
                    product.stride_r,
                ),
                column_sum=Gradient(
                    None if column_sum.partial_ptr is None else column_sum.partial_ptr + of_columns,
                    None if column_sum.ptr is None else column_sum.ptr + of_columns,
                    1,
                    1,
                ),
                scale=scale,
                N=sums.N,
                R=sums.R,
            )
            gradient_tile(alone, counts_ptr + owner * n_tiles, tile, chunk, dropout, DROPOUT, variant)
        block = next_block


@triton.jit
def _step(segment, group, owner, owners, segments, LEAST: tl.constexpr, variant: tl.constexpr):
    """Which step of its owner's sum the rows are that a segment has in a row group, and of how many."""
    index, count = group - segment.first_block // variant.tile.group_m, 0
    total, before = 0, 0
    for first in range(0, segments.count, variant.block_g):
        start, end = _bounds(segments, first, before, variant)
        n_blocks = tl.cdiv(end - start, variant.tile.block_m)
        last = total + tl.cumsum(n_blocks, 0)  # row block behind the segment's last
        groups = (last - 1) // variant.tile.group_m - (last - n_blocks) // variant.tile.group_m + 1
        g = first + tl.arange(0, variant.block_g)
        own = (n_blocks > 0) & (_owner(owners, g, segments.count, LEAST) == owner)
        steps = tl.where(own, groups, 0)
        count += tl.sum(steps)
        index += tl.sum(tl.where(g < segment.index, steps, 0))
        total += tl.sum(n_blocks)
        before = tl.max(end)
    return index, count


@triton.jit
def zero_tile(sums, owners, tile, first_owner, segments, LEAST: tl.constexpr, variant: tl.constexpr):
    """Zeros in column block ``tile`` of the gradients, of OWNERS owners, that no row adds anything to."""
    BLOCK_N: tl.constexpr = variant.tile.gradient_n
    BLOCK_R: tl.constexpr = variant.block_r
    offs_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_r = tl.arange(0, BLOCK_R)
    mask_n = offs_n < sums.N
    for owner in range(first_owner, tl.minimum(first_owner + OWNERS, owners.count)):
        if not _has_rows(owner, owners, segments, LEAST, variant):
            if sums.product.ptr is not None:
                gradient = sums.product
                ptrs = offs_n[:, None].to(tl.int64) * gradient.stride_n + offs_r[None, :] * gradient.stride_r
                ptrs += tl.cast(owner, tl.int64) * sums.N * sums.R
                zeros = tl.zeros((BLOCK_N, BLOCK_R), gradient.ptr.dtype.element_ty)
                tl.store(gradient.ptr + ptrs, zeros, mask=mask_n[:, None] & (offs_r < sums.R)[None, :])
            if sums.column_sum.ptr is not None:
                sum_ptrs = sums.column_sum.ptr + tl.cast(owner, tl.int64) * sums.N + offs_n
                zeros = tl.zeros((BLOCK_N,), sums.column_sum.ptr.dtype.element_ty)
                tl.store(sum_ptrs, zeros, mask=mask_n)


@triton.jit
def _has_rows(owner, owners, segments, LEAST: tl.constexpr, variant: tl.constexpr):
    rows, before = 0, 0
    for first in range(0, segments.count, variant.block_g):
        start, end = _bounds(segments, first, before, variant)
        g = first + tl.arange(0, variant.block_g)
        own = _owner(owners, g, segments.count, LEAST) == owner
        rows += tl.sum(tl.where(own, end - start, 0))
        before = tl.max(end)
    return rows > 0
