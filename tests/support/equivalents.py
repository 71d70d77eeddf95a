"""Mutants that compute what the original does: nothing need find them."""

_ROUNDS = "w0, w1, w2, w3 = tl.philox(dropout.seed, low, high, {}, PHILOX_ROUNDS)"
_LOCATE = "row, column, _, _ = locate(claimed, n_rows, n_columns, 0, {}, wave, variant.tile.group_m)"
_LOCATE_SEGMENT = "row, column, _, _ = locate(ticket, n_rows, n_columns, 0, {}, wave, variant.tile.group_m)"
_OUTSIDE = "what is not inside is neither stored nor multiplied"
_INSIDE = "a bound of a side that is known to be inside is not read"

# (file, its mutated lines): why.
REASONS: dict[tuple[str, str], str] = {
    ("memory.py", _ROUNDS.format("high * 0, low * 0")): "0 as well",
    ("memory.py", _ROUNDS.format("low * 0, high * 0")): "0 as well",
    (
        "gradients.py",
        "WGMMA: tl.constexpr = variant.wgmma and sums.right.data.dtype.element_ty.primitive_bitwidth == 16",
    ): "S and dS have the dtype of dY and X",
    (
        "launch.py",
        'outputs = [made and torch.empty(1, dtype=made[1], device="meta") for made in self.outputs]',
    ): "stands for a tensor of any size",
    (
        "launch.py",
        "blocks=tuple(block if tma else None for block, tma in zip(blocks, by_tma, strict=False)),",
    ): "there are three of both",
    (
        "packed_weight.py",
        "values -= tl.load(packed.zeros_ptr + index, mask=inside, other=0)",
    ): "int8 is widened where it is subtracted from float32",
    (
        "packed_weight.py",
        "outer = tl.load(packed.absmax2_ptr + index // format.nested_block, mask=inside, other=1.0)",
    ): _OUTSIDE,
    (
        "quantised_kernels.py",
        "stride_bn, stride_ar, stride_bn, scale_s, in_s, on_branch, seed_ptr, seed, threshold,",
    ): "a packed weight has no strides",
}
for _fields in (
    "1, 0, 1.0, 0",
    "-1, 0, 1.0, 0",
    "0, 1, 1.0, 0",
    "0, -1, 1.0, 0",
    "0, 0, 0.0, 0",
    "0, 0, 1.0, 1",
    "0, 0, 1.0, -1",
):
    REASONS["memory.py", f"return Dropout({_fields})"] = "where nothing is dropped, nothing reads it"
for _number in (1, -1):
    REASONS["segment_kernels.py", _LOCATE_SEGMENT.format(_number)] = "moves no tile where there are no gradient tiles"
    REASONS |= {
        ("launch.py", f"self.kernel_key = (spec._replace(sizes=spec.sizes._replace(m={_number})), self.variant)"): (
            "the same for every M"
        ),
        ("kernels.py", _LOCATE.format(_number)): "moves no tile where there are no gradient tiles",
    }
    for _file, _arguments in (
        ("base_weight", "weight, tl.minimum(offs_n, shape.N - 1), offs_k, {}, shape.K, True, variant.even_k).T"),
        ("branch", "product.down, offs_r, offs_k, {}, shape.K, True, variant.even_k).T"),
        ("branch", "product.down, offs_k, offs_r, shape.K, {}, variant.even_k, True)"),
        ("tiles", "act, rows_to_load(row, shape.M, variant), offs_k, {}, shape.K, True, variant.even_k)"),
    ):
        REASONS[f"{_file}.py", f"return load_block({_arguments.format(_number)}"] = _INSIDE
    for _line in (
        "s_block = load_block(product.s, rows_to_load(row, shape.M, variant), offs_r, {}, shape.R, True, False)",
        "up_block = load_block(product.up, tl.minimum(offs_n, shape.N - 1), offs_r, {}, shape.R, True, False).T",
    ):
        REASONS["branch.py", _line.format(_number)] = _INSIDE
