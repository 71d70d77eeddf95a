"""Which scales of a packed base weight the kernels that decode it can find: the same for Triton and CUDA."""

import torch

from fastlora.problem import LaunchSpec
from fastlora.quantised_weight import FOUR_BIT

LARGEST_BLOCK = 1 << 30  # whose elements 32 bits count, with those of what is decoded together


def elements_of_block(spec: LaunchSpec) -> int:
    """That share a scale."""
    assert spec.packed is not None
    rows, columns = spec.packed.block
    return rows if spec.base_format in FOUR_BIT else rows * columns


def why_bad_blocks(spec: LaunchSpec) -> str | None:
    """Why no kernel finds the scale of an element of the call's packed weight, or None: there are more scales than 32
    bits count, those of a 4-bit format are not bitsandbytes' own, or those of others do not divide the weight."""
    packed, name = spec.packed, spec.base_format
    assert packed is not None
    if packed.counts[1] >= 1 << 31:
        return f"{packed.counts[1]} scales of the {name} weight, which 32 bits do not count"
    if name in FOUR_BIT:
        usual = (torch.uint8, *(torch.float32,) * 3) if packed.block[1] else (torch.float32,)
        return (
            None if packed.dtypes[1:] == usual else f"scales of the {name} weight are {packed.dtypes[1:]}, not {usual}"
        )
    _, n, k, _ = spec.sizes
    rows, columns = packed.block
    if (rows > 1 and columns != k) or k % columns or n % rows or packed.counts[1] * rows * columns != n * k:
        return f"{packed.counts[1]} scales of {rows} x {columns} elements of the {name} weight [{n}, {k}]"
    if rows * columns > LARGEST_BLOCK:
        return f"{rows * columns} elements of the {name} weight have one scale"
    return None
