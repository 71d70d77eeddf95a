// A tile of C = U*V^T + S*P^T, of S = scale * U*D^T, or of both, by two warpgroups.
#pragma once
#include "consumer.cuh"

namespace fastlora {

// Which of a thread's accumulators of dX's branch dropout keeps: one bit each, 64 columns a word.
template <class T>
struct KeepBits {
  static constexpr int kWords = T::kColumns / 64, kCalls = T::kColumns / 16;
  uint32_t words[kWords];

  // Appends the bits of call `i`'s sixteen columns. Called kCalls times, in order; between products, whose latency
  // hides it.
  __device__ __forceinline__ void append(const Consumer<T>& c, int row, int column, int i) {
    uint32_t bits[4];
    fragment_words(bits, c.dropout, row, column + i * 16);
    uint32_t fresh = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      fresh |= uint32_t(keeps_low(bits[j], c.dropout.threshold)) << (2 * j);
      fresh |= uint32_t(keeps_high(bits[j], c.dropout.threshold)) << (2 * j + 1);
    }
#pragma unroll
    for (int j = 0; j + 1 < kWords; ++j) words[j] = __funnelshift_r(words[j], words[j + 1], 8);
    words[kWords - 1] = words[kWords - 1] >> 8 | fresh << 24;
  }
};

// The fragments of a 64 x 64 block of U, dropped elements zeroed.
template <class T>
__device__ __forceinline__ void load_dropped(const Consumer<T>& c, uint32_t (&fragments)[4][4], uint32_t u, int row,
                                             int k) {
  const uint32_t lane = lane_id(), block_row = c.warp * 16 + lane % 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    load_matrix(fragments[i], u + block_row * 128 + (((i * 2 + lane / 16) ^ (block_row & 7)) << 4));
    uint32_t words[4];
    fragment_words(words, c.dropout, row, k + i * 16);
#pragma unroll
    for (int j = 0; j < 4; ++j) fragments[i][j] = drop(fragments[i][j], words[j], c.dropout.threshold);
  }
  __syncwarp();  // the lane that gives the stage back does so for all
}

// The tile's contraction, without the expand steps: acc = U*V^T if kMain, side = U*D^T if kSide.
template <bool kMain, bool kSide, class T>
__device__ __forceinline__ void multiply(Consumer<T>& c, TileInfo tile, float (&acc)[T::kAccumulators],
                                         float (&side)[T::kRank / 2], KeepBits<T>& keep) {
  using Element = typename T::Element;
  constexpr int kTransposed = T::kBackward;  // V and D are contiguous along N, not along the contraction
  constexpr bool kDropsU = kSide && T::kDropout && !T::kBackward;
  constexpr bool kDraws = kMain && T::kDropout && T::kBackward;
  constexpr int kDSpan = !T::kBackward ? 128 : T::kChunk * 2;
  constexpr int kSteps = kMain ? 1 : T::kShrinkSteps, kDOffset = kMain ? T::kDOffset : T::kShrinkDOffset;  // of a stage
  const int row = tile.row * T::kBlockM + c.group_m * 64 + c.fragment_row();
  const int column = tile.column * T::kBlockN + c.group_n * T::kColumns;
  const Steps steps = steps_of<T>(c.p, tile.part);
  int drawn = 0;
#pragma unroll 1
  for (int step = steps.first; step < steps.end; step += kSteps) {
    const uint32_t stage = c.wait_stage();
    wgmma_fence();
    if constexpr (kMain) {
      const uint64_t u = operand<128>(stage + c.group_m * kBoxBytes, 16, 1024);
      const uint64_t v = operand<128>(stage + T::kVOffset + c.group_n * T::kColumns * 128, kBoxBytes, 1024);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        wgmma<Element, 0, kTransposed>(acc, advance(u, i * 32), advance(v, i * (kTransposed ? 2048 : 32)),
                                       step > steps.first || i > 0);
      }
    }
    if constexpr (kMain && kDropsU) wgmma_commit();
#pragma unroll
    for (int j = 0; j < (kSide ? kSteps : 0); ++j) {
      const uint32_t u_address = stage + j * T::kUBytes + c.group_m * kBoxBytes;
      const uint64_t u = operand<128>(u_address, 16, 1024);
      const uint64_t d = operand<kDSpan>(stage + kDOffset + j * T::kDBytes, kBoxBytes, kDSpan * 8);
      const bool more = step > steps.first || j > 0;
      if constexpr (kDropsU) {
        wgmma_wait<kMain>();
        // The last step's side product is done: its stage and its fragments are free.
        if (j == 0) c.turn_stage();
        uint32_t fragments[4][4];
        load_dropped(c, fragments, u_address, row, (step + j) * kBlockK);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; ++i) wgmma<Element, 0>(side, fragments[i], advance(d, i * 32), more || i > 0);
        wgmma_commit();
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          wgmma<Element, 0, kTransposed>(side, advance(u, i * 32), advance(d, i * (kTransposed ? kDSpan * 16 : 32)),
                                         more || i > 0);
        }
      }
    }
    if constexpr (!kDropsU) {
      wgmma_commit();
      if constexpr (kDraws) {
        if (drawn < KeepBits<T>::kCalls) keep.append(c, row, column, drawn++);
      }
      wgmma_wait<1>();
      c.turn_stage();
    }
  }
  if constexpr (kDraws) {
#pragma unroll 1
    while (drawn < KeepBits<T>::kCalls) keep.append(c, row, column, drawn++);
  }
  // Where nothing looks at the sums before the expand step adds to them, the products stay in flight.
  if constexpr (kSide || T::kSplit || kDraws || T::kSplitsScale) {
    wgmma_wait<0>();
    c.release_stage();
    if constexpr (kMain) pin(acc);
    if constexpr (kSide) pin(side);
  }
}

