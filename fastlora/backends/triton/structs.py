"""What the jit functions pass to each other by name: operands, sizes and factors.

Triton flattens these tuples when it compiles: they cost nothing, and a field that is None is a constant."""

from typing import Any, NamedTuple


class Matrix(NamedTuple):
    """A row-major matrix: a pointer or a TMA descriptor, and its row stride in elements."""

    data: Any
    stride: Any


class DecodedWeight(NamedTuple):
    """In the place of a weight's pointer: what other tiles of the launch decode, in panels. Forward: of as many rows as
    a column block of the product; dX: one of all rows. A panel is there once its word has counted all ``parts``."""

    ptr: Any
    panels_ptr: Any
    parts: Any


class ScaledRows(NamedTuple):
    """In the place of dY's pointer: what other tiles of the launch scale, by row groups. A group is there once its flag
    has counted all ``parts``, its column blocks."""

    ptr: Any
    flags_ptr: Any
    parts: Any


class ColumnScale(NamedTuple):
    """A factor for each column of Y, magnitude / norm; without ``magnitude_ptr`` 1. ``unscaled_ptr``: where Y before
    factor and bias goes, with the row stride of Y; None: nowhere."""

    magnitude_ptr: Any
    norm_ptr: Any
    unscaled_ptr: Any


class Shape(NamedTuple):
    """Of a product with a low-rank branch: the output is M x N, K is contracted, R is the rank."""

    M: Any
    N: Any
    K: Any
    R: Any


class Product(NamedTuple):
    """Operands of out = column_scale∘(act·weightᵀ + s·upᵀ) + bias, s = act·downᵀ, by role.

    |        | forward          | dX, which contracts N: memory as the forward's |
    |--------|------------------|-----------------------------------------------|
    | act    | X [M, K]         | dY [M, K]                                     |
    | weight | W0 [N, K]        | W0 [K, N]                                     |
    | down   | A [R, K]         | B [K, R]                                      |
    | up     | B [N, R]         | A [R, N]                                      |
    | out    | Y [M, N]         | dX [M, N]; no data: dS alone is made          |
    | s      | S [M, R]         | dS [M, R]                                     |

    bias_size: N, or 0 where one of several projections has no bias.
    """

    act: Matrix
    weight: Matrix
    down: Matrix
    up: Matrix
    bias_ptr: Any
    bias_size: Any
    out: Matrix
    s: Matrix
    column_scale: ColumnScale


class BranchScales(NamedTuple):
    """The scaling of the branch. ``of_sum`` multiplies the fp32 sums of S. The others are None but in float16, see
    fastlora.problem.split_scaling: ``in_s`` multiplies what is in its range, and ``on_branch`` S·upᵀ; it is None where
    it is 1."""

    of_sum: Any
    in_s: Any
    on_branch: Any


class Dropout(NamedTuple):
    """Of the branch's input; see fastlora.philox. first_row: in all of x, of what a tile takes for row 0."""

    seed: Any
    threshold: Any
    inverse_keep: Any
    first_row: Any


class Owners(NamedTuple):
    """Which of ``count`` matrices each segment has; without ``ptr`` its own number, or the only one."""

    ptr: Any
    count: Any


class Segments(NamedTuple):
    """Rows in ``count`` segments; ``ends_ptr``: where each ends, cumulative. Rows past the last end, up to ``M``, count
    as one segment more, which has no matrix."""

    ends_ptr: Any
    experts: Owners
    adapters: Owners
    biases: Owners
    count: Any
    M: Any


class Segment(NamedTuple):
    """Its number, its first row block of all segments', its first row and the one behind its last."""

    index: Any
    first_block: Any
    first_row: Any
    end_row: Any


class Projections(NamedTuple):
    """Projections of one x. What each has of its own is a tuple with one of each, in a matrix of both fields; a pointer
    is null where a projection has no such tensor. One without an adapter has a rank of 0.

    acts: dYs [M, N_i] of the backward; None: the forward, whose act is x for all.
    weights, lora_as, lora_bs: [N_i, K], [R_i, K], [N_i, R_i].
    N, R: their sizes.
    scales: of their branches.
    dropout: of their branches' inputs: (addresses of seeds, seeds, thresholds, inverse_keep); None: without.
    """

    acts: Any
    weights: Matrix
    lora_as: Matrix
    lora_bs: Matrix
    N: Any
    R: Any
    scales: BranchScales
    dropout: Any


class Gradient(NamedTuple):
    """A sum over rows: where its fp32 partial sums go between row chunks, where the result does, with both strides.
    Without ``ptr`` it is not wanted."""

    partial_ptr: Any
    ptr: Any
    stride_n: Any
    stride_r: Any


class RowSum(NamedTuple):
    """Operands of product[n, r] = scale·Σ_m left[m, n]·right[m, r] and column_sum[n] = Σ_m left[m, n].

    dB and dbias: left = dY [M, N], right = S. dA: left = X [M, N = in_features], right = dS, stored transposed."""

    left: Matrix
    right: Matrix
    product: Gradient
    column_sum: Gradient
    scale: Any
    N: Any
    R: Any


class RowChunk(NamedTuple):
    """The rows of one step of a serial reduction: step ``index`` of ``count``."""

    index: Any
    count: Any
    first_row: Any
    end_row: Any
