// A tile of a packed base weight: codes and scales of a part of a panel to elements in memory, from where tiles of the
// output read them as a dense weight.
#pragma once
#include "consumer.cuh"
#include "packed.cuh"
#include "ptx/tma.cuh"

namespace fastlora::sm90 {

// Decodes `count` elements from `first` on.
template <class Codes, class Scale, class Traits>
__device__ __forceinline__ void decode_part(const Consumer<Traits>& c, int64_t first, int count, uint32_t table) {
  using Element = typename Traits::Element;
  constexpr int kAtOnce = 8;  // groups of a thread whose loads are in flight together
  constexpr int kStride = kConsumerWarpgroups * kWarpgroupThreads * kDecodedTogether;
  const PackedWeight& w = c.params.packed;
  // One long division for the part, short ones within it; shifts where they do.
  const auto first_block = uint32_t(Codes::kPowersOfTwo ? first >> w.block_shift : first / w.block);
  const auto in_block = uint32_t(Codes::kPowersOfTwo ? first & (w.block - 1) : first % w.block);
  const int64_t first_group = first / kDecodedTogether;
  auto* out = static_cast<Element*>(w.decoded) + first;
#pragma unroll 1
  for (int base = int(c.warpgroup * kWarpgroupThreads + c.thread) * kDecodedTogether; base < count;
       base += kAtOnce * kStride) {
    Codes codes[kAtOnce];
    Scale scales[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * kStride;
      if (i < count) {
        const uint32_t from_block = in_block + i;
        codes[j].load(w, first_group + uint32_t(i) / kDecodedTogether);
        scales[j].load(w, first_block + (Codes::kPowersOfTwo ? from_block >> w.block_shift : from_block / w.block));
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * kStride;
      if (i < count) {
        const float scale = scales[j].value(w), zero = scales[j].zero();
        *reinterpret_cast<uint4*>(out + i) = decode_group<Element>(codes[j], scale, zero, table);
      }
    }
  }
}

// Decodes a part of a panel, both warpgroups together, and releases the panel's flag: once by each. Behind the end of a
// panel that is shorter than others there are parts without an element.
template <class Traits>
__device__ __forceinline__ void decode_tile(Consumer<Traits>& c, TileInfo tile) {
  const PackedWeight& w = c.params.packed;
  const int64_t panel = tile.row * w.panel_elements, end = panel + w.panel_elements;
  const int64_t first = panel + int64_t(tile.column) * kPartElements;
  const int64_t left = (end < w.elements ? end : w.elements) - first;
  const int count = left < 0 ? 0 : int(left < kPartElements ? left : kPartElements);
  // The table lies in a staging buffer: no tile of the output, which would store through it, comes before this one.
  const uint32_t table = c.shared.staging(c.warpgroup, 0);
  if (is_four_bit(w.code_format)) {
    if (c.thread == 0) {
      w.code_format == CodeFormat::kNf4 ? store_table<CodeFormat::kNf4>(table) : store_table<CodeFormat::kFp4>(table);
    }
    c.sync_warpgroup();
    if (w.scale_format == ScaleFormat::kNested) {
      decode_part<FourBitCodes, NestedScale>(c, first, count, table);
    } else {
      decode_part<FourBitCodes, FloatScale>(c, first, count, table);
    }
  } else if (w.code_format == CodeFormat::kInt8) {
    decode_part<ByteCodes<CodeFormat::kInt8>, AnyScale>(c, first, count, table);
  } else if (w.code_format == CodeFormat::kFloat8E4M3) {
    decode_part<ByteCodes<CodeFormat::kFloat8E4M3>, AnyScale>(c, first, count, table);
  } else {
    decode_part<ByteCodes<CodeFormat::kFloat8E5M2>, AnyScale>(c, first, count, table);
  }
  fence_async_global();
  c.release_flag(panel_flag(c.params, tile.row));
}

}  // namespace fastlora::sm90