// What S holds, before it is rounded, of a sum of U*D^T.
template <class T>
__device__ __forceinline__ float scale_s(const Params& p, float sum) {
  if constexpr (!T::kSplitsScale) {
    return sum * p.scale_s;
  } else {
    // S is infinite exactly where the sum itself would be in fp16, whatever its scale.
    constexpr float kRoundsToInfinity = 65520.f;
    float s = sum * p.inverse_keep;
    if (fabsf(s) >= kRoundsToInfinity) s *= INFINITY;
    return s * p.scale_s;
  }
}

// Scales and rounds this warpgroup's rows of S, stores them and raises the row block's flag. `s` are the fragments of S
// as the left operand of the expand product.
template <class T>
__device__ __forceinline__ void store_s(Consumer<T>& c, TileInfo tile, const float (&side)[T::kRank / 2],
                                        uint32_t (&s)[T::kRank / 16][4]) {
  using Element = typename T::Element;
  const int row = tile.row * T::kBlockM + c.group_m * 64 + c.fragment_row();
  auto* out = static_cast<Element*>(c.p.s_out);
#pragma unroll
  for (int i = 0; i < T::kRank / 16; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* pair = side + i * 8 + j * 2;
      s[i][j] = pack<Element>(scale_s<T>(c.p, pair[0]), scale_s<T>(c.p, pair[1]));
      const int m = row + j % 2 * 8, r = i * 16 + j / 2 * 8 + c.fragment_column();
      if (c.group_n == 0 && m < c.p.m && r < c.p.r) {
        *reinterpret_cast<uint32_t*>(out + int64_t(m) * c.p.r + r) = s[i][j];
      }
    }
  }
  if (c.group_n == 0) {
    fence_async_global();
    c.publish(flag_of<T>(c.p, tile.row));
  }
}

// Zeroes the ranks of S past the last one. They are not zero where U is infinite: its product with D's zeros is NaN.
template <class T>
__device__ __forceinline__ void zero_padding_ranks(const Consumer<T>& c, uint32_t (&s)[T::kRank / 16][4]) {
#pragma unroll
  for (int i = 0; i < T::kRank / 16; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) s[i][j] = i * 16 + j / 2 * 8 < c.p.r ? s[i][j] : 0;
  }
}

// Left and right operand of an expand step; the left one is this warpgroup's rows of S.
template <class T>
struct ExpandOperands {
  static constexpr int kSpan = T::kChunk * 2;
  static constexpr int kRightStep = T::kBackward ? 2048 : 32;  // from 16 ranks to the next 16
  uint64_t left, right;

  __device__ __forceinline__ ExpandOperands(const Consumer<T>& c, uint32_t stage, int columns) {
    left = operand<kSpan>(stage + c.group_m * 64 * kSpan, 16, kSpan * 8);
    const uint32_t p_address = stage + T::kVOffset + c.group_n * columns * kSpan;
    right = T::kBackward ? operand<128>(p_address, T::kChunk * 128, 1024) : operand<kSpan>(p_address, 16, kSpan * 8);
  }
};

// Divides the accumulators by the branch's scale, a power of two; store_tile multiplies by it what is then
// acc + S*P^T.
template <class T>
__device__ __forceinline__ void divide_by_branch_scale(const Consumer<T>& c, float (&acc)[T::kAccumulators]) {
  if (c.p.branch_scale != 1.f) {
#pragma unroll
    for (int i = 0; i < T::kAccumulators; ++i) acc[i] *= c.p.inverse_branch_scale;
  }
}

