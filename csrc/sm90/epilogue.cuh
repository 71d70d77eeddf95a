// The expand product, and the policy that defines what is stored of a tile: from accumulators, branch and column.
//
// Today's two: acc + bias, and acc + mask * branch (dX with dropout). A policy is a struct whose run() finishes a tile
// whose base product is in the accumulators. The next one (a scale for each column) goes here; KernelTraits::Epilogue
// names it.
#pragma once
#include "consumer.cuh"
#include "ptx/tma.cuh"

namespace fastlora::sm90 {

// Left and right operand of an expand step; the left one is this warpgroup's rows of S.
template <class Traits>
struct ExpandOperands {
  using Branch = typename Traits::Branch;
  uint64_t left, right;

  __device__ __forceinline__ ExpandOperands(const Consumer<Traits>& c, uint32_t stage, int columns) {
    left = swizzled_operand<Branch::kRankSpan>(stage + c.warpgroup_row * kMmaM * Branch::kRankSpan);
    right = Branch::up_operand(stage + Traits::kWeightOffset + c.warpgroup_column * columns * Branch::kRankSpan);
  }
};

// Divides the accumulators by the branch's scale, a power of two; the epilogue multiplies what is then acc + S*up^T.
template <class Traits>
__device__ __forceinline__ void divide_by_branch_scale(const Consumer<Traits>& c, float (&acc)[Traits::kAccumulators]) {
  if (c.own().scale_on_branch != 1.f) {
#pragma unroll
    for (int i = 0; i < Traits::kAccumulators; ++i) acc[i] *= c.own().inverse_scale_on_branch;
  }
}

// acc += S*up^T, with S from shared memory, or from registers where `s` holds its fragments.
template <class Traits>
__device__ __forceinline__ void expand(Consumer<Traits>& c, typename Traits::Tile tile,
                                       float (&acc)[Traits::kAccumulators], const uint32_t (*s)[4]) {
  using Element = typename Traits::Element;
  using Branch = typename Traits::Branch;
  const int ranks = !c.has_branch(tile) ? 0 : Traits::kFuses ? 1 : Branch::rank(c.own());
  if constexpr (Traits::kSplitsScaling) divide_by_branch_scale(c, acc);
#pragma unroll 1
  for (int r = 0; r < ranks; r += Branch::kRankStep) {
    const ExpandOperands<Traits> operands(c, c.wait_stage(), Traits::kColumns);
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < Branch::kRankStep / kMmaK; ++i) {
      const uint64_t right = advance(operands.right, i * Branch::kUpAdvance);
      if (s) {
        wgmma<Element, Traits::kBackward>(acc, s[i], right, 1);
      } else {
        wgmma<Element, 0, Traits::kBackward>(acc, advance(operands.left, i * kAdvanceContiguous), right, 1);
      }
    }
    wgmma_commit();
    wgmma_wait<1>();
    c.advance_stage();
  }
  wgmma_wait<0>();
  c.release_in_flight_stage();
  pin(acc);
}

// Stores the rows that are the tile's own, of the 64 columns of slice j: chunk(row, number) is 16 bytes of a row.
template <class Traits, class Chunk>
__device__ __forceinline__ void store_rows(Consumer<Traits>& c, typename Traits::Tile tile, int j, Chunk chunk) {
  constexpr uint32_t kChunksPerRow = kSwizzleSpan / kChunkBytes;
  const SegmentParams& segments = c.params.segments;
  const int rows = tile.end_row - c.first_row(tile);
  const int number = int(c.thread % kChunksPerRow), column = c.first_column(tile) + j * kBox + number * kChunkElements;
  if (column >= c.params.n) return;
  auto* out = static_cast<typename Traits::Element*>(segments.out) + c.first_row(tile) * segments.out_stride + column;
#pragma unroll 1
  for (int row = int(c.thread / kChunksPerRow); row < min(rows, kBox); row += kWarpgroupThreads / kChunksPerRow) {
    *reinterpret_cast<uint4*>(out + row * segments.out_stride) = chunk(row, number);
  }
}

