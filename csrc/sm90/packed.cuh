// A packed base weight: its codes and scales, and the numbers that they stand for.
//
// An element is code * scale in fp32, rounded once: the bits of the library that packed the weight. A nested scale is
// code2 * absmax2 + offset, rounded after each of the two, which a fused multiply-add would not.
#pragma once
#include "../host/params.h"
#include "ptx/convert.cuh"
#include "ptx/memory.cuh"

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
  constexpr float kFp4[8] = {
      0.f, 0.0052083334885537624f, 0.6666666865348816f, 1.f, 0.3333333432674408f, 0.5f, 0.1666666716337204f, 0.25f};
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

// A group of kDecodedTogether codes, and the numbers that they stand for. `table`: of 4-bit ones, in shared memory.
struct FourBitCodes {
  static constexpr bool kPowersOfTwo = true;  // block sizes are
  uint32_t word;

  __device__ __forceinline__ void load(const PackedWeight& w, int64_t group) {
    word = __ldg(static_cast<const uint32_t*>(w.codes) + group);
  }
  __device__ __forceinline__ float number(int i, uint32_t table) const {
    const uint32_t code = word >> 4 * (i ^ 1) & 15;  // the first of two in the high half
    return __uint_as_float(load_shared(table + code * sizeof(float)));
  }
};

template <CodeFormat kFormat>
struct ByteCodes {
  static constexpr bool kPowersOfTwo = false;
  uint2 words;

  __device__ __forceinline__ void load(const PackedWeight& w, int64_t group) {
    words = __ldg(static_cast<const uint2*>(w.codes) + group);
  }
  __device__ __forceinline__ float number(int i, uint32_t) const {
    const uint32_t byte = (i < 4 ? words.x : words.y) >> 8 * (i % 4) & 0xff;
    if constexpr (kFormat == CodeFormat::kInt8) return float(int8_t(byte));
    if constexpr (kFormat == CodeFormat::kFloat8E5M2) return unpack<__half>(byte << 8).x;
    // The bits of an e4m3 are those of an fp16 number whose exponent is too small by 8.
    const float number = unpack<__half>((byte & 0x80) << 8 | (byte & 0x7f) << 7).x * 256.f;
    return (byte & 0x7f) == 0x7f ? NAN : number;
  }
};

// The scale of a block, as it is loaded and then as a number: all loads of the first kind are in flight at once. `zero`
// is what is subtracted from a code first.
struct FloatScale {
  float scale;

  __device__ __forceinline__ void load(const PackedWeight& w, uint32_t block) {
    scale = __ldg(static_cast<const float*>(w.scales) + block);
  }
  __device__ __forceinline__ float value(const PackedWeight&) const { return scale; }
  __device__ __forceinline__ float zero() const { return 0.f; }
};

struct NestedScale {
  uint8_t inner;
  float outer;

  __device__ __forceinline__ void load(const PackedWeight& w, uint32_t block) {
    inner = __ldg(static_cast<const uint8_t*>(w.scales) + block);
    outer = __ldg(w.absmax2 + (block >> w.nested_shift));
  }
  __device__ __forceinline__ float value(const PackedWeight& w) const {
    return __fadd_rn(__fmul_rn(__ldg(w.code2 + inner), outer), __ldg(w.offset));
  }
  __device__ __forceinline__ float zero() const { return 0.f; }
};

// fp32, fp16 or bf16, with a zero point where there are any.
struct AnyScale {
  uint32_t bits;
  int8_t zero_point;

  __device__ __forceinline__ void load(const PackedWeight& w, uint32_t block) {
    bits = w.scale_format == ScaleFormat::kFloat32 ? __ldg(static_cast<const uint32_t*>(w.scales) + block)
                                                   : __ldg(static_cast<const uint16_t*>(w.scales) + block);
    zero_point = w.zeros ? __ldg(w.zeros + block) : int8_t(0);
  }
  __device__ __forceinline__ float value(const PackedWeight& w) const {
    if (w.scale_format == ScaleFormat::kFloat16) return unpack<__half>(bits).x;
    return __uint_as_float(w.scale_format == ScaleFormat::kFloat32 ? bits : bits << 16);
  }
  __device__ __forceinline__ float zero() const { return zero_point; }
};

// A group of codes with one scale, decoded.
template <class Element, class Codes>
__device__ __forceinline__ uint4 decode_group(const Codes& codes, float scale, float zero, uint32_t table) {
  uint32_t pairs[kDecodedTogether / 2];
#pragma unroll
  for (int pair = 0; pair < kDecodedTogether / 2; ++pair) {
    pairs[pair] = pack<Element>((codes.number(2 * pair, table) - zero) * scale,
                                (codes.number(2 * pair + 1, table) - zero) * scale);
  }
  return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

}  // namespace fastlora::sm90
