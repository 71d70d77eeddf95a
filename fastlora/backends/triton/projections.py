"""Projections of one x: from a column of the queue to a projection, whose columns are a product of their own; dX, which
is one sum over all of them; from a gradient tile to its projection.

What differs between them comes as tuples of arguments, of which a program selects its own projection's: scalars all,
and no table of pointers that would have to be copied to the device. So one main loop serves every projection.
"""

import triton
import triton.language as tl

from fastlora.backends.triton.branch import add_branch
from fastlora.backends.triton.epilogue import halves, store_tile
from fastlora.backends.triton.memory import dropout_of
from fastlora.backends.triton.row_map import rows_of_block
from fastlora.backends.triton.schedule import wait_for
from fastlora.backends.triton.structs import BranchScales, ColumnScale, Dropout, Matrix, Product, Shape
from fastlora.backends.triton.tiles import multiply, product_tile, shrink


@triton.jit
def pick(values, index):
    """One of a tuple, by a number that the program has computed."""
    found = values[0]
    for i in tl.static_range(1, len(values)):
        found = tl.where(index == i, values[i], found)
    return found


@triton.jit
def pick_matrix(matrices, index):
    return Matrix(pick(matrices.data, index), pick(matrices.stride, index))


@triton.jit
def sum_before(values, index):
    """Of a tuple, the sum of those in front of ``index``."""
    total = 0
    for i in tl.static_range(len(values)):
        total += tl.where(i < index, values[i], 0)
    return total


@triton.jit
def elements_before(N, R, index):
    """Of matrices [N_i, R_i] that lie one behind the other, the elements in front of one."""
    total = tl.cast(0, tl.int64)
    for i in tl.static_range(len(N)):
        total += tl.where(i < index, tl.cast(N[i], tl.int64) * R[i], 0)
    return total


@triton.jit
def find(tile, counts):
    """Of tiles that are numbered projection by projection, ``counts`` of each: the projection of one, and its number
    there."""
    index, first, end = 0, 0, 0
    for i in tl.static_range(len(counts) - 1):
        end += counts[i]
        index += tl.where(tile >= end, 1, 0)
        first = tl.where(tile >= end, end, first)
    return index, tile - first


@triton.jit
def dropout_of_projection(projections, index):
    """Where the others drop, one that does not has a threshold of 0: every element is kept, and scaled by 1."""
    if projections.dropout is None:
        return Dropout(0, 0, 1.0, 0)
    else:
        ptrs, seeds, thresholds, inverse_keeps = projections.dropout
        return dropout_of(pick(ptrs, index), pick(seeds, index), pick(thresholds, index), pick(inverse_keeps, index))


@triton.jit
def projection_tile(
    projections, x, bias_ptrs, bias_sizes, y_ptrs, s_ptrs, flags_ptr, row, column, columns, n_rows, M, K,
    variant: tl.constexpr,
):  # fmt: skip
    """A tile of the forward: tiles.product_tile of its projection.

    The queue's first columns are column 0 of each projection, which makes its S; ``columns`` has how many others each
    has. ``flags_ptr`` has n_rows flags for each projection.
    """
    index, own_column = column, 0
    if column >= variant.projections:
        index, own_column = find(column - variant.projections, columns)
        own_column += 1
    p = projections
    shape = Shape(M, pick(p.N, index), K, pick(p.R, index))
    if (shape.R > 0) | (own_column >= variant.shrink_columns):
        bias_ptr, bias_size = None, 0
        if bias_ptrs is not None:
            bias_ptr, bias_size = pick(bias_ptrs, index), pick(bias_sizes, index)
        product = Product(
            act=x,
            weight=pick_matrix(p.weights, index),
            down=pick_matrix(p.lora_as, index),
            up=pick_matrix(p.lora_bs, index),
            bias_ptr=bias_ptr,
            bias_size=bias_size,
            out=Matrix(pick(y_ptrs, index), shape.N),
            s=Matrix(pick(s_ptrs, index), shape.R),
            column_scale=ColumnScale(None, None, None),
        )
        in_s, on_branch = None, None
        if p.scales.in_s is not None:
            in_s, on_branch = pick(p.scales.in_s, index), pick(p.scales.on_branch, index)
        scales, dropout = BranchScales(pick(p.scales.of_sum, index), in_s, on_branch), dropout_of_projection(p, index)
        product_tile(product, flags_ptr + index * n_rows, row, own_column, shape, scales, dropout, variant)


