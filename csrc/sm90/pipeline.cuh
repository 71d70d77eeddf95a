// What the producer warp and the consumer warpgroups share: tiles and stages in shared memory, each with a full and an
// empty barrier. See README.md for the protocol.
#pragma once
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"
#include "traits.cuh"

namespace fastlora::sm90 {

// A CTA's own tile of its cluster's.
template <class Traits>
__device__ __forceinline__ typename Traits::Tile own_tile(typename Traits::Tile tile) {
  if (Traits::kCluster == 1) return tile;
  const int cta = int(cta_in_cluster());
  if (tile.kind == kGradATile || tile.kind == kGradBTile || tile.kind == kDecodeTile) {
    tile.column = tile.column * Traits::kCluster + cta;
  } else {
    tile.row = tile.row * Traits::kCluster + cta;
  }
  return tile;
}

// Addresses in shared memory. Two slots hold the tile in progress and the next one, with a bias each.
template <class Traits>
struct SharedMemory {
  static constexpr int kTileBytes = sizeof(typename Traits::Tile), kMbarrierBytes = 8;
  static_assert(2 * kTileBytes + (4 + 2 * Traits::kStages) * kMbarrierBytes <= Traits::kBarrierBytes, "they fit");

  uint32_t base;

  __device__ __forceinline__ uint32_t stage(int i) const {
    return base + Traits::kStageOffset + i * Traits::kStageBytes;
  }
  __device__ __forceinline__ uint32_t staging(int warpgroup, int i) const {
    return base + Traits::kStagingOffset + (warpgroup * Traits::kStagingBuffers + i) * kBoxBytes;
  }
  __device__ __forceinline__ uint32_t bias(int slot) const {
    return base + Traits::kBiasOffset + slot * Traits::kBiasBytes;
  }
  __device__ __forceinline__ uint32_t tile(int slot) const { return base + Traits::kBarrierOffset + slot * kTileBytes; }
  __device__ __forceinline__ uint32_t barrier(int i) const {
    return base + Traits::kBarrierOffset + 2 * kTileBytes + i * kMbarrierBytes;
  }
  __device__ __forceinline__ uint32_t ones() const { return base + Traits::kOnesOffset; }
  __device__ __forceinline__ uint32_t segment_table() const { return base + Traits::kTableOffset; }
  __device__ __forceinline__ uint32_t keep_bits() const { return base + Traits::kKeepOffset; }
  // Full: the first CTA's producer has written the tile. Empty: all its readers have read it; the first CTA's counts.
  __device__ __forceinline__ uint32_t tile_full(int slot) const { return barrier(slot); }
  __device__ __forceinline__ uint32_t tile_empty(int slot) const { return barrier(2 + slot); }
  // Full: the stage's bytes have arrived. Empty: the consumers' warps of all CTAs, since each loads for all, have read.
  __device__ __forceinline__ uint32_t stage_full(int i) const { return barrier(4 + i); }
  __device__ __forceinline__ uint32_t stage_empty(int i) const { return barrier(4 + Traits::kStages + i); }
};

// A position in the circle of stages; producer and consumers advance in the same order.
template <int kStages>
struct PipelineState {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Waits for this cluster's i-th tile.
template <class Traits>
__device__ __forceinline__ typename Traits::Tile wait_tile(SharedMemory<Traits> shared, int i) {
  mbarrier_wait(shared.tile_full(i & 1), i >> 1 & 1);
  const uint4 words = load_shared_16(shared.tile(i & 1));
  const TileInfo tile = {int(words.x), int(words.y), int(words.z), int(words.w)};
  if constexpr (Traits::RowMap::kSegmented) {
    const uint4 more = load_shared_16(shared.tile(i & 1) + sizeof(TileInfo));
    return {tile, int(more.x), int(more.y), int(more.z), int(more.w)};
  } else {
    return tile;
  }
}

template <class Traits>
__device__ __forceinline__ void release_tile(SharedMemory<Traits> shared, int slot) {
  if constexpr (Traits::kCluster == 1) {
    mbarrier_arrive(shared.tile_empty(slot));
  } else {
    mbarrier_arrive_peer(peer_address(shared.tile_empty(slot), 0));
  }
}

// Steps of a split of a tile's contraction over a layer.
template <class Traits>
__device__ __forceinline__ Steps steps_of(const Params& params, const Params& layer, int split) {
  const int steps = ceil_div(layer.k, kBlockK);
  if constexpr (!Traits::kSplits) return {0, steps};
  const int splits = params.schedule.splits;
  return {int(int64_t(steps) * split / splits), int(int64_t(steps) * (split + 1) / splits)};
}

template <class Traits>
__device__ __forceinline__ bool is_last_split(const Params& params, int split) {
  return !Traits::kSplits || split == params.schedule.splits - 1;
}

}  // namespace fastlora::sm90
