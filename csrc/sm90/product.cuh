// A tile of out = act*weight^T + S*up^T, of S = scale * act*down^T, or of both, by two consumer warpgroups.
#pragma once
#include "decode_stage.cuh"
#include "epilogue.cuh"

namespace fastlora::sm90 {

// kCount fragments, from number `first` on, of a 64 x 64 block of the activations, dropped elements zeroed. The block
// starts at (row, k) of X.
template <int kCount, class Traits>
__device__ __forceinline__ void load_dropped(const Consumer<Traits>& c, uint32_t (&fragments)[kCount][4], uint32_t box,
                                             int row, int k, int first) {
  const uint32_t lane = lane_id(), block_row = c.warp * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    load_matrix(fragments[i], chunk_address(box, block_row, (first + i) * 2 + lane / 16));
    uint32_t words[4];
    fragment_words(words, c.dropout, row, k + (first + i) * kMmaK);
#pragma unroll
    for (int j = 0; j < 4; ++j) fragments[i][j] = drop(fragments[i][j], words[j], c.dropout.last_dropped);
  }
  __syncwarp();  // one lane releases the stage for all, which must have read it
}

// The tile's contraction over the layer at hand, without the expand steps: acc = act*weight^T if kBase, which
// `continues` has added to what is there; shrink_acc = act*down^T if kShrink. `conversion` runs between a stage's
// copies and the base product.
template <bool kBase, bool kShrink, class Traits, class Conversion>
__device__ __forceinline__ void multiply(Consumer<Traits>& c, typename Traits::Tile tile,
                                         float (&acc)[Traits::kAccumulators],
                                         float (&shrink_acc)[Traits::kShrinkAccumulators], KeepBits<Traits>& keep,
                                         Conversion conversion, bool continues = false) {
  using Element = typename Traits::Element;
  using BaseWeight = typename Traits::BaseWeight;
  using Branch = typename Traits::Branch;
  constexpr int kTransposed = Traits::kBackward;  // the shrinking factor is contiguous along the ranks
  constexpr bool kDropsAct = kShrink && Traits::kDropout && !Traits::kBackward;
  constexpr bool kDrawsKeepBits = kBase && Traits::kDropout && Traits::kBackward;
  constexpr int kSteps = kBase ? 1 : Traits::kShrinkSteps;  // of a stage
  constexpr int kDownOffset =
      kBase ? (Traits::kFuses ? Traits::kFusedDownOffset : Traits::kWeightOffset) : Traits::kShrinkDownOffset;
  const int row = c.first_row(tile) + c.fragment_row();
  const int column = c.first_column(tile);
  const Steps steps = steps_of<Traits>(c.params, c.own(), tile.split);
  int drawn = 0;
#pragma unroll 1
  for (int step = steps.first; step < steps.end; step += kSteps) {
    const uint32_t stage = c.wait_stage();
    if constexpr (kBase) conversion.convert(c, stage, step);
    wgmma_fence();
    if constexpr (kBase) {
      const uint64_t act = swizzled_operand<kSwizzleSpan>(stage + c.warpgroup_row * kBoxBytes);
      const uint64_t weight = BaseWeight::operand(stage + Traits::kWeightOffset, c.warpgroup_column * Traits::kColumns);
#pragma unroll
      for (int i = 0; i < kMmasPerStep; ++i) {
        wgmma<Element, 0, BaseWeight::kTransposed>(acc, advance(act, i * kAdvanceContiguous),
                                                   advance(weight, i * BaseWeight::kAdvance),
                                                   continues || step > steps.first || i > 0);
      }
    }
    if constexpr (kBase && kDropsAct) wgmma_commit();
#pragma unroll
    for (int j = 0; j < (kShrink ? kSteps : 0); ++j) {
      const uint32_t box = stage + j * Traits::kActBytes + c.warpgroup_row * kBoxBytes;
      const uint64_t act = swizzled_operand<kSwizzleSpan>(box);
      const uint64_t down = Branch::down_operand(stage + kDownOffset + j * Traits::kDownBytes);
      const bool accumulates = step > steps.first || j > 0;
      if constexpr (kDropsAct) {
        wgmma_wait<kBase>();
        // The previous step's shrink product is done: its stage and its fragments are free.
        if (j == 0) c.advance_stage();
        constexpr int kFragments = kBase ? Traits::kFusedFragments : kMmasPerStep;
        uint32_t fragments[kFragments][4];
#pragma unroll
        for (int first = 0; first < kMmasPerStep; first += kFragments) {
          if (first > 0) wgmma_wait<0>();
          load_dropped(c, fragments, box, row, (step + j) * kBlockK, first);
          wgmma_fence();
#pragma unroll
          for (int i = 0; i < kFragments; ++i) {
            wgmma<Element, 0>(shrink_acc, fragments[i], advance(down, (first + i) * Branch::kDownAdvance),
                              accumulates || first + i > 0);
          }
          wgmma_commit();
        }
      } else {
#pragma unroll
        for (int i = 0; i < kMmasPerStep; ++i) {
          wgmma<Element, 0, kTransposed>(shrink_acc, advance(act, i * kAdvanceContiguous),
                                         advance(down, i * Branch::kDownAdvance), accumulates || i > 0);
        }
      }
    }
    if constexpr (!kDropsAct) {
      wgmma_commit();
      if constexpr (kDrawsKeepBits) {
        if (drawn < KeepBits<Traits>::kCalls) keep.append(c, row, column, drawn++);
      }
      wgmma_wait<1>();
      c.advance_stage();
    }
  }
  if constexpr (kDrawsKeepBits) {
#pragma unroll 1
    while (drawn < KeepBits<Traits>::kCalls) keep.append(c, row, column, drawn++);
  }
  // If nothing reads the accumulators before the expand product, do not wait; issue it behind the wgmmas in flight.
  // (From one loop over projections to another, the assembler would lose sight of these.)
  constexpr bool kLoops = Traits::kShared && Traits::kBackward;
  if constexpr (kShrink || Traits::kSplits || kDrawsKeepBits || Traits::kSplitsScaling || kLoops) {
    wgmma_wait<0>();
    c.release_in_flight_stage();
    if constexpr (kBase) pin(acc);
    if constexpr (kShrink) pin(shrink_acc);
  }
}