@triton.jit
def _part_of_dx(projections, dx_ptr, ds_ptr, index, M, K):
    """dY_i·W_i + mask∘(dS_i·A_i)/(1-p_i) as a product of its own, and its sizes. ``ds_ptr`` has [M, R_i] of each."""
    p = projections
    shape = Shape(M, K, pick(p.N, index), pick(p.R, index))
    product = Product(
        act=pick_matrix(p.acts, index),
        weight=pick_matrix(p.weights, index),
        down=pick_matrix(p.lora_bs, index),
        up=pick_matrix(p.lora_as, index),
        bias_ptr=0,  # not read, as the scale; a function cannot return None
        bias_size=0,
        out=Matrix(dx_ptr, K),
        s=Matrix(ds_ptr + tl.cast(M, tl.int64) * sum_before(p.R, index), shape.R),
        column_scale=0,  # type: ignore[arg-type]
    )
    return product, shape


@triton.jit
def dx_tile(
    projections, dx_ptr, ds_ptr, flags_ptr, tiles_a, row, column, n_columns, n_rows, M, K, variant: tl.constexpr
):
    """A tile of dX, the sum over all projections in fp32. Column 0 makes every dS where the shrink is fused; else each
    projection has a column that makes its own."""
    BLOCK_M: tl.constexpr = variant.tile.block_m
    BLOCK_N: tl.constexpr = variant.tile.block_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    COUNT: tl.constexpr = variant.projections
    if variant.fused:
        if column == 0:
            for i in range(COUNT):
                product, shape = _part_of_dx(projections, dx_ptr, ds_ptr, i, M, K)
                scales = BranchScales(pick(projections.scales.of_sum, i), None, None)
                acc = shrink(acc, product, flags_ptr + i * n_rows, row, shape, scales, None, variant)
        else:
            for i in range(COUNT):
                product, shape = _part_of_dx(projections, dx_ptr, ds_ptr, i, M, K)
                acc = multiply(acc, product, row, column, shape, variant)
        _finish_dx(acc, projections, dx_ptr, ds_ptr, flags_ptr, row, column * BLOCK_N, n_rows, M, K, variant)
    else:
        if column < COUNT:
            product, shape = _part_of_dx(projections, dx_ptr, ds_ptr, column, M, K)
            # Without dX, dA alone reads dS.
            if (shape.R > 0) & ((n_columns > COUNT) | (pick(tiles_a, column) > 0)):
                scales = BranchScales(pick(projections.scales.of_sum, column), None, None)
                shrink(acc, product, flags_ptr + column * n_rows, row, shape, scales, None, variant)
        else:
            n = column - COUNT
            for i in range(COUNT):
                product, shape = _part_of_dx(projections, dx_ptr, ds_ptr, i, M, K)
                acc = multiply(acc, product, row, n, shape, variant)
            _finish_dx(acc, projections, dx_ptr, ds_ptr, flags_ptr, row, n * BLOCK_N, n_rows, M, K, variant)


@triton.jit
def _finish_dx(acc, projections, dx_ptr, ds_ptr, flags_ptr, row, first_n, n_rows, M, K, variant: tl.constexpr):
    """Adds every branch to the columns of dX from ``first_n`` on, and stores them."""
    for i in range(variant.projections):
        wait_for(flags_ptr + i * n_rows + row, tl.minimum(pick(projections.R, i), 1))
    _add_branches(acc, projections, dx_ptr, ds_ptr, row, first_n, M, K, variant)


@triton.jit
def _add_branches(acc, projections, dx_ptr, ds_ptr, row, first_n, M, K, variant: tl.constexpr):
    """In slices, as epilogue.finish_tile."""
    BLOCK_N: tl.constexpr = acc.shape[1]
    if variant.dropout and variant.tile.slice_n < BLOCK_N:
        left, right = halves(acc)
        _add_branches(left, projections, dx_ptr, ds_ptr, row, first_n, M, K, variant)
        _add_branches(right, projections, dx_ptr, ds_ptr, row, first_n + BLOCK_N // 2, M, K, variant)
    else:
        for i in range(variant.projections):
            product, shape = _part_of_dx(projections, dx_ptr, ds_ptr, i, M, K)
            dropout = dropout_of_projection(projections, i)
            acc = add_branch(acc, product, row, first_n, shape, None, dropout, variant)
        offs_m = rows_of_block(row, variant)
        offs_n = first_n + tl.arange(0, BLOCK_N)
        store_tile(acc, Matrix(dx_ptr, K), offs_m, offs_n, Shape(M, K, 0, 0))
