// Policy: the base weight. It defines how many bytes of a stage a tile's columns occupy, how a step of them is copied
// there, and by which descriptor the base product reads them.
//
// Today's one: 16-bit elements, as they lie in memory. The next one (packed 4 bit, int8 or fp8 with scales) goes here:
// a struct with the same members, whose kConverts is true and whose convert() the consumers run between wait_stage()
// and the base product; KernelTraits::BaseWeight names it.
#pragma once
#include "layout.cuh"

namespace fastlora::sm90 {

// kTransposed_: the operand is not contiguous along the contraction. A forward contracts the columns of a W0 that lies
// as [out_features, in_features], dX its rows; of one that lies as [in_features, out_features], it is the other way
// round.
template <bool kTransposed_, int kBlockN>
struct DenseWeight {
  static constexpr bool kTransposed = kTransposed_;
  static constexpr bool kConverts = false;
  static constexpr int kStageBytes = kBlockN * kSwizzleSpan;
  static constexpr int kAdvance = kTransposed ? kAdvanceStrided<kSwizzleSpan> : kAdvanceContiguous;

  // Copies columns n to n + kBlockN, contracted elements k to k + kBlockK, of `matrix` in a stack of weights.
  template <class Producer, class Matrix>
  __device__ __forceinline__ static void load(Producer& producer, uint32_t address, Matrix matrix, int n, int k) {
    constexpr int kColumns = kTransposed ? kBox : kTallBox;  // of the output, in a box
    producer.template share_boxes<kBlockN / kColumns>(0, [&](int i) {
      const int column = i * kColumns;
      const uint32_t box = address + column * kSwizzleSpan;
      if constexpr (kTransposed) {
        producer.copy_to_cluster(box, &producer.params.weight, matrix, n + column, k);
      } else {
        producer.copy_to_cluster(box, &producer.params.weight, matrix, k, n + column);
      }
    });
  }

  __device__ __forceinline__ static uint64_t operand(uint32_t address, int column) {
    return swizzled_operand<kSwizzleSpan>(address + column * kSwizzleSpan, kBoxBytes);
  }
};

}  // namespace fastlora::sm90
