"""What is fixed about a packed base weight when a kernel is compiled."""

import dataclasses

# bitsandbytes' two codes. fp4's are a sign and one of eight magnitudes; its code 8, minus zero, has one sign or the
# other in bitsandbytes' own code paths.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)


@dataclasses.dataclass(frozen=True)
class PackedFormat:
    """The compile-time parameters of a packed weight [N, K], which is decoded as one long row of N·K elements.

    table: the values of 4-bit codes, of which two share a byte, the first in its high half: all sixteen, or eight
        magnitudes whose sign is the code's highest bit. Empty: a code is a byte.
    exponent_bits: of a byte that is a float8; 0: it is an integer.
    block: elements that share a scale; 0: known when the kernel is launched.
    nested_block: scales that share a nested one; 0: scales are plain.
    whole: N·K is a multiple of eight: codes may be read eight elements at a time.
    grouped: eight elements, from a multiple of eight on, have one scale.
    part: elements that one tile decodes, a power of two.
    in_loop: products decode blocks of the weight themselves, and no tile does it ahead of them.
    """

    table: tuple[float, ...]
    exponent_bits: int
    block: int
    nested_block: int
    whole: bool
    grouped: bool
    part: int
    in_loop: bool
