// A gradient tile: grad[columns, R] = scale * sum over a group's rows of left[m, columns]^T * right[m, :].
//   dB and dbias: left = dY, right = S.    dA, stored transposed: left = X with dropout's mask, right = dS.
//
// Serial reduction: the groups' sums of a column block are added in the groups' order. Each tile waits for the partial
// sum of the group before, adds its own in fp32 and passes the sum on; the last one stores the gradient. So results are
// the same bits in every run, and memory does not grow with M. The tile of the group before was queued a whole group
// earlier, so the wait is rarely felt.
#pragma once
#include "consumer.cuh"
#include "ptx/tma.cuh"

namespace fastlora::sm90 {

// Zeroes the dropped elements of this warpgroup's columns of X, in place.
template <class Traits>
__device__ __forceinline__ void drop_in_place(const Consumer<Traits>& c, uint32_t left, int m, int column) {
  constexpr uint32_t kChunksPerRow = kSwizzleSpan / kChunkBytes;
  static_assert(kChunkElements == kElementsPerCall, "one call of the generator serves a chunk");
  const uint32_t chunk = c.thread % kChunksPerRow;
// Two calls at a time: within one, each product needs the one before.
#pragma unroll 2 / Traits::kGradBlocks
  for (uint32_t row = c.thread / kChunksPerRow; row < kBox; row += kWarpgroupThreads / kChunksPerRow) {
    const uint64_t counter = uint64_t(m + row) * c.dropout.calls_per_row + column / kElementsPerCall + chunk;
#pragma unroll
    for (int j = 0; j < Traits::kGradBlocks; ++j) {
      const uint32_t address = chunk_address(left + j * kBoxBytes, row, chunk);
      const uint4 words = philox(c.dropout.seed, counter + j * kBox / kElementsPerCall);
      uint4 x = load_shared_16(address);
      x.x = drop(x.x, words.x, c.dropout.last_dropped);
      x.y = drop(x.y, words.y, c.dropout.last_dropped);
      x.z = drop(x.z, words.z, c.dropout.last_dropped);
      x.w = drop(x.w, words.w, c.dropout.last_dropped);
      store_shared_16(address, x);
    }
  }
  fence_async_shared();
}

// Zeroes the rows of a stage that are another segment's, by both warpgroups: a row of either operand is contiguous.
template <class Traits>
__device__ __forceinline__ void zero_rows_from(Consumer<Traits>& c, uint32_t stage, int first) {
  constexpr int kRankSpan = Traits::Branch::kRankSpan, kLeftBoxes = Traits::kGradColumns / kBox;
  const uint32_t thread = c.warpgroup * kWarpgroupThreads + c.thread;
  auto zero = [&](uint32_t box, uint32_t span) {
    for (uint32_t at = first * span + thread * kChunkBytes; at < kBox * span;
         at += kConsumerWarpgroups * kWarpgroupThreads * kChunkBytes) {
      store_shared_16(box + at, make_uint4(0, 0, 0, 0));
    }
  };
#pragma unroll 1
  for (int i = 0; i < kLeftBoxes; ++i) zero(stage + i * kBoxBytes, kSwizzleSpan);
  zero(stage + Traits::kGradRightOffset, kRankSpan);
  fence_async_shared();
  c.sync_consumers();
}

// Block 0 of this warpgroup's columns is summed in acc, block 1 in extra_acc; the columns' own sums, where
// kSumsColumns, in ones_acc, as products with a matrix of ones.
template <bool kDrops, bool kSumsColumns, class Traits>
__device__ __forceinline__ void accumulate(Consumer<Traits>& c, typename Traits::Tile tile,
                                           float (&acc)[Traits::kAccumulators],
                                           float (&extra_acc)[Traits::kExtraAccumulators],
                                           float (&ones_acc)[Traits::kGradBlocks][Traits::kOnesAccumulators]) {
  using Element = typename Traits::Element;
  constexpr int kRankSpan = Traits::Branch::kRankSpan, kCount = Traits::kShrinkAccumulators;
  using RowMap = typename Traits::RowMap;
  const Steps steps = RowMap::gradient_steps(c.params, tile);
  const int column = tile.column * Traits::kGradColumns + c.warpgroup * Traits::kGradBlocks * kBox;
  // Any layout of a matrix of ones is the same matrix; this one is the smallest.
  const uint64_t ones = swizzled_operand<kMmaK * kElementBytes>(c.shared.ones());
#pragma unroll 1
  for (int step = steps.first; step < steps.end; ++step) {
    const uint32_t stage = c.wait_stage();
    const uint32_t left_address = stage + c.warpgroup * Traits::kGradBlocks * kBoxBytes;
    const uint64_t left = swizzled_operand<kSwizzleSpan>(left_address, kBoxBytes);
    const uint64_t right = swizzled_operand<kRankSpan>(stage + Traits::kGradRightOffset, kBoxBytes);
    if constexpr (kDrops) {
      drop_in_place(c, left_address, RowMap::row_of_step(tile, step), column);
      c.sync_warpgroup();
    }
    if constexpr (RowMap::kSegmented) {
      const int rows = tile.end_row - RowMap::row_of_step(tile, step);
      if (rows < kBox) zero_rows_from(c, stage, rows);
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < kMmasPerStep; ++i) {
      const int accumulates = step > steps.first || i > 0;
      const uint64_t block = advance(left, i * kAdvanceStrided<kSwizzleSpan>);
      const uint64_t next_block = advance(block, kBoxBytes), ranks = advance(right, i * kAdvanceStrided<kRankSpan>);
      wgmma<Element, 1, 1>(slice<0, kCount>(acc), block, ranks, accumulates);
      if constexpr (kSumsColumns) wgmma<Element, 1, 0>(ones_acc[0], block, ones, accumulates);
      if constexpr (Traits::kGradBlocks == 2) {
        wgmma<Element, 1, 1>(slice<0, kCount>(extra_acc), next_block, ranks, accumulates);
        if constexpr (kSumsColumns) wgmma<Element, 1, 0>(ones_acc[1], next_block, ones, accumulates);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    c.advance_stage();
  }
  wgmma_wait<0>();
  c.release_in_flight_stage();
  pin(acc);
  pin(extra_acc);
  if constexpr (kSumsColumns) {
#pragma unroll
    for (int j = 0; j < Traits::kGradBlocks; ++j) pin(ones_acc[j]);
  }
}

template <class Element>
__device__ __forceinline__ void store_pair(void* out, int64_t offset, int64_t step, float first, float second,
                                           bool fp32) {
  if (fp32) {
    static_cast<float*>(out)[offset] = first;
    static_cast<float*>(out)[offset + step] = second;
  } else {
    const uint32_t packed = pack<Element>(first, second);
    static_cast<uint16_t*>(out)[offset] = uint16_t(packed);
    static_cast<uint16_t*>(out)[offset + step] = uint16_t(packed >> 16);
  }
}

// The 64 columns (of X or dY) from `first_column` on, of dA = dS^T * drop(X), [R, in_features], or of dB,
// [out_features, R]; `owner`: of which matrix in a stack.
template <bool kIsA, bool kSumsColumns, class Traits>
__device__ __forceinline__ void store_gradient(const Consumer<Traits>& c, int owner, int first_column,
                                               const float (&product)[Traits::kShrinkAccumulators],
                                               const float (&ones_acc)[Traits::kOnesAccumulators]) {
  using Element = typename Traits::Element;
  const Params& params = c.own();
  const int columns = kIsA ? params.n : params.k;  // n and k are the output's: in_features and out_features
  const int64_t column_step = kIsA ? 1 : params.r, rank_step = kIsA ? params.n : 1;
  const float scale = kIsA ? params.inverse_keep : kIsFp16<Element> ? params.scale_on_branch : 1.f;
  void* out = kIsA ? params.grad_a : params.grad_b;
#pragma unroll
  for (int lower = 0; lower < 2; ++lower) {
    const int column = first_column + c.fragment_row() + lower * 8;
    if (column >= columns) continue;
    if (kIsA || out) {
#pragma unroll
      for (int i = 0; i < Traits::kRank / 8; ++i) {
        const int r = i * 8 + c.fragment_column();
        if (r >= params.r) continue;
        const float* pair = product + i * 4 + lower * 2;
        const int64_t offset = int64_t(owner) * columns * params.r + column * column_step + r * rank_step;
        store_pair<Element>(out, offset, rank_step, pair[0] * scale, pair[1] * scale, params.fp32_grads);
      }
    }
    if (kSumsColumns && params.grad_bias && lane_id() % 4 == 0) {
      static_cast<uint16_t*>(params.grad_bias)[column] = uint16_t(pack<Element>(ones_acc[lower * 2], 0.f));
    }
  }
}

template <bool kIsA, bool kSumsColumns, class Traits>
__device__ __forceinline__ void compute_gradient(Consumer<Traits>& c, typename Traits::Tile tile,
                                                 float (&acc)[Traits::kAccumulators],
                                                 float (&extra_acc)[Traits::kExtraAccumulators]) {
  using RowMap = typename Traits::RowMap;
  constexpr int kCount = Traits::kShrinkAccumulators, kOnes = Traits::kOnesAccumulators;
  float ones_acc[Traits::kGradBlocks][kOnes];
  accumulate<kIsA && Traits::kDropout, kSumsColumns>(c, tile, acc, extra_acc, ones_acc);
  const ReductionStep step = RowMap::reduction_step(c.params, c.shared.segment_table(), tile);
  const int owner = RowMap::owner(tile);
  const int first = Traits::Layers::first_gradient(c.params, c.layer) * Traits::kCluster;
  const int block = owner * c.params.schedule.gradient_tiles * Traits::kCluster + first +
                    (kIsA ? c.own().grad_b_tiles * Traits::kCluster : 0) + tile.column;
  int* steps_done = c.reduction_flag(block);
  float* partials = c.params.gradient_partials +
                    int64_t(block * kConsumerWarpgroups + c.warpgroup) * Traits::kGradPartials * kWarpgroupThreads;
  auto transfer = [&](auto adds) {
    constexpr bool kAdd = decltype(adds)::value;
    transfer_partials<kAdd>(slice<0, kCount>(acc), partials, c.thread);
    if constexpr (kSumsColumns) transfer_partials<kAdd>(ones_acc[0], partials + kCount * kWarpgroupThreads, c.thread);
    if constexpr (Traits::kGradBlocks == 2) {
      float* of_block_1 = partials + (kCount + kOnes) * kWarpgroupThreads;
      transfer_partials<kAdd>(slice<0, kCount>(extra_acc), of_block_1, c.thread);
      if constexpr (kSumsColumns) {
        transfer_partials<kAdd>(ones_acc[1], of_block_1 + kCount * kWarpgroupThreads, c.thread);
      }
    }
  };
  if (step.index > 0) {
    c.acquire_flag(steps_done, step.index);
    transfer(std::true_type());
  }
  if (step.index < step.last) {
    transfer(std::false_type());
    c.release_flag(steps_done);
    return;
  }
  const int column = tile.column * Traits::kGradColumns + c.warpgroup * Traits::kGradBlocks * kBox;
  store_gradient<kIsA, kSumsColumns>(c, owner, column, slice<0, kCount>(acc), ones_acc[0]);
  if constexpr (Traits::kGradBlocks == 2) {
    store_gradient<kIsA, kSumsColumns>(c, owner, column + kBox, slice<0, kCount>(extra_acc), ones_acc[1]);
  }
}

template <class Traits>
__device__ __forceinline__ void compute_gradient_tile(Consumer<Traits>& c, typename Traits::Tile tile,
                                                      float (&acc)[Traits::kAccumulators],
                                                      float (&extra_acc)[Traits::kExtraAccumulators]) {
  if constexpr (Traits::kShared) c.choose(Traits::Layers::of_tile(tile));
  if (tile.kind == kGradATile) {
    compute_gradient<true, false>(c, tile, acc, extra_acc);
    return;
  }
  if constexpr (!Traits::RowMap::kSegmented) {
    if (Traits::kRank >= 128 || c.own().grad_bias) {  // a third loop over so many accumulators would spill
      compute_gradient<false, true>(c, tile, acc, extra_acc);
      return;
    }
  }
  compute_gradient<false, false>(c, tile, acc, extra_acc);
}

// Zeros in a column block of the gradients of those adapters, out of the tile's, that have no rows.
template <class Traits>
__device__ __forceinline__ void zero_gradients(Consumer<Traits>& c, typename Traits::Tile tile) {
  const bool is_a = tile.column >= c.params.grad_b_tiles;
  const int block = is_a ? tile.column - c.params.grad_b_tiles : tile.column;
  const int column = block * Traits::kGradColumns + c.warpgroup * Traits::kGradBlocks * kBox;
  const float zeros[Traits::kShrinkAccumulators] = {}, no_sums[Traits::kOnesAccumulators] = {};
  const int end = min(tile.row + kAdaptersOfZeroTile, c.params.segments.n_adapters);
#pragma unroll 1
  for (int adapter = tile.row; adapter < end; ++adapter) {
    if (Traits::RowMap::count_chunks(c.params, c.shared.segment_table(), adapter, 0).last >= 0) continue;
    static_assert(!Traits::RowMap::kSegmented || Traits::kGradBlocks == 1, "a warpgroup has one block of columns");
    if (is_a) {
      store_gradient<true, false>(c, adapter, column, zeros, no_sums);
    } else {
      store_gradient<false, false>(c, adapter, column, zeros, no_sums);
    }
  }
}

}  // namespace fastlora::sm90
