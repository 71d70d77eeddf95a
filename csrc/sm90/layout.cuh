// How operands lie in shared memory.
#pragma once
#include "../host/params.h"
#include "ptx/wgmma.cuh"

namespace fastlora::sm90 {

// One warpgroup product instruction: 64 rows of 16 contracted elements.
constexpr int kMmaM = 64, kMmaK = 16;

constexpr int kBlockK = kBox;  // contracted elements of a step: one swizzle span
constexpr int kMmasPerStep = kBlockK / kMmaK;
constexpr int kBoxBytes = kBox * kSwizzleSpan;
constexpr int kSwizzleRows = 8;  // the swizzle's pattern repeats after these
constexpr int kChunkBytes = 16;  // what the swizzle permutes within a span, and what ldmatrix reads of a row
constexpr int kChunkElements = kChunkBytes / kElementBytes;

// From one instruction's operand to the next along the contraction: where that is contiguous, and where it is not, in
// rows of kSpan bytes.
constexpr int kAdvanceContiguous = kMmaK * kElementBytes;
template <int kSpan>
constexpr int kAdvanceStrided = kMmaK * kSpan;

// An operand in rows of kSpan bytes, swizzled. kNoLeading: no instruction steps from span to span.
constexpr uint32_t kNoLeading = 16;
template <int kSpan>
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address, uint32_t leading = kNoLeading) {
  return descriptor<kSpan>(address, leading, kSwizzleRows * kSpan);
}

// Address of chunk number `chunk` of a row in a box.
__device__ __forceinline__ uint32_t chunk_address(uint32_t box, uint32_t row, uint32_t chunk) {
  return box + row * kSwizzleSpan + ((chunk ^ (row & (kSwizzleRows - 1))) << 4);
}

}  // namespace fastlora::sm90