// Scales and rounds this warpgroup's rows of S, stores them and releases the row block's flag. `s` becomes the
// fragments of S as the left operand of the expand product.
template <class Traits>
__device__ __forceinline__ void store_s(Consumer<Traits>& c, typename Traits::Tile tile,
                                        const float (&shrink_acc)[Traits::kShrinkAccumulators],
                                        uint32_t (&s)[Traits::kRank / kMmaK][4]) {
  using Element = typename Traits::Element;
  using Branch = typename Traits::Branch;
  using RowMap = typename Traits::RowMap;
  const float scale_in_s = Branch::scale_in_s(c.own(), tile);
  const int row = c.first_row(tile) + c.fragment_row();
  const int to_s = RowMap::first_row_of_s(tile) - RowMap::first_row(tile);
  auto* out = static_cast<Element*>(c.own().s_out);
  [[maybe_unused]] auto* kept = static_cast<Element*>(c.params.segments.kept_s);
#pragma unroll
  for (int i = 0; i < Traits::kRank / kMmaK; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* pair = shrink_acc + i * 8 + j * 2;
      s[i][j] = pack<Element>(Branch::scale(c.own(), scale_in_s, pair[0]), Branch::scale(c.own(), scale_in_s, pair[1]));
      const int m = row + j % 2 * 8, r = i * kMmaK + j / 2 * 8 + c.fragment_column();
      if (c.warpgroup_column == 0 && RowMap::is_copied(c.params, m) && r < Branch::rank(c.own())) {
        *reinterpret_cast<uint32_t*>(out + int64_t(m + to_s) * Branch::rank(c.own()) + r) = s[i][j];
      }
      if constexpr (RowMap::kSegmented) {
        if (c.warpgroup_column == 0 && kept && m < tile.end_row && r < Branch::rank(c.own())) {
          *reinterpret_cast<uint32_t*>(kept + int64_t(m) * Branch::rank(c.own()) + r) = s[i][j];
        }
      }
    }
  }
  if (c.warpgroup_column == 0) {
    fence_async_global();
    c.release_flag(row_flag<Traits>(c.params, tile.row, c.layer));
  }
}

// Zeroes the padding ranks of S. They are not zero where the activations are infinite: their product with the zeros
// that stand in for the factor's missing ranks is NaN.
template <class Traits>
__device__ __forceinline__ void zero_padding_ranks(const Consumer<Traits>& c, uint32_t (&s)[Traits::kRank / kMmaK][4]) {
#pragma unroll
  for (int i = 0; i < Traits::kRank / kMmaK; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = i * kMmaK + j / 2 * 8 < Traits::Branch::rank(c.own()) ? s[i][j] : 0;
  }
}

