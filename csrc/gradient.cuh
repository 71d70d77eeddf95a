// A gradient tile: G[columns, R] = scale * sum over a group's rows of L[m, columns]^T * T[m, :].
//   dB and dbias: L = dY, T = S.    dA, stored transposed: L = X with dropout's mask, T = dS.
//
// The groups' sums of a column block are added up as a chain: each waits for the one before it, adds its own to the
// fp32 partial sum and passes it on; the last stores the gradient. So the order of the additions is fixed, results are
// the same bits in every run, and memory does not grow with M. The one before was queued a whole group earlier: nobody
// waits.
#pragma once
#include "consumer.cuh"

namespace fastlora {

// Zeroes the dropped elements of this warpgroup's columns of X, in place.
template <class T>
__device__ __forceinline__ void drop_in_place(const Consumer<T>& c, uint32_t left, int m, int column) {
  const uint32_t chunk = c.thread % 8;
#pragma unroll
  for (int j = 0; j < T::kGradBlocks; ++j) {
#pragma unroll 1
    for (uint32_t row = c.thread / 8; row < 64; row += 16) {
      const uint32_t address = left + j * kBoxBytes + row * 128 + ((chunk ^ (row & 7)) << 4);
      const uint64_t counter =
          uint64_t(m + row) * c.dropout.calls_per_row + (column + j * 64) / kElementsPerCall + chunk;
      const uint4 words = philox(c.dropout.seed, counter);
      uint4 x = load_shared_16(address);
      x.x = drop(x.x, words.x, c.dropout.threshold);
      x.y = drop(x.y, words.y, c.dropout.threshold);
      x.z = drop(x.z, words.z, c.dropout.threshold);
      x.w = drop(x.w, words.w, c.dropout.threshold);
      store_shared_16(address, x);
    }
  }
  fence_async_shared();
}

// Block 0 of this warpgroup's columns is summed in acc, block 1 in side.
template <bool kDrops, bool kSums, class T>
__device__ __forceinline__ void accumulate(Consumer<T>& c, TileInfo tile, float (&acc)[T::kAccumulators],
                                           float (&side)[T::kSide], float (&ones_sum)[T::kGradBlocks][4]) {
  using Element = typename T::Element;
  constexpr int kSpan = T::kChunk * 2, kProduct = T::kRank / 2;
  const Steps rows = rows_of_group<T>(c.p, tile.row);
  const int first = rows.first / 64, end = ceil_div(rows.end, 64);
  const int column = tile.column * T::kGradColumns + c.group * T::kGradBlocks * 64;
  // Any layout of a matrix of ones is the same matrix; this one is the smallest.
  const uint64_t ones = operand<32>(c.shared.ones(), 16, 256);
#pragma unroll 1
  for (int step = first; step < end; ++step) {
    const uint32_t stage = c.wait_stage();
    const uint32_t left_address = stage + c.group * T::kGradBlocks * kBoxBytes;
    const uint64_t left = operand<128>(left_address, kBoxBytes, 1024);
    const uint64_t right = operand<kSpan>(stage + T::kGradColumns * 128, kBoxBytes, kSpan * 8);
    if constexpr (kDrops) {
      drop_in_place(c, left_address, step * 64, column);
      c.sync_group();
    }
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int more = step > first || i > 0;
      const uint64_t block = advance(left, i * 2048), next_block = advance(block, kBoxBytes);
      const uint64_t ranks = advance(right, i * 16 * kSpan);
      wgmma<Element, 1, 1>(slice<0, kProduct>(acc), block, ranks, more);
      if constexpr (kSums) wgmma<Element, 1, 0>(ones_sum[0], block, ones, more);
      if constexpr (T::kGradBlocks == 2) {
        wgmma<Element, 1, 1>(slice<0, kProduct>(side), next_block, ranks, more);
        if constexpr (kSums) wgmma<Element, 1, 0>(ones_sum[1], next_block, ones, more);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    c.turn_stage();
  }
  wgmma_wait<0>();
  c.release_stage();
  pin(acc);
  pin(side);
  if constexpr (kSums) {
#pragma unroll
    for (int j = 0; j < T::kGradBlocks; ++j) pin(ones_sum[j]);
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

// Of dA = dS^T * drop(X), [R, in], or dB, [out, R], the 64 columns (of X or dY) from `first_column` on.
template <bool kIsA, bool kSums, class T>
__device__ __forceinline__ void store_gradient(const Consumer<T>& c, int first_column,
                                               const float (&product)[T::kRank / 2], const float (&ones_sum)[4]) {
  using Element = typename T::Element;
  const Params& p = c.p;
  const int columns = kIsA ? p.n : p.k;  // n and k are C's: in_features and out_features
  const int64_t column_step = kIsA ? 1 : p.r, rank_step = kIsA ? p.n : 1;
  const float scale = kIsA ? p.inverse_keep : kIsHalf<Element> ? p.branch_scale : 1.f;
  void* out = kIsA ? p.grad_a : p.grad_b;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int column = first_column + c.fragment_row() + half * 8;
    if (column >= columns) continue;
    if (kIsA || out) {
#pragma unroll
      for (int i = 0; i < T::kRank / 8; ++i) {
        const int r = i * 8 + c.fragment_column();
        if (r >= p.r) continue;
        const float* pair = product + i * 4 + half * 2;
        store_pair<Element>(out, column * column_step + r * rank_step, rank_step, pair[0] * scale, pair[1] * scale,
                            p.fp32_grads);
      }
    }
    if (kSums && p.grad_bias && lane_id() % 4 == 0) {
      static_cast<uint16_t*>(p.grad_bias)[column] = uint16_t(pack<Element>(ones_sum[half * 2], 0.f));
    }
  }
}

template <bool kIsA, bool kSums, class T>
__device__ __forceinline__ void gradient_tile(Consumer<T>& c, TileInfo tile, float (&acc)[T::kAccumulators],
                                              float (&side)[T::kSide]) {
  constexpr int kProduct = T::kRank / 2;
  float ones_sum[T::kGradBlocks][4];
  accumulate<kIsA && T::kDropout, kSums>(c, tile, acc, side, ones_sum);
  const int block = (kIsA ? c.p.blocks_b * T::kCluster : 0) + tile.column;
  int* chain = c.chain(block);
  float* partial = c.p.gradient_sums + int64_t(block * 2 + c.group) * T::kGradPlanes * 128;
  auto exchange_all = [&](auto load) {
    constexpr bool kLoad = decltype(load)::value;
    exchange<kLoad>(slice<0, kProduct>(acc), partial, c.thread);
    if constexpr (kSums) exchange<kLoad>(ones_sum[0], partial + kProduct * 128, c.thread);
    if constexpr (T::kGradBlocks == 2) {
      exchange<kLoad>(slice<0, kProduct>(side), partial + (kProduct + 4) * 128, c.thread);
      if constexpr (kSums) exchange<kLoad>(ones_sum[1], partial + (2 * kProduct + 4) * 128, c.thread);
    }
  };
  if (tile.row > 0) {
    c.wait_flag(chain, tile.row);
    exchange_all(std::true_type());
  }
  if (tile.row < ceil_div(c.p.schedule.rows, c.p.schedule.group_m) - 1) {
    exchange_all(std::false_type());
    c.publish(chain);
    return;
  }
  const int column = tile.column * T::kGradColumns + c.group * T::kGradBlocks * 64;
  store_gradient<kIsA, kSums>(c, column, slice<0, kProduct>(acc), ones_sum[0]);
  if constexpr (T::kGradBlocks == 2) {
    store_gradient<kIsA, kSums>(c, column + 64, slice<0, kProduct>(side), ones_sum[1]);
  }
}

template <class T>
__device__ __forceinline__ void any_gradient_tile(Consumer<T>& c, TileInfo tile, float (&acc)[T::kAccumulators],
                                                  float (&side)[T::kSide]) {
  if (tile.kind == kGradientA) {
    gradient_tile<true, false>(c, tile, acc, side);
  } else if (T::kRank >= 128 || c.p.grad_bias) {  // a third loop over so many accumulators would spill
    gradient_tile<false, true>(c, tile, acc, side);
  } else {
    gradient_tile<false, false>(c, tile, acc, side);
  }
}

}  // namespace fastlora
