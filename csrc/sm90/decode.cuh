// A tile of a packed base weight: codes and scales of a part of a panel to elements in memory, from where tiles of the
// output read them as a dense weight.
//
// An element is code * scale in fp32, rounded once: the bits of the library that packed the weight. A nested scale is
// code2 * absmax2 + offset, rounded after each of the two, which a fused multiply-add would not.
#pragma once
#include "consumer.cuh"
#include "ptx/tma.cuh"

namespace fastlora::sm90 {

// The number that a 4-bit code stands for.
template <CodeFormat kFormat>
__device__ __forceinline__ constexpr float number_of_code(int code) {
  constexpr float kNf4[16] = {-1.f,
                              -0.6961928009986877f,
                              -0.5250730514526367f,
                              -0.39491748809814453f,
                              -0.28444138169288635f,
                              -0.18477343022823334f,
                              -0.09105003625154495f,
                              0.f,
                              0.07958029955625534f,
                              0.16093020141124725f,
                              0.24611230194568634f,
                              0.33791524171829224f,
                              0.44070982933044434f,
                              0.5626170039176941f,
                              0.7229568362236023f,
                              1.f};
  constexpr float kFp4[8] = {0.f,                 0.0052083334885537624f, 0.6666666865348816f, 1.f,
                             0.3333333432674408f, 0.5f,                   0.1666666716337204f, 0.25f};
  if (kFormat == CodeFormat::kNf4) return kNf4[code];
  return code < 8 ? kFp4[code] : -kFp4[code - 8];
}

// Writes the numbers of all 4-bit codes into shared memory, where they lie in banks of their own.
template <CodeFormat kFormat>
__device__ __forceinline__ void store_table(uint32_t table) {
#pragma unroll
  for (int i = 0; i < 16; i += 4) {
    const auto bits = [=](int j) { return __float_as_uint(number_of_code<kFormat>(i + j)); };
    store_shared_16(table + i * sizeof(float), make_uint4(bits(0), bits(1), bits(2), bits(3)));
  }
}

// The numbers of kDecodedTogether codes. `table`: a warpgroup's table of 4-bit ones in shared memory.
struct FourBitCodes {
  uint32_t word;

  __device__ __forceinline__ void load(const void* codes, int64_t first) {
    word = __ldg(reinterpret_cast<const uint32_t*>(static_cast<const uint8_t*>(codes) + first / 2));
  }
  __device__ __forceinline__ float number(int i, uint32_t table) const {
    const uint32_t code = word >> 4 * (i ^ 1) & 15;  // the first of two in the high half
    return __uint_as_float(load_shared(table + code * sizeof(float)));
  }
};

template <CodeFormat kFormat>
struct ByteCodes {
  uint2 words;