// Serial reduction of a tile whose contraction is split: every split but the last stores its sums and returns false;
// the last one adds them to its own, in order.
template <bool kBase, bool kShrink, class Traits>
__device__ __forceinline__ bool reduce_splits(Consumer<Traits>& c, typename Traits::Tile tile,
                                              float (&acc)[Traits::kAccumulators],
                                              float (&shrink_acc)[Traits::kShrinkAccumulators]) {
  if constexpr (Traits::kSplits) {
    const Schedule& schedule = c.params.schedule;
    const int column =
        kBase ? tile.column : schedule.columns - 1;  // the last number is free where S has separate tiles
    const int index = tile.row * schedule.columns + column, last = schedule.splits - 1;
    int* splits_done = c.reduction_flag(schedule.gradient_tiles + index);
    auto partials_of = [&](int split) {
      const int64_t number = (int64_t(index) * last + split) * kConsumerWarpgroups + c.warpgroup;
      return c.params.split_partials + number * Traits::kSplitPartials * kWarpgroupThreads;
    };
    constexpr int kShrinkOffset = Traits::kAccumulators * kWarpgroupThreads;
    const bool has_rows = c.first_row(tile) + int(c.warp) * 16 < c.params.m;
    if (tile.split < last) {
      if (has_rows) {
        if constexpr (kBase) transfer_partials<false>(acc, partials_of(tile.split), c.thread);
        if constexpr (kShrink) transfer_partials<false>(shrink_acc, partials_of(tile.split) + kShrinkOffset, c.thread);
      }
      c.release_flag(splits_done);
      return false;
    }
    if (last > 0) c.acquire_flag(splits_done, last);
#pragma unroll 1
    for (int split = 0; split < (has_rows ? last : 0); ++split) {
      if constexpr (kBase) transfer_partials<true>(acc, partials_of(split), c.thread);
      if constexpr (kShrink) transfer_partials<true>(shrink_acc, partials_of(split) + kShrinkOffset, c.thread);
    }
  }
  return true;
}

// A tile of dX, of all dS, or of both: contracted over all projections, one after the other, and then their branches.
// Also where it has made dS itself, that comes from memory: registers would not hold it for all.
template <class Traits>
__device__ __forceinline__ void compute_shared_tile(Consumer<Traits>& c, typename Traits::Tile tile,
                                                    float (&acc)[Traits::kAccumulators],
                                                    float (&extra_acc)[Traits::kExtraAccumulators]) {
  constexpr int kShrinkAccumulators = Traits::kShrinkAccumulators;
  Traits::Layers::each(c.params, tile, [&](int layer, bool) {
    c.choose(layer);
    const bool continues = layer > 0;
    KeepBits<Traits> keep;
    uint32_t s[Traits::kRank / kMmaK][4];
    if (tile.kind == kShrinkTile) {
      float (&shrink_acc)[kShrinkAccumulators] = slice<0, kShrinkAccumulators>(acc);
      multiply<false, true>(c, tile, acc, shrink_acc, keep, NoConversion());
      store_s(c, tile, shrink_acc, s);
    } else if (tile.kind == kFusedTile && c.has_branch(tile)) {
      float (&shrink_acc)[kShrinkAccumulators] = slice<0, kShrinkAccumulators>(extra_acc);
      multiply<true, true>(c, tile, acc, shrink_acc, keep, NoConversion(), continues);
      store_s(c, tile, shrink_acc, s);
    } else {
      float unused[kShrinkAccumulators];
      multiply<true, false>(c, tile, acc, unused, keep, NoConversion(), continues);
    }
    if (Traits::kDropout && tile.kind != kShrinkTile) keep.save(c);
  });
  if (tile.kind == kShrinkTile) return;
  Traits::Epilogue::run_several(c, tile, acc, extra_acc);
}

template <class Traits>
__device__ __forceinline__ void compute_output_tile(Consumer<Traits>& c, typename Traits::Tile tile, int slot,
                                                    float (&acc)[Traits::kAccumulators],
                                                    float (&extra_acc)[Traits::kExtraAccumulators]) {
  constexpr int kShrinkAccumulators = Traits::kShrinkAccumulators;
  if constexpr (Traits::kShared && Traits::kBackward) {
    compute_shared_tile(c, tile, acc, extra_acc);
    return;
  }
  if constexpr (Traits::kShared) c.choose(Traits::Layers::of_tile(tile));
  KeepBits<Traits> keep;
  uint32_t s[Traits::kRank / kMmaK][4];
  if (tile.kind == kShrinkTile) {
    float (&shrink_acc)[kShrinkAccumulators] = slice<0, kShrinkAccumulators>(acc);
    multiply<false, true>(c, tile, acc, shrink_acc, keep, NoConversion());
    if (reduce_splits<false, true>(c, tile, acc, shrink_acc)) store_s(c, tile, shrink_acc, s);
  } else if (tile.kind == kBaseTile) {
    float unused[kShrinkAccumulators];
    with_conversion(c, tile, [&](auto conversion) { multiply<true, false>(c, tile, acc, unused, keep, conversion); });
    if (reduce_splits<true, false>(c, tile, acc, unused)) finish_tile(c, tile, slot, acc, extra_acc, nullptr, keep);
  } else if constexpr (Traits::kFuses) {
    float (&shrink_acc)[kShrinkAccumulators] = slice<0, kShrinkAccumulators>(extra_acc);
    multiply<true, true>(c, tile, acc, shrink_acc, keep, NoConversion());
    if (reduce_splits<true, true>(c, tile, acc, shrink_acc)) {
      store_s(c, tile, shrink_acc, s);
      zero_padding_ranks(c, s);
      finish_tile(c, tile, slot, acc, extra_acc, s, keep);
    }
  }
}

}  // namespace fastlora::sm90
