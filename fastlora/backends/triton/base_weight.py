"""Policy: the base weight. From its bytes in memory to a block in the dtype of the product."""

import triton
import triton.language as tl

from fastlora.backends.triton.memory import load_block
from fastlora.backends.triton.packed_weight import load_packed
from fastlora.backends.triton.schedule import wait_for
from fastlora.backends.triton.structs import Matrix


@triton.jit
def load_weight(product, n, k, shape, variant: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of weightᵀ: column block n, contracted elements from k on."""
    # The next format goes here: a field of Variant says which, and its function returns the same block, decoded.
    if variant.in_loop:
        return load_packed(product.weight.data, n, k, shape, product.s.data.dtype.element_ty, variant)
    elif variant.decoded:
        return _load_dense(Matrix(product.weight.data.ptr, product.weight.stride), n, k, shape, variant)
    else:
        # Under autocast, weights in segments are cast where they are used; a cast to the same dtype is none.
        return _load_dense(product.weight, n, k, shape, variant).to(product.s.data.dtype.element_ty)


@triton.jit
def await_weight(product, n, variant: tl.constexpr):
    """Until column block n of weightᵀ may be loaded. In dX that is the whole weight, for every column."""
    if variant.decoded:
        weight = product.weight.data
        wait_for(weight.panels_ptr + n if variant.forward else weight.panels_ptr, weight.parts)


@triton.jit
def _load_dense(weight, n, k, shape, variant: tl.constexpr):
    """Of 16- or 32-bit elements: W0 [N, K] forward; in dX the same memory, [K, N] by the names of Shape; the other way
    round where W0 itself lies as [K, N]."""
    offs_k = k + tl.arange(0, variant.tile.block_k)
    offs_n = n * variant.tile.block_n + tl.arange(0, variant.tile.block_n)
    if not variant.contracts_weight_rows and variant.tma:
        return weight.data.load([n * variant.tile.block_n, k]).T
    elif not variant.contracts_weight_rows:
        return load_block(weight, tl.minimum(offs_n, shape.N - 1), offs_k, 0, shape.K, True, variant.even_k).T
    elif variant.tma:
        return weight.data.load([k, n * variant.tile.block_n])
    else:
        return load_block(weight, offs_k, offs_n, shape.K, shape.N, variant.even_k, False)
