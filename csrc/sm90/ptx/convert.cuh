// Pairs of 16-bit elements in a register.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace fastlora::sm90 {

template <class Element>
constexpr bool kIsFp16 = false;
template <>
constexpr bool kIsFp16<__half> = true;

// Two floats rounded into one register, `low` in its lower half.
template <class Element>
__device__ __forceinline__ uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Their inverse: the lower half becomes x.
template <class Element>
__device__ __forceinline__ float2 unpack(uint32_t packed);

#define FL_UNPACK(TYPE)                                                                                             \
  float2 pair;                                                                                                      \
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.f32." TYPE " %0, low;\ncvt.f32." TYPE " %1, high;\n}" \
      : "=f"(pair.x), "=f"(pair.y)                                                                                  \
      : "r"(packed));                                                                                               \
  return pair

template <>
__device__ __forceinline__ float2 unpack<__nv_bfloat16>(uint32_t packed) {
  FL_UNPACK("bf16");
}

template <>
__device__ __forceinline__ float2 unpack<__half>(uint32_t packed) {
  FL_UNPACK("f16");
}

#undef FL_UNPACK

// Four bytes out of eight, `low`'s first: each nibble of the selector, below 8, is the number of one.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

}  // namespace fastlora::sm90
