// The dropout mask: Philox-4x32 with seven rounds, sixteen bits an element, one call for eight elements of a row.
// The same bits as fastlora/philox.py.
#pragma once
#include "ptx/thread.cuh"

namespace fastlora::sm90 {

constexpr int kElementsPerCall = 8;

struct Dropout {
  uint64_t seed;
  uint32_t last_dropped;   // the highest bits of an element that is dropped, in the upper half; ones in the lower
  uint32_t calls_per_row;  // of the masked matrix
};

// The 64-bit product. Written as a product of 64-bit integers it costs two additions more.
__device__ __forceinline__ uint64_t multiply_wide(uint32_t a, uint32_t b) {
  uint64_t product;
  asm("mul.wide.u32 %0, %1, %2;" : "=l"(product) : "r"(a), "r"(b));
  return product;
}

// Word w of the result holds the bits of elements 2w (low half) and 2w + 1 of the call's eight.
__device__ __forceinline__ uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t c0 = uint32_t(counter), c1 = uint32_t(counter >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64_t product0 = multiply_wide(c0, 0xD2511F53u), product1 = multiply_wide(c2, 0xCD9E8D57u);
    c0 = uint32_t(product1 >> 32) ^ c1 ^ k0;
    c1 = uint32_t(product1);
    c2 = uint32_t(product0 >> 32) ^ c3 ^ k1;
    c3 = uint32_t(product0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// The words of a 16 x 16 block in fragment order: words[i] covers columns 2q and 2q + 1 (q: the lane's index in its
// quad) of rows `row` (i even) and row + 8 (i odd), in the block's left (i < 2) and right half. Four calls serve a
// quad: each lane makes one, then the lanes exchange words.
__device__ __forceinline__ void fragment_words(uint32_t (&words)[4], const Dropout& dropout, uint32_t row,
                                               uint32_t column) {
  const uint32_t q = lane_id() & 3;
  const uint64_t counter = uint64_t(row + 8 * (q & 1)) * dropout.calls_per_row + column / kElementsPerCall + (q >> 1);
  uint4 w = philox(dropout.seed, counter);
  const bool odd = q & 1, upper = q & 2;
  uint32_t first = __shfl_xor_sync(kFullMask, odd ? w.x : w.y, 1);
  uint32_t second = __shfl_xor_sync(kFullMask, odd ? w.z : w.w, 1);
  if (odd) {
    w.x = first;
    w.z = second;
  } else {
    w.y = first;
    w.w = second;
  }
  first = __shfl_xor_sync(kFullMask, upper ? w.x : w.z, 2);
  second = __shfl_xor_sync(kFullMask, upper ? w.y : w.w, 2);
  words[0] = upper ? first : w.x;
  words[1] = upper ? second : w.y;
  words[2] = upper ? w.z : first;
  words[3] = upper ? w.w : second;
}

// Compared in the upper half of a register: the lower half of `word`, whose bits cannot decide, need not be cleared.
__device__ __forceinline__ bool keeps_low(uint32_t word, uint32_t last_dropped) { return word << 16 > last_dropped; }
__device__ __forceinline__ bool keeps_high(uint32_t word, uint32_t last_dropped) { return word > last_dropped; }

// Zeroes the dropped ones of two packed elements.
__device__ __forceinline__ uint32_t drop(uint32_t packed, uint32_t word, uint32_t last_dropped) {
  if (!keeps_low(word, last_dropped)) packed &= 0xffff0000u;
  if (!keeps_high(word, last_dropped)) packed &= 0x0000ffffu;
  return packed;
}

}  // namespace fastlora::sm90