for _number in (1, -1):
    for _line in (
        "values -= tl.load(packed.zeros_ptr + index, mask=inside, other={}).to(tl.float32)",
        "words = tl.load(words_ptr + groups // 8, mask=inside_groups, other={})",
        "pairs = tl.load(packed.codes_ptr + start // 2 + offs // 2, mask=inside, other={}).to(tl.int32)",
        "codes = tl.load(packed.codes_ptr + start + offs, mask=inside, other={})",
        "scales = tl.load(packed.scales_ptr + index, mask=inside, other={})",
    ):
        REASONS["packed_weight.py", _line.format(_number)] = _OUTSIDE
for _condition in (
    "config.block_k > 63 and config.block_m > 16",
    "config.block_k > 65 and config.block_m > 16",
    "config.block_k >= 64 and config.block_m > 16",
    "config.block_k > 64 and config.block_m > 17",
):
    REASONS["segment_launch.py", f"if {_condition}:"] = "sides are powers of two, and a step of 64 stays one"
for _strides in ("0, 1", "2, 1", "1, 0", "1, 2"):
    REASONS["segment_kernels.py", f"none = Gradient(None, None, {_strides})"] = "nothing has these strides"
    REASONS["kernels.py", f"column_sum=Gradient(None, None, {_strides}),"] = "nothing has these strides"
for _compared in ("!= 256 && kRank > 32", "== 256 && kRank <= 32", "== 256 && kRank >= 32"):
    _line = f"static constexpr int kFusedFragments = kBlockN {_compared} ? kMmasPerStep / 2 : kMmasPerStep;"
    REASONS["traits.cuh", _line] = "the same products, masked so many at a time; cuda_resources holds the registers"
for _number in (1, -1):
    REASONS["launch.cpp", f"int device_, previous_ = {_number};"] = "cudaGetDevice writes it, or nothing reads it"
REASONS["schedule.h", "const int ahead_start = others >= wave ? others - wave : 0;"] = (
    "0 either way where they are equal"
)
for _zeros in ("1, 0", "-1, 0", "0, 1", "0, -1"):
    _line = f"return {{behind / s.gradient_tiles, {_zeros}, behind % s.gradient_tiles}};"
    REASONS["schedule.h", f"if (s.gradients_last && behind >= 0) {_line}"] = (
        "a gradient tile has no column and no split"
    )
for _file in ("kernels.py", "segment_kernels.py"):
    _line = "dropout = dropout_of(seed_ptr, seed, threshold, 0.0)"
    REASONS[_file, _line] = "a forward has 1 / (1 - p) in the scale of S"
REASONS["product.cuh", "for (int j = 0; j <= 4; ++j) {"] = (
    "what is stored besides is the first pair of the next fragment, which comes again, or past the rank, and is not"
)
for _line in (
    "start = tl.associative_scan(tl.maximum(start, before), -1, _larger)",
    "passed = total + tl.cumsum(n_blocks, -1) <= block",
    "last = total + tl.cumsum(n_blocks, -1)",
):
    REASONS["segments.py", _line] = "the only axis"
for _lane in (1, -1):
    _line = (
        f"__device__ __forceinline__ uint32_t warp_id() {{ return __shfl_sync(kFullMask, threadIdx.x >> 5, {_lane}); }}"
    )
    REASONS["thread.cuh", _line] = "every lane has the same"
REASONS |= {
    (
        "segments.py",
        "for first in range(0, segments.count + 2, variant.block_g):",
    ): "behind the last segment are no rows",
    ("segments.py", "return tl.where(g <= n_segments, tl.minimum(g, owners.count - 1), -1)"): (
        "behind the last segment _owner says -1 itself, and nobody else asks there"
    ),
}
REASONS["packed_weight.py", "block = format.block if format.block > 1 else packed.block"] = "no format has blocks of 1"