// acc += S*P^T, with S from shared memory, or from registers where `s` holds its fragments.
template <class T>
__device__ __forceinline__ void expand(Consumer<T>& c, float (&acc)[T::kAccumulators], const uint32_t (*s)[4]) {
  using Element = typename T::Element;
  if constexpr (T::kSplitsScale) divide_by_branch_scale(c, acc);
#pragma unroll 1
  for (int r = 0; r < (T::kFused ? 1 : c.p.r); r += T::kChunk) {
    const ExpandOperands<T> operands(c, c.wait_stage(), T::kColumns);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < T::kChunk / 16; ++i) {
      const uint64_t right = advance(operands.right, i * operands.kRightStep);
      if (s) {
        wgmma<Element, T::kBackward>(acc, s[i], right, 1);
      } else {
        wgmma<Element, 0, T::kBackward>(acc, advance(operands.left, i * 32), right, 1);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    c.turn_stage();
  }
  wgmma_wait<0>();
  c.release_stage();
  pin(acc);
}

// Rounds 64 columns and sends them out through shared memory; the copy runs on beneath whatever follows.
// `value(i)` is accumulator i of the 32.
template <class T, class Value>
__device__ __forceinline__ void store_slab(Consumer<T>& c, TileInfo tile, int j, Value value) {
  using Element = typename T::Element;
  const uint32_t lane = lane_id(), block_row = c.warp * 16 + lane % 16;
  const uint32_t slab = c.shared.slab(c.group, j % T::kSlabs);
  if (c.thread == 0) tma_store_wait_read<T::kSlabs - 1>();
  c.sync_group();
#pragma unroll
  for (int i = 0; i < 32; i += 8) {
    store_matrix(slab + block_row * 128 + (((i / 4 + lane / 16) ^ (block_row & 7)) << 4),
                 pack<Element>(value(i), value(i + 1)), pack<Element>(value(i + 2), value(i + 3)),
                 pack<Element>(value(i + 4), value(i + 5)), pack<Element>(value(i + 6), value(i + 7)));
  }
  fence_async_shared();
  c.sync_group();
  if (c.thread == 0) {
    const int column = tile.column * T::kBlockN + c.group_n * T::kColumns + j * 64;
    tma_store(&c.p.c, slab, column, tile.row * T::kBlockM + c.group_m * 64);
    tma_store_commit();
  }
}

template <class T>
__device__ __forceinline__ void store_tile(Consumer<T>& c, TileInfo tile, int slot,
                                           const float (&acc)[T::kAccumulators]) {
#pragma unroll
  for (int j = 0; j < T::kColumns / 64; ++j) {
    float2 bias[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      bias[i] = make_float2(0.f, 0.f);
      if constexpr (!T::kBackward) {
        const int column = c.group_n * T::kColumns + j * 64 + i * 8 + c.fragment_column();
        bias[i] = unpack<typename T::Element>(load_shared(c.shared.bias(slot) + column * 2));
      }
    }
    store_slab(c, tile, j, [&](int i) {
      const float of_bias = i % 2 ? bias[i / 4].y : bias[i / 4].x;
      return T::kSplitsScale ? fmaf(acc[j * 32 + i], c.p.branch_scale, of_bias) : acc[j * 32 + i] + of_bias;
    });
  }
}

// dX with dropout: stores acc + mask * (dS*A) / (1-p). The branch alone is masked, so it cannot go straight into acc:
// 64 columns of it at a time pass through registers of their own.
template <class T>
__device__ __forceinline__ void expand_masked_and_store(Consumer<T>& c, TileInfo tile,
                                                        const float (&acc)[T::kAccumulators], float (&branch)[32],
                                                        const uint32_t (*s)[4], const KeepBits<T>& keep) {
  using Element = typename T::Element;
  uint32_t stage = T::kFused ? c.wait_stage() : 0;
#pragma unroll
  for (int j = 0; j < T::kColumns / 64; ++j) {
#pragma unroll 1
    for (int r = 0; r < (T::kFused ? 1 : c.p.r); r += T::kChunk) {
      if (!T::kFused) stage = c.wait_stage();
      const ExpandOperands<T> operands(c, stage, T::kFused ? T::kColumns : 64);
      wgmma_fence();
#pragma unroll
      for (int i = 0; i < T::kChunk / 16; ++i) {
        const int right_offset = (T::kFused ? j * 64 * operands.kSpan : 0) + i * operands.kRightStep;
        const uint64_t right = advance(operands.right, right_offset);
        if (s) {
          wgmma<Element, 1>(branch, s[i], right, r > 0 || i > 0);
        } else {
          wgmma<Element, 0, 1>(branch, advance(operands.left, i * 32), right, r > 0 || i > 0);
        }
      }
      wgmma_commit();
      wgmma_wait<0>();
      pin(branch);
      if (!T::kFused || j == T::kColumns / 64 - 1) {
        c.turn_stage();
        c.release_stage();
      }
    }
    store_slab(c, tile, j, [&](int i) {
      const float kept = keep.words[j] >> i & 1 ? branch[i] : 0.f;
      return fmaf(kept, c.p.inverse_keep, acc[j * 32 + i]);
    });
  }
}

// Finishes a tile of C whose contraction is in acc.
template <class T>
__device__ __forceinline__ void finish(Consumer<T>& c, TileInfo tile, int slot, float (&acc)[T::kAccumulators],
                                       float (&side)[T::kSide], const uint32_t (*s)[4], const KeepBits<T>& keep) {
  if constexpr (T::kBackward && T::kDropout && T::kSide == 32) {
    expand_masked_and_store(c, tile, acc, side, s, keep);
  } else if constexpr (T::kBackward && T::kDropout) {
    float branch[32];
    expand_masked_and_store(c, tile, acc, branch, s, keep);
  } else {
    expand(c, acc, s);
    store_tile(c, tile, slot, acc);
  }
}

// Where the contraction is split, all parts but the last leave their sums in memory and return false; the last adds
// them to its own, in order.
template <bool kMain, bool kSide, class T>
__device__ __forceinline__ bool combine(Consumer<T>& c, TileInfo tile, float (&acc)[T::kAccumulators],
                                        float (&side)[T::kRank / 2]) {
  if constexpr (T::kSplit) {
    const Schedule& schedule = c.p.schedule;
    const int column =
        kMain ? tile.column : schedule.columns - 1;  // the last number is free where column 0 makes S alone
    const int index = tile.row * schedule.columns + column, last = schedule.splits - 1;
    int* parts_done = c.chain(schedule.gradients + index);
    auto planes = [&](int part) {
      const int64_t number = (int64_t(index) * last + part) * 2 + c.group;
      return c.p.tile_parts + number * T::kTilePlanes * 128;
    };
    const bool has_rows = tile.row * T::kBlockM + c.group_m * 64 + int(c.warp) * 16 < c.p.m;
    if (tile.part < last) {
      if (has_rows) {
        if constexpr (kMain) exchange<false>(acc, planes(tile.part), c.thread);
        if constexpr (kSide) exchange<false>(side, planes(tile.part) + T::kAccumulators * 128, c.thread);
      }
      c.publish(parts_done);
      return false;
    }
    if (last > 0) c.wait_flag(parts_done, last);
#pragma unroll 1
    for (int part = 0; part < (has_rows ? last : 0); ++part) {
      if constexpr (kMain) exchange<true>(acc, planes(part), c.thread);
      if constexpr (kSide) exchange<true>(side, planes(part) + T::kAccumulators * 128, c.thread);
    }
  }
  return true;
}

template <class T>
__device__ __forceinline__ void product_tile(Consumer<T>& c, TileInfo tile, int slot, float (&acc)[T::kAccumulators],
                                             float (&side)[T::kSide]) {
  KeepBits<T> keep;
  uint32_t s[T::kRank / 16][4];
  if (tile.kind == kShrinkOnly) {
    float (&s_sum)[T::kRank / 2] = slice<0, T::kRank / 2>(acc);
    multiply<false, true>(c, tile, acc, s_sum, keep);
    if (combine<false, true>(c, tile, acc, s_sum)) store_s(c, tile, s_sum, s);
  } else if (tile.kind == kPlain) {
    float none[T::kRank / 2];
    multiply<true, false>(c, tile, acc, none, keep);
    if (combine<true, false>(c, tile, acc, none)) finish(c, tile, slot, acc, side, nullptr, keep);
  } else if constexpr (T::kFused) {
    float (&s_sum)[T::kRank / 2] = slice<0, T::kRank / 2>(side);
    multiply<true, true>(c, tile, acc, s_sum, keep);
    if (combine<true, true>(c, tile, acc, s_sum)) {
      store_s(c, tile, s_sum, s);
      zero_padding_ranks(c, s);
      finish(c, tile, slot, acc, side, s, keep);
    }
  }
}

}  // namespace fastlora