// Stores slice j of the tile, 64 columns, rounded, through a staging buffer; the copies proceed asynchronously. Slices
// come in order. `value(i)` is number i of the thread's values.
template <class Traits, class Value>
__device__ __forceinline__ void store_slice(Consumer<Traits>& c, typename Traits::Tile tile, int j, Value value) {
  using Element = typename Traits::Element;
  constexpr int kPerPhase = Traits::kSlicesPerPhase;
  const uint32_t lane = lane_id(), block_row = c.warp * 16 + lane % 16;
  const uint32_t staging = c.shared.staging(c.warpgroup, j % Traits::kStagingBuffers);
  if (j % kPerPhase == 0) {  // until the buffers of this phase are free; only the first thread has stores to wait for
    tma_store_wait_read<Traits::kStagingBuffers / kPerPhase - 1>();
    c.sync_warpgroup();
  }
#pragma unroll
  for (int i = 0; i < Traits::kSliceAccumulators; i += 8) {
    store_matrix(chunk_address(staging, block_row, i / 4 + lane / 16), pack<Element>(value(i), value(i + 1)),
                 pack<Element>(value(i + 2), value(i + 3)), pack<Element>(value(i + 4), value(i + 5)),
                 pack<Element>(value(i + 6), value(i + 7)));
  }
  if (j % kPerPhase < kPerPhase - 1) return;
  fence_async_shared();
  c.sync_warpgroup();
  if constexpr (Traits::RowMap::kSegmented) {
    // The copy engine cannot end where a segment does.
    if (c.first_row(tile) + kBox > tile.end_row) {
#pragma unroll
      for (int back = kPerPhase - 1; back >= 0; --back) {
        store_rows(c, tile, j - back, [&](int row, int chunk) {
          return load_shared_16(chunk_address(staging - back * kBoxBytes, row, chunk));
        });
      }
      return;
    }
  }
  if (c.thread == 0) {
#pragma unroll
    for (int back = kPerPhase - 1; back >= 0; --back) {
      tma_store(&c.own().out, staging - back * kBoxBytes, c.first_column(tile) + (j - back) * kBox, c.first_row(tile));
    }
    tma_store_commit();
  }
}

// Which of a thread's values of dX's branch dropout keeps: one bit each, 64 columns a word.
template <class Traits>
struct KeepBits {
  static constexpr int kWords = Traits::kSlices, kCalls = Traits::kColumns / 16;
  uint32_t words[kWords];

  // Appends the bits of call `i`'s sixteen columns. Called kCalls times, in order, while wgmmas are in flight, whose
  // latency hides it.
  __device__ __forceinline__ void append(const Consumer<Traits>& c, int row, int column, int i) {
    uint32_t bits[4];
    fragment_words(bits, c.dropout, row, column + i * 16);
    uint32_t fresh = 0;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      fresh |= uint32_t(keeps_low(bits[j], c.dropout.last_dropped)) << (2 * j);
      fresh |= uint32_t(keeps_high(bits[j], c.dropout.last_dropped)) << (2 * j + 1);
    }
#pragma unroll
    for (int j = 0; j + 1 < kWords; ++j) words[j] = __funnelshift_r(words[j], words[j + 1], 8);
    words[kWords - 1] = words[kWords - 1] >> 8 | fresh << 24;
  }

  // In shared memory, for the layer at hand, where a tile has masks of several.
  __device__ __forceinline__ static uint32_t address(const Consumer<Traits>& c, int word) {
    const int thread = c.warpgroup * kWarpgroupThreads + int(c.thread);
    return c.shared.keep_bits() +
           ((c.layer * kWords + word) * kConsumerWarpgroups * kWarpgroupThreads + thread) * uint32_t(sizeof(uint32_t));
  }
  __device__ __forceinline__ void save(const Consumer<Traits>& c) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i) store_shared(address(c, i), words[i]);
  }
  __device__ __forceinline__ static uint32_t load(const Consumer<Traits>& c, int word) {
    return load_shared(address(c, word));
  }

  // `value` where bit `i` of the word is set, else 0. From C++, bit 0 would be tested unlike the others, and the
  // instruction that moves seven bits to predicates could serve only six of them.
  __device__ __forceinline__ static float select(uint32_t word, int i, float value) {
    float kept;
    asm("{\n .reg .pred p;\n .reg .b32 bit;\n and.b32 bit, %1, %2;\n setp.ne.u32 p, bit, 0;\n"
        " selp.f32 %0, %3, 0f00000000, p;\n}"
        : "=f"(kept)
        : "r"(word), "r"(1u << i), "f"(value));
    return kept;
  }
};

