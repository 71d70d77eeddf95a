// Policy: the base weight. It defines how many bytes of a stage a tile's columns occupy, how a step of them is copied
// there, and by which descriptor the base product reads them.
//
// Today's four: 16-bit elements, as they lie in memory, one way or the other, and packed ones, which tiles at the head
// of the queue have decoded to such (decode.cuh), or consumers decode between wait_stage() and the base product
// (kConverts, decode_stage.cuh). The next one goes here: a struct with the same members; a template argument of
// KernelTraits names it.
#pragma once
#include "layout.cuh"
#include "row_map.cuh"

namespace fastlora::sm90 {

// 16-bit elements. kTransposed: the operand is not contiguous along the contraction. A forward contracts the columns of
// a W0 that lies as [out_features, in_features], dX its rows; of one that lies as [in_features, out_features]
// (kStoredTransposed), it is the other way round.
template <bool kBackward, bool kStoredTransposed_, int kBlockN>
struct StoredWeight {
  static constexpr bool kStoredTransposed = kStoredTransposed_, kTransposed = kBackward != kStoredTransposed;
  static constexpr bool kConverts = false, kDecodes = false;
  static constexpr int kStageBytes = kBlockN * kSwizzleSpan;
  static constexpr int kAdvance = kTransposed ? kAdvanceStrided<kSwizzleSpan> : kAdvanceContiguous;

  // Of a stage, that load() copies.
  __device__ __forceinline__ static constexpr uint32_t copied_bytes(const Params&) { return kStageBytes; }

  // Copies columns n to n + kBlockN, contracted elements k to k + kBlockK, of `matrix` in a stack of weights.
  template <class Producer, class Matrix>
  __device__ __forceinline__ static void load(Producer& producer, uint32_t address, Matrix matrix, int n, int k) {
    constexpr int kColumns = kTransposed ? kBox : kTallBox;  // of the output, in a box
    producer.template share_boxes<kBlockN / kColumns>(0, [&](int i) {
      const int column = i * kColumns;
      const uint32_t box = address + column * kSwizzleSpan;
      if constexpr (kTransposed) {
        producer.copy_to_cluster(box, &producer.own().weight, matrix, n + column, k);
      } else {
        producer.copy_to_cluster(box, &producer.own().weight, matrix, k, n + column);
      }
    });
  }

  // Returns once a column of tiles may load its columns.
  template <class Producer>
  __device__ __forceinline__ static void await(Producer&, int) {}

  __device__ __forceinline__ static uint64_t operand(uint32_t address, int column) {
    return swizzled_operand<kSwizzleSpan>(address + column * kSwizzleSpan, kBoxBytes);
  }
};

template <bool kBackward, int kBlockN>
struct DenseWeight : StoredWeight<kBackward, false, kBlockN> {};

template <bool kBackward, int kBlockN>
struct TransposedWeight : StoredWeight<kBackward, true, kBlockN> {};

template <bool kBackward, int kBlockN>
struct DecodedWeight : DenseWeight<kBackward, kBlockN> {
  static constexpr bool kDecodes = true;

  // A panel is the rows of W0 that a column of tiles reads. Tiles of dX read all rows: there is one.
  template <class Producer>
  __device__ __forceinline__ static void await(Producer& producer, int column) {
    producer.wait_panel(kBackward ? 0 : column);
  }
};

// Decoded, a step of the columns lies in the stage as a dense weight's, behind it its codes. `weight` maps these, as
// bytes.
template <bool kBackward, int kBlockN>
struct InLoopWeight : DenseWeight<kBackward, kBlockN> {
  static_assert(!kBackward && kBlockN == kTallBox, "codes lie in rows of W0, and one box has those of a tile");
  static constexpr bool kConverts = true;
  static constexpr int kCodesOffset = DenseWeight<kBackward, kBlockN>::kStageBytes;
  static constexpr int kStageBytes = kCodesOffset + kBlockN * kBlockK;  // a byte a code, or half of one

  __device__ __forceinline__ static uint32_t copied_bytes(const Params& params) {
    return kBlockN * code_bytes(params.packed.code_format, kBlockK);
  }

  template <class Producer>
  __device__ __forceinline__ static void load(Producer& producer, uint32_t address, OnlyMatrix, int n, int k) {
    const Params& params = producer.params;
    producer.copy(address + kCodesOffset, &params.weight, code_bytes(params.packed.code_format, k), n);
  }
};

}  // namespace fastlora::sm90
