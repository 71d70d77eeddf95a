// The kernel: one producer warpgroup, two consumer warpgroups, tiles until the queue is empty.
#pragma once
#include "../host/variant.h"
#include "decode.cuh"
#include "gradient.cuh"
#include "producer.cuh"
#include "product.cuh"

namespace fastlora::sm90 {

// Decodes until the first tile of another kind, and returns its number. A loop of its own, in which no accumulators are
// alive: they would leave too few registers for the loads in flight.
template <class Traits>
__device__ __forceinline__ int decode_tiles(Consumer<Traits>& consumer) {
  for (int i = 0;; ++i) {
    const TileInfo tile = own_tile<Traits>(wait_tile(consumer.shared, i));
    if (tile.kind != kDecodeTile) return i;
    if (lane_id() == 0) note_tile(tile.kind, tile.row, tile.column, tile.split);
    decode_tile(consumer, tile);
    // That ended with a barrier: every lane has read the slot.
    if (lane_id() == 0) release_tile(consumer.shared, i & 1);
  }
}

// A tile that nothing need be read for.
template <class Traits>
__device__ __forceinline__ void store_constants(Consumer<Traits>& consumer, typename Traits::Tile tile) {
  if constexpr (Traits::RowMap::kSegmented) {
    if (tile.kind == kFillTile) {
      fill_tile(consumer, tile);
    } else if constexpr (Traits::kBackward) {
      zero_gradients(consumer, tile);
    }
  }
}

template <class Traits>
__device__ __forceinline__ void consume(const typename Traits::Params& params, SharedMemory<Traits> shared) {
  Consumer<Traits> consumer(params, shared);
  int first = 0;
  if constexpr (Traits::BaseWeight::kDecodes) first = decode_tiles(consumer);
  // Declared once for all tiles: the assembler gives accumulators of separate variables separate registers.
  float acc[Traits::kAccumulators], extra_acc[Traits::kExtraAccumulators];
#pragma unroll
  for (float& value : acc) value = 0.f;
#pragma unroll
  for (float& value : extra_acc) value = 0.f;
  for (int i = first;; ++i) {
    const int slot = i & 1;
    const typename Traits::Tile tile = own_tile<Traits>(wait_tile(shared, i));
    if (tile.kind == kExit) break;
    if (lane_id() == 0) note_tile(tile.kind, tile.row, tile.column, tile.split);
    if (tile.kind == kGradATile || tile.kind == kGradBTile) {
      if constexpr (Traits::kBackward) compute_gradient_tile(consumer, tile, acc, extra_acc);
    } else if (Traits::RowMap::is_constant(tile)) {
      store_constants(consumer, tile);
    } else {
      compute_output_tile(consumer, tile, slot, acc, extra_acc);
    }
    __syncwarp();  // every lane has read the slot
    if (lane_id() == 0) release_tile(shared, slot);
  }
  if (consumer.thread == 0) tma_store_wait_all();
}

// The last CTA to exit zeroes the workspace: the next launch finds it as this one did, without a memset.
__device__ __forceinline__ void reset_workspace(const Params& params, uint32_t shared_word) {
  if (threadIdx.x == 0) {
    store_shared(shared_word, fetch_add_acq_rel(params.workspace + kExitedWord, 1) == gridDim.x - 1);
  }
  __syncthreads();
  if (load_shared(shared_word)) {
    for (int i = threadIdx.x; i < params.workspace_words; i += kThreads) params.workspace[i] = 0;
  }
}

template <class Traits>
__device__ __forceinline__ void sync_cluster() {
  if constexpr (Traits::kCluster == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
}

template <class Traits>
__device__ __forceinline__ void run(const typename Traits::Params& params) {
  if (lane_id() == 0) note_tile(-1, 0, 0, 0);
  extern __shared__ __align__(kSwizzleRows * kSwizzleSpan) unsigned char memory[];
  const SharedMemory<Traits> shared = {shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared.tile_full(i), 1);
      // All consumer warps and the other CTAs' producers arrive.
      mbarrier_init(shared.tile_empty(i), Traits::kCluster * (kConsumerWarps + 1) - 1);
    }
    for (int i = 0; i < Traits::kStages; ++i) {
      mbarrier_init(shared.stage_full(i), 1);
      mbarrier_init(shared.stage_empty(i), Traits::kCluster * kConsumerWarps);
    }
    fence_barrier_init();
  }
  // Zeros in the place of the bias: the epilogue adds what is there.
  if (!Traits::kBackward && !Traits::kShared && !params.has_bias) {
    for (int i = threadIdx.x; i < 2 * Traits::kBiasBytes / 4; i += kThreads) store_shared(shared.bias(0) + i * 4, 0);
  }
  if (Traits::kBackward && threadIdx.x < Traits::kOnesBytes / 4) {
    store_shared(shared.ones() + threadIdx.x * 4, pack<typename Traits::Element>(1.f, 1.f));
    fence_async_shared();
  }
  if (warp_id() == 0) Traits::RowMap::fill_table(params, shared.segment_table());
  sync_cluster<Traits>();
  if (warp_id() < kWarpgroupWarps) {
    shrink_registers<kProducerRegisters>();
    if (warp_id() == 0 && elect_one()) Producer<Traits>(params, shared).run();
  } else {
    grow_registers<kConsumerRegisters>();
    consume<Traits>(params, shared);
  }
  sync_cluster<Traits>();  // no CTA exits while another may still signal its barriers
  reset_workspace(params, shared.tile(0));
}

template <class Traits>
Variant variant_of(const char* name, const void* kernel) {
  Variant v{};
  v.name = name;
  v.kernel = kernel;
  v.arch = 90;
  v.backward = Traits::kBackward;
  v.fp16 = kIsFp16<typename Traits::Element>;
  v.transposed = Traits::BaseWeight::kStoredTransposed;
  v.segments = Traits::RowMap::kSegmented;
  v.shared = Traits::kShared;
  v.dropout = Traits::kDropout;
  v.splits = Traits::kSplits;
  v.fuses = Traits::kFuses;
  v.decodes = Traits::BaseWeight::kDecodes;
  v.in_loop = Traits::BaseWeight::kConverts;
  v.cluster = Traits::kCluster;
  v.threads = kThreads;
  v.block_m = Traits::kBlockM;
  v.block_n = Traits::kBlockN;
  v.block_k = kBlockK;
  v.rank = Traits::kRank;
  v.shared_bytes = Traits::kSharedBytes;
  v.gradient_columns = Traits::kGradColumns;
  v.split_partial_floats = kConsumerWarpgroups * kWarpgroupThreads * Traits::kSplitPartials;
  v.gradient_partial_floats = kConsumerWarpgroups * kWarpgroupThreads * Traits::kGradPartials;
  return v;
}

}  // namespace fastlora::sm90