// Stores acc + S*up^T, and in a forward the bias.
template <class Traits>
struct BiasEpilogue {
  // A tile of dX with the branches of several layers.
  __device__ __forceinline__ static void run_several(Consumer<Traits>& c, typename Traits::Tile tile,
                                                     float (&acc)[Traits::kAccumulators],
                                                     float (&)[Traits::kExtraAccumulators]) {
    Traits::Layers::each(c.params, tile, [&](int layer, bool) {
      c.layer = layer;
      expand(c, tile, acc, nullptr);
    });
#pragma unroll
    for (int j = 0; j < Traits::kSlices; ++j) {
      store_slice(c, tile, j, [&](int i) { return acc[j * Traits::kSliceAccumulators + i]; });
    }
  }

  __device__ __forceinline__ static void run(Consumer<Traits>& c, typename Traits::Tile tile, int slot,
                                             float (&acc)[Traits::kAccumulators], float (&)[Traits::kExtraAccumulators],
                                             const uint32_t (*s)[4], const KeepBits<Traits>&) {
    expand(c, tile, acc, s);
#pragma unroll
    for (int j = 0; j < Traits::kSlices; ++j) {
      const float* sums = acc + j * Traits::kSliceAccumulators;
      if constexpr (Traits::kBackward) {
        store_slice(c, tile, j, [&](int i) { return sums[i]; });
      } else {
        float2 bias[kBox / 8];
        load_bias(c, slot, c.warpgroup_column * Traits::kColumns + j * kBox, bias);
        store_slice(c, tile, j, [&](int i) {
          const float of_bias = i % 2 ? bias[i / 4].y : bias[i / 4].x;
          return Traits::kSplitsScaling ? fmaf(sums[i], c.own().scale_on_branch, of_bias) : sums[i] + of_bias;
        });
      }
    }
  }

 private:
  // The bias of this thread's pairs of columns, in 64 from `column` on: the fragment of a block whose rows are all one.
  // In its place lie zeros where an only layer has none, and those of other layers' tiles where one of several has
  // none.
  __device__ __forceinline__ static void load_bias(const Consumer<Traits>& c, int slot, int column,
                                                   float2 (&bias)[kBox / 8]) {
    if (Traits::kShared && !c.own().has_bias) {
#pragma unroll
      for (float2& pair : bias) pair = make_float2(0.f, 0.f);
      return;
    }
#pragma unroll
    for (int i = 0; i < kBox / 8; i += 4) {
      uint32_t pairs[4];
      load_matrix(pairs, c.shared.bias(slot) + (column + (i + lane_id() / 8) * kChunkElements) * kElementBytes);
#pragma unroll
      for (int j = 0; j < 4; ++j) bias[i + j] = unpack<typename Traits::Element>(pairs[j]);
    }
  }
};

// dX with dropout: stores acc + mask * (dS*A) / (1-p). Only the branch is masked, so it cannot accumulate into acc:
// 64 columns of it at a time have accumulators of their own.
template <class Traits>
struct MaskedBranchEpilogue {
  __device__ __forceinline__ static void run(Consumer<Traits>& c, typename Traits::Tile tile, int,
                                             float (&acc)[Traits::kAccumulators],
                                             float (&extra_acc)[Traits::kExtraAccumulators], const uint32_t (*s)[4],
                                             const KeepBits<Traits>& keep) {
    if constexpr (Traits::kExtraAccumulators == Traits::kSliceAccumulators) {
      store_masked(c, tile, acc, extra_acc, s, keep);
    } else {
      float branch[Traits::kSliceAccumulators];
      store_masked(c, tile, acc, branch, s, keep);
    }
  }

  // With the branches of several layers, whose masks are in shared memory.
  __device__ __forceinline__ static void run_several(Consumer<Traits>& c, typename Traits::Tile tile,
                                                     const float (&acc)[Traits::kAccumulators],
                                                     float (&extra_acc)[Traits::kExtraAccumulators]) {
    if constexpr (Traits::kExtraAccumulators == Traits::kSliceAccumulators) {
      store_several(c, tile, acc, extra_acc);
    } else {
      float branch[Traits::kSliceAccumulators];
      store_several(c, tile, acc, branch);
    }
  }

