"""Policy: the row map. From a row block to rows of act and out, from a row group to a step of the gradients' sums."""

import triton
import triton.language as tl

from fastlora.backends.triton.structs import RowChunk

# Row block i holds rows i·BLOCK_M to (i + 1)·BLOCK_M of a product. Where rows lie in segments, each segment is a
# product of its own: segments.py finds that of a row block, and which steps of the gradients' sums a row group has.


@triton.jit
def rows_of_block(row, variant: tl.constexpr):
    """Row numbers of a row block; some may be past the end."""
    return row * variant.tile.block_m + tl.arange(0, variant.tile.block_m)


@triton.jit
def rows_to_load(row, M, variant: tl.constexpr):
    """The same with the last row in place of those past the end. What is made of these is not stored."""
    return tl.minimum(row * variant.tile.block_m + tl.arange(0, variant.tile.block_m), M - 1)


@triton.jit
def count_chunks(n_rows, variant: tl.constexpr):
    """Steps of the serial reduction of a gradient over n_rows row blocks: row groups."""
    return tl.cdiv(n_rows, variant.tile.group_m)


@triton.jit
def row_chunk(group, n_chunks, M, variant: tl.constexpr):
    """The rows of a row group, as one step of the serial reduction of the gradients."""
    first_row = group * (variant.tile.group_m * variant.tile.block_m)
    return RowChunk(group, n_chunks, first_row, tl.minimum(first_row + variant.tile.group_m * variant.tile.block_m, M))