  __device__ __forceinline__ void load(const void* codes, int64_t first) {
    words = __ldg(reinterpret_cast<const uint2*>(static_cast<const uint8_t*>(codes) + first));
  }
  __device__ __forceinline__ float number(int i, uint32_t) const {
    const uint32_t byte = (i < 4 ? words.x : words.y) >> 8 * (i % 4) & 0xff;
    if constexpr (kFormat == CodeFormat::kInt8) return float(int8_t(byte));
    // The bits of a float8 are those of an fp16 number whose exponent is too small by a constant.
    if constexpr (kFormat == CodeFormat::kFloat8E5M2) return unpack<__half>(byte << 8).x;
    const float number = unpack<__half>((byte & 0x80) << 8 | (byte & 0x7f) << 7).x * 256.f;
    return (byte & 0x7f) == 0x7f ? NAN : number;
  }
};

__device__ __forceinline__ float load_scale(const PackedWeight& w, uint32_t block) {
  switch (w.scale_format) {
    case ScaleFormat::kFloat32:
      return __ldg(static_cast<const float*>(w.scales) + block);
    case ScaleFormat::kFloat16:
      return unpack<__half>(__ldg(static_cast<const uint16_t*>(w.scales) + block)).x;
    case ScaleFormat::kBfloat16:
      return unpack<__nv_bfloat16>(__ldg(static_cast<const uint16_t*>(w.scales) + block)).x;
    case ScaleFormat::kNested:
      break;
  }
  const float inner = __ldg(w.code2 + __ldg(static_cast<const uint8_t*>(w.scales) + block));
  const float outer = __ldg(w.absmax2 + (block >> w.nested_shift));
  return __fadd_rn(__fmul_rn(inner, outer), __ldg(w.offset));
}

// Decodes `count` elements from `first` on.
template <class Codes, bool kFourBit, class Traits>
__device__ __forceinline__ void decode_part(const Consumer<Traits>& c, int64_t first, int count, uint32_t table) {
  using Element = typename Traits::Element;
  constexpr int kAtOnce = 4;  // groups that a thread loads before it decodes them
  constexpr int kStride = kConsumerWarpgroups * kWarpgroupThreads * kDecodedTogether;
  const PackedWeight& w = c.params.packed;
  // A long division for the part, which has the block size as a power of two where codes have 4 bits; short ones within.
  const uint32_t first_block = uint32_t(kFourBit ? first >> w.block_shift : first / w.block);
  const uint32_t in_block = uint32_t(kFourBit ? first & (w.block - 1) : first % w.block);
  auto* out = static_cast<Element*>(w.decoded) + first;
#pragma unroll 1
  for (int base = int(c.warpgroup * kWarpgroupThreads + c.thread) * kDecodedTogether; base < count;
       base += kAtOnce * kStride) {
    Codes codes[kAtOnce];
    float scales[kAtOnce], zeros[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * kStride;
      if (i >= count) break;
      const uint32_t from_block = in_block + i;
      const uint32_t block = first_block + (kFourBit ? from_block >> w.block_shift : from_block / w.block);
      codes[j].load(w.codes, first + i);
      scales[j] = load_scale(w, block);
      zeros[j] = !kFourBit && w.zeros ? float(__ldg(w.zeros + block)) : 0.f;
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = base + j * kStride;
      if (i >= count) break;
      uint32_t pairs[kDecodedTogether / 2];
#pragma unroll
      for (int pair = 0; pair < kDecodedTogether / 2; ++pair) {
        float values[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float number = codes[j].number(2 * pair + half, table);
          values[half] = (kFourBit ? number : number - zeros[j]) * scales[j];
        }
        pairs[pair] = pack<Element>(values[0], values[1]);
      }
      *reinterpret_cast<uint4*>(out + i) = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
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
  const int count = int(left < kPartElements ? left : kPartElements);
  // The table lies in a staging buffer: no tile of the output, which would store through it, comes before this one.
  const uint32_t table = c.shared.staging(c.warpgroup, 0);
  switch (w.code_format) {
    case CodeFormat::kNone:
      break;
    case CodeFormat::kNf4:
    case CodeFormat::kFp4:
      if (c.thread == 0) {
        w.code_format == CodeFormat::kNf4 ? store_table<CodeFormat::kNf4>(table) : store_table<CodeFormat::kFp4>(table);
      }
      c.sync_warpgroup();
      decode_part<FourBitCodes, true>(c, first, count, table);
      break;
    case CodeFormat::kInt8:
      decode_part<ByteCodes<CodeFormat::kInt8>, false>(c, first, count, table);
      break;
    case CodeFormat::kFloat8E4M3:
      decode_part<ByteCodes<CodeFormat::kFloat8E4M3>, false>(c, first, count, table);
      break;
    case CodeFormat::kFloat8E5M2:
      decode_part<ByteCodes<CodeFormat::kFloat8E5M2>, false>(c, first, count, table);
      break;
  }
  fence_async_global();
  c.release_flag(panel_flag(c.params, tile.row));
}

}  // namespace fastlora::sm90