 private:
  __device__ __forceinline__ static void store_several(Consumer<Traits>& c, typename Traits::Tile tile,
                                                       const float (&acc)[Traits::kAccumulators],
                                                       float (&branch)[Traits::kSliceAccumulators]) {
    using Element = typename Traits::Element;
    using Branch = typename Traits::Branch;
#pragma unroll
    for (int j = 0; j < Traits::kSlices; ++j) {
      // The accumulators stay as they are: the assembler would serialise products into what is added to otherwise.
      float sums[Traits::kSliceAccumulators];
#pragma unroll
      for (int i = 0; i < Traits::kSliceAccumulators; ++i) sums[i] = acc[j * Traits::kSliceAccumulators + i];
      Traits::Layers::each(c.params, tile, [&](int layer, bool) {
        c.layer = layer;
        if (!c.has_branch(tile)) return;
        const ExpandOperands<Traits> operands(c, c.wait_stage(), kBox);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Branch::kRankStep / kMmaK; ++i) {
          wgmma<Element, 0, 1>(branch, advance(operands.left, i * kAdvanceContiguous),
                               advance(operands.right, i * Branch::kUpAdvance), i > 0);
        }
        wgmma_commit();
        const uint32_t keep = KeepBits<Traits>::load(c, j);
        wgmma_wait<0>();
        pin(branch);
        c.advance_stage();
        c.release_in_flight_stage();
#pragma unroll
        for (int i = 0; i < Traits::kSliceAccumulators; ++i) {
          sums[i] = fmaf(KeepBits<Traits>::select(keep, i, branch[i]), c.own().inverse_keep, sums[i]);
        }
      });
      store_slice(c, tile, j, [&](int i) { return sums[i]; });
    }
  }

  __device__ __forceinline__ static void store_masked(Consumer<Traits>& c, typename Traits::Tile tile,
                                                      const float (&acc)[Traits::kAccumulators],
                                                      float (&branch)[Traits::kSliceAccumulators],
                                                      const uint32_t (*s)[4], const KeepBits<Traits>& keep) {
    using Element = typename Traits::Element;
    using Branch = typename Traits::Branch;
    uint32_t stage = Traits::kFuses ? c.wait_stage() : 0;
#pragma unroll
    for (int j = 0; j < Traits::kSlices; ++j) {
#pragma unroll 1
      for (int r = 0; r < (Traits::kFuses ? 1 : Branch::rank(c.own())); r += Branch::kRankStep) {
        if (!Traits::kFuses) stage = c.wait_stage();
        const ExpandOperands<Traits> operands(c, stage, Traits::kFuses ? Traits::kColumns : kBox);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Branch::kRankStep / kMmaK; ++i) {
          const int right_offset = (Traits::kFuses ? j * kBox * Branch::kRankSpan : 0) + i * Branch::kUpAdvance;
          const uint64_t right = advance(operands.right, right_offset);
          if (s) {
            wgmma<Element, 1>(branch, s[i], right, r > 0 || i > 0);
          } else {
            wgmma<Element, 0, 1>(branch, advance(operands.left, i * kAdvanceContiguous), right, r > 0 || i > 0);
          }
        }
        wgmma_commit();
        wgmma_wait<0>();
        pin(branch);
        if (!Traits::kFuses || j == Traits::kSlices - 1) {
          c.advance_stage();
          c.release_in_flight_stage();
        }
      }
      store_slice(c, tile, j, [&](int i) {
        const float kept = KeepBits<Traits>::select(keep.words[j], i, branch[i]);
        return fmaf(kept, c.own().inverse_keep, acc[j * Traits::kSliceAccumulators + i]);
      });
    }
  }
};

// A tile of rows without a segment, which are zeros, or of one whose weight or adapter does not exist: NaN.
template <class Traits>
__device__ __forceinline__ void fill_tile(Consumer<Traits>& c, typename Traits::Tile tile) {
  const float value = tile.segment == c.params.segments.count ? 0.f : NAN;
  const uint32_t pair = pack<typename Traits::Element>(value, value);
  for (int j = 0; j < Traits::kSlices; ++j) {
    store_rows(c, tile, j, [=](int, int) { return make_uint4(pair, pair, pair, pair); });
  }
}

// Finishes a tile of the output whose base product is in acc. `s`: the fragments of S, or null if it is in memory.
template <class Traits>
__device__ __forceinline__ void finish_tile(Consumer<Traits>& c, typename Traits::Tile tile, int slot,
                                            float (&acc)[Traits::kAccumulators],
                                            float (&extra_acc)[Traits::kExtraAccumulators], const uint32_t (*s)[4],
                                            const KeepBits<Traits>& keep) {
  Traits::Epilogue::run(c, tile, slot, acc, extra_acc, s, keep);
}

}  // namespace fastlora::sm90
