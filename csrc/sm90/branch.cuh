// Policy: the low-rank branch. It defines which boxes of the two factors a tile reads, and how a sum is scaled into S.
//
// Today's two: one adapter for all rows, and one for each segment of rows, both with all ranks for all columns. The
// next one (several stacked) goes here: a struct with the same members; KernelTraits::Branch names it.
#pragma once
#include "layout.cuh"
#include "row_map.cuh"

namespace fastlora::sm90 {

template <bool kBackward, int kRank, bool kSplitsScaling>
struct SingleAdapter {
  static constexpr int kRankStep = ranks_per_step(kRank);
  static constexpr int kRankSpan = kRankStep * kElementBytes;  // bytes of a row of a step's ranks
  static constexpr int kDownBytes = kRank * kSwizzleSpan;      // of a step of the contraction

  // The factor that shrinks: A [R, K], contiguous along K, or B [K, R], contiguous along the ranks.
  static constexpr int kDownSpan = kBackward ? kRankSpan : kSwizzleSpan;
  static constexpr int kDownAdvance = kBackward ? kAdvanceStrided<kDownSpan> : kAdvanceContiguous;

  // The factor that expands: B [N, R], contiguous along the ranks, or A [R, N], contiguous along N.
  static constexpr int kUpAdvance = kBackward ? kAdvanceStrided<kSwizzleSpan> : kAdvanceContiguous;

  __device__ __forceinline__ static int rank(const Params& params) { return params.r; }

  // Copies all ranks of contracted elements k to k + kBlockK, of `matrix` in a stack of factors; `first_box` numbers
  // the boxes of a stage.
  template <class Producer, class Matrix>
  __device__ __forceinline__ static void load_down(Producer& producer, int first_box, uint32_t address, Matrix matrix,
                                                   int k) {
    producer.template share_boxes<kRank / kRankStep>(first_box, [&](int i) {
      if constexpr (kBackward) {
        producer.copy_to_cluster(address + i * kBoxBytes, &producer.own().lora_b, matrix, i * kBox, k);
      } else {
        producer.copy_to_cluster(address + i * kBoxBytes, &producer.own().lora_a, matrix, k, i * kBox);
      }
    });
  }

  // Copies 64 columns of a step's ranks.
  template <class Producer, class Matrix>
  __device__ __forceinline__ static void load_up(Producer& producer, uint32_t address, Matrix matrix, int column,
                                                 int rank) {
    if constexpr (kBackward) {
      producer.copy_to_cluster(address, &producer.own().lora_a, matrix, column, rank);
    } else {
      producer.copy_to_cluster(address, &producer.own().lora_b, matrix, rank, column);
    }
  }

  __device__ __forceinline__ static uint64_t down_operand(uint32_t address) {
    return swizzled_operand<kDownSpan>(address, kBoxBytes);
  }

  __device__ __forceinline__ static uint64_t up_operand(uint32_t address) {
    return kBackward ? swizzled_operand<kSwizzleSpan>(address, kRankStep * kSwizzleSpan)
                     : swizzled_operand<kRankSpan>(address);
  }

  // S's factor in a tile.
  __device__ __forceinline__ static float scale_in_s(const Params& params, const TileInfo&) {
    return params.scale_in_s;
  }

  // An element of S, before it is rounded, from its sum of act*down^T and S's factor.
  __device__ __forceinline__ static float scale(const Params& params, float scale_in_s, float sum) {
    if constexpr (!kSplitsScaling) {
      return sum * scale_in_s;
    } else {
      // S is infinite exactly where the sum itself would be in fp16, whatever its scale.
      constexpr float kRoundsToInfinity = 65520.f;
      float s = sum * params.inverse_keep;
      if (fabsf(s) >= kRoundsToInfinity) s *= INFINITY;
      return s * scale_in_s;
    }
  }
};

// The adapter of a tile's segment, out of stacks.
template <bool kBackward, int kRank, bool kSplitsScaling>
struct AdapterOfSegment : SingleAdapter<kBackward, kRank, kSplitsScaling> {
  __device__ __forceinline__ static float scale_in_s(const Params& params, const SegmentTile& tile) {
    return params.segments.scalings ? params.segments.scalings[tile.adapter] : params.scale_in_s;
  }
};

}  // namespace fastlora::sm90
