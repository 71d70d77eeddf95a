"""A packed base weight: from codes and scales in memory to values.

Scratch is decoded a part at a time, by tiles ahead of those that read it (decode_part); where few rows meet the weight,
its blocks are decoded in the loop of the product (load_packed). A value is code·scale in float32, rounded once to the
dtype of the product. A nested scale is code2·absmax2 + offset, rounded after each of the two, as bitsandbytes has it.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class PackedWeight(NamedTuple):
    """A weight [N, K] as one row of N·K elements. What a format does not have is None.

    codes_ptr: uint8 (two codes a byte, or float8) or int8.
    scales_ptr: one for each ``block`` elements; uint8 where they are nested.
    zeros_ptr: likewise, whole numbers that are subtracted from the codes.
    absmax2_ptr, code2_ptr, offset_ptr: float32, of nested scales: one for each nested block; [256]; one number.
    block: elements that share a scale, where the format does not say it.
    """

    codes_ptr: Any
    scales_ptr: Any
    zeros_ptr: Any
    absmax2_ptr: Any
    code2_ptr: Any
    offset_ptr: Any
    block: Any


@triton.jit
def decode_part(packed, out_ptr, start, left, variant: tl.constexpr):
    """Decodes the ``left`` elements from ``start`` on, a multiple of eight, variant.packed.part of them at most."""
    format: tl.constexpr = variant.packed
    PART: tl.constexpr = format.part
    CHUNK: tl.constexpr = min(PART, 1024 * variant.tile.num_warps)
    for chunk in tl.range(0, PART, CHUNK, num_stages=1):
        groups = chunk + 8 * tl.arange(0, CHUNK // 8)
        offs = groups[:, None] + tl.arange(0, 8)[None, :]
        inside = (groups < left)[:, None] if format.whole else offs < left
        values = _values(packed, start, groups, groups < left, offs, inside, format)
        tl.store(out_ptr + start + offs, values, mask=inside)


@triton.jit
def load_packed(packed, n, k, shape, dtype: tl.constexpr, variant: tl.constexpr):
    """[BLOCK_K, BLOCK_N] of weightᵀ, as base_weight.load_weight in a forward: decoded in registers, zero from column K
    on. A row of W0 is a multiple of eight elements."""
    BLOCK_N: tl.constexpr = variant.tile.block_n
    BLOCK_K: tl.constexpr = variant.tile.block_k
    format: tl.constexpr = variant.packed
    rows = tl.minimum(tl.arange(0, BLOCK_N), shape.N - 1 - n * BLOCK_N)
    columns = k + 8 * tl.arange(0, BLOCK_K // 8)
    groups = rows[:, None] * shape.K + columns[None, :]
    inside = tl.broadcast_to((columns < shape.K)[None, :], groups.shape)
    each = tl.expand_dims(inside, 2)
    start = tl.cast(n * BLOCK_N, tl.int64) * shape.K
    offs = tl.expand_dims(groups, 2) + tl.arange(0, 8)
    values = _values(packed, start, groups, inside, offs, each, format)
    return tl.reshape(tl.where(each, values, 0.0).to(dtype), (BLOCK_N, BLOCK_K)).T


@triton.jit
def _values(packed, start, groups, inside_groups, offs, inside, format: tl.constexpr):
    """The float32 values of elements ``start`` + offs, eight from each of ``groups`` on; only what is ``inside`` is
    read."""
    values = _codes(packed, start, groups, inside_groups, offs, inside, format)
    if format.grouped:
        scales = tl.expand_dims(_scales(packed, start, groups, inside_groups, format), len(groups.shape))
    else:
        scales = _scales(packed, start, offs, inside, format)
    if packed.zeros_ptr is not None:
        index = _block_of(packed, start, offs, format)
        values -= tl.load(packed.zeros_ptr + index, mask=inside, other=0).to(tl.float32)
    return values * scales


@triton.jit
def _table(format: tl.constexpr):
    """[16] values of 4-bit codes, in registers: a tensor of them would be one more operand of every launch."""
    code = tl.arange(0, 16)
    SIZE: tl.constexpr = len(format.table)
    table = tl.zeros((16,), tl.float32)
    for i in tl.static_range(SIZE):
        table = tl.where(code % SIZE == i, format.table[i], table)
    if SIZE == 8:
        table *= tl.where(code < 8, 1.0, -1.0)
    return table


@triton.jit
def _codes(packed, start, groups, inside_groups, offs, inside, format: tl.constexpr):
    """The codes of elements as float32 numbers."""
    if len(format.table) > 0:
        if format.whole:
            words_ptr = packed.codes_ptr.to(tl.pointer_type(tl.int32)) + start // 8
            words = tl.load(words_ptr + groups // 8, mask=inside_groups, other=0)
            # Of the lowest byte the high half comes first.
            codes = (tl.expand_dims(words, len(words.shape)) >> (4 * (tl.arange(0, 8) ^ 1))) & 15
        else:
            pairs = tl.load(packed.codes_ptr + start // 2 + offs // 2, mask=inside, other=0).to(tl.int32)
            codes = (pairs >> (4 * ((offs & 1) ^ 1))) & 15
        # Through shared memory, where sixteen numbers lie in as many banks.
        return tl.reshape(tl.gather(_table(format), tl.reshape(codes, (codes.numel,)), 0), codes.shape)
    else:
        codes = tl.load(packed.codes_ptr + start + offs, mask=inside, other=0)
        return _float8(codes, format) if format.exponent_bits > 0 else codes.to(tl.float32)


@triton.jit
def _float8(byte, format: tl.constexpr):
    """The value of a float8, without an instruction of compute capability 8.9: its bits are those of a float16 whose
    exponent is too small by a constant."""
    bits = byte.to(tl.int16)
    if format.exponent_bits == 5:
        bits = bits << 8
        return bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        scaled = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = scaled.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _block_of(packed, start, offs, format: tl.constexpr):
    """The number of the block of elements ``start`` + offs, in 32 bits: a long division for all of them, and a short
    one for each."""
    block = format.block if format.block > 0 else packed.block
    return (start // block).to(tl.int32) + ((start % block).to(tl.int32) + offs) // block


@triton.jit
def _scales(packed, start, offs, inside, format: tl.constexpr):
    """The float32 scales of elements."""
    index = _block_of(packed, start, offs, format)
    scales = tl.load(packed.scales_ptr + index, mask=inside, other=0)
    if format.nested_block > 0:
        inner = tl.load(packed.code2_ptr + scales.to(tl.int32))
        outer = tl.load(packed.absmax2_ptr + index // format.nested_block, mask=inside, other=0.0)
        # fma(a, b, 0) is a·b rounded, and no compiler may join it with the addition, as it joins a plain product.
        return tl.fma(inner, outer, 0.0) + tl.load(packed.offset_ptr)
    else:
        return scales.to(tl.float32)
