"""What one call of a LoRA layer is made of: its sizes, the gradients it wants, and what it returns.

The ground floor: every other module may import this one, and it imports none of them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """M tokens (all leading dimensions of x), N out_features, K in_features, R rank."""

    m: int
    n: int
    k: int
    r: int


class Needs(NamedTuple):
    """Which gradients to compute."""

    dx: bool
    da: bool
    db: bool
    dbias: bool


class Gradients(NamedTuple):
    """What a backward returns; None where it was not asked for."""

    dx: Tensor | None
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None


class Scales(NamedTuple):
    """The two factors whose product is a layer's scaling: ``in_s`` goes into S before it is rounded, ``on_branch`` (a
    power of two) multiplies S·Bᵀ and dYᵀ·S."""

    in_s: float
    on_branch: float


def split_scaling(scaling: float, dtype: torch.dtype) -> Scales:
    """How a scaling is shared out between S and the branch.

    In float16 a scaling above 1 would make S overflow where x·Aᵀ itself does not. There S takes scaling / 2^e, of
    magnitude 1/2 to 1, and 2^e, which is exact, is left to the branch. Every other dtype has the range for all of it.

    Args:
        scaling: the layer's factor of the low-rank branch.
        dtype: x's dtype, which S is stored in.
    """
    if dtype != torch.float16 or not 1.0 < abs(scaling) < math.inf:
        return Scales(scaling, 1.0)
    mantissa, exponent = math.frexp(scaling)
    if abs(mantissa) == 0.5:  # a power of two: S takes exactly 1
        mantissa, exponent = 2 * mantissa, exponent - 1
    return Scales(mantissa, math.ldexp(1.0, exponent))
