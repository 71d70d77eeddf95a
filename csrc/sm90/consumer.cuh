// One of the two consumer warpgroups: its place in the tile, its pipeline state, and its synchronisation with others.
#pragma once
#include "dropout.cuh"
#include "pipeline.cuh"

namespace fastlora::sm90 {

template <class Traits>
struct Consumer {
  using Element = typename Traits::Element;

  const typename Traits::Params& params;
  SharedMemory<Traits> shared;
  PipelineState<Traits::kStages> pipeline;
  int layer = 0;                        // at hand
  Dropout dropout;                      // its mask
  int warpgroup;                        // 0 or 1
  int warpgroup_row, warpgroup_column;  // in the tile
  uint32_t thread;                      // in the warpgroup
  uint32_t warp;                        // in the warpgroup
  int in_flight_stage = -1;             // that wgmmas in flight may still read, or -1

  __device__ __forceinline__ Consumer(const typename Traits::Params& kernel_params, SharedMemory<Traits> shared_memory)
      : params(kernel_params),
        shared(shared_memory),
        thread(threadIdx.x & (kWarpgroupThreads - 1)),
        warp(warp_id() & (kWarpgroupWarps - 1)) {
    warpgroup = int(warp_id() >> 2) - 1;
    warpgroup_row = warpgroup % Traits::kWarpgroupsM;
    warpgroup_column = warpgroup / Traits::kWarpgroupsM;
    if constexpr (!Traits::Layers::kSeveral) choose(0);
  }

  // What the launch has of the layer at hand.
  __device__ __forceinline__ const Params& own() const { return Traits::Layers::of(params, layer); }

  // Makes a layer the one at hand.
  __device__ __forceinline__ void choose(int chosen) {
    layer = chosen;
    if constexpr (Traits::kDropout) {
      const int columns = Traits::kBackward ? own().n : own().k;
      dropout = {own().seed_address ? *own().seed_address : own().seed, own().last_dropped,
                 uint32_t(columns) / kElementsPerCall};
    }
  }

  __device__ __forceinline__ bool has_branch(typename Traits::Tile tile) const {
    return Traits::Layers::kSeveral ? own().r > 0 : Traits::RowMap::has_branch(tile);
  }

  // A barrier of the warpgroup's threads; hardware barrier 0 is __syncthreads's.
  __device__ __forceinline__ void sync_warpgroup() { named_barrier(1 + warpgroup, kWarpgroupThreads); }

  // One of both warpgroups' threads.
  __device__ __forceinline__ void sync_consumers() {
    named_barrier(1 + kConsumerWarpgroups, kConsumerWarpgroups * kWarpgroupThreads);
  }

  // Row of this thread's first accumulator in the warpgroup's 64; the second one of each pair of rows is 8 below.
  __device__ __forceinline__ int fragment_row() const { return int(warp * 16 + lane_id() / 4); }
  __device__ __forceinline__ int fragment_column() const { return int(lane_id() % 4 * 2); }

  // First row and column of this warpgroup's share of a tile of the output.
  __device__ __forceinline__ int first_row(typename Traits::Tile tile) const {
    return Traits::RowMap::first_row(tile) + warpgroup_row * kMmaM;
  }
  __device__ __forceinline__ int first_column(TileInfo tile) const {
    return tile.column * Traits::kBlockN + warpgroup_column * Traits::kColumns;
  }

  __device__ __forceinline__ uint32_t wait_stage() {
    mbarrier_wait(shared.stage_full(pipeline.stage), pipeline.phase);
    return shared.stage(pipeline.stage);
  }

  // Releases the stage before the current one, which becomes the one that wgmmas in flight read.
  __device__ __forceinline__ void advance_stage() {
    release_in_flight_stage();
    in_flight_stage = pipeline.stage;
    pipeline.advance();
  }

  __device__ __forceinline__ void release_in_flight_stage() {
    if (in_flight_stage >= 0) {
      if constexpr (Traits::kCluster == 1) {
        if (lane_id() == 0) mbarrier_arrive(shared.stage_empty(in_flight_stage));
      } else {
        if (lane_id() < Traits::kCluster) {
          mbarrier_arrive_peer(peer_address(shared.stage_empty(in_flight_stage), lane_id()));
        }
      }
    }
    in_flight_stage = -1;
  }

  // This warpgroup's flag of a serial reduction: of a gradient block, or of an output tile's splits.
  __device__ __forceinline__ int* reduction_flag(int index) const {
    return row_flag<Traits>(params, params.schedule.rows * Traits::kCluster, 0) + index * kConsumerWarpgroups +
           warpgroup;
  }

  // Makes the warpgroup's writes to global memory visible to whoever acquires the flag.
  __device__ __forceinline__ void release_flag(int* flag) {
    sync_warpgroup();
    if (thread == 0) add_release(flag, 1);
  }

  // Waits until the flag has this value; everything released with it is visible to the warpgroup afterwards.
  __device__ __forceinline__ void acquire_flag(const int* flag, int value) {
    if (thread == 0) wait_for(flag, value);
    sync_warpgroup();
  }
};

// Adds a thread's partial sums in memory to its own (kAdd), or stores its own there. A warpgroup's sums are kept four
// by four, thread by thread.
template <bool kAdd, int kCount>
__device__ __forceinline__ void transfer_partials(float (&values)[kCount], float* partials, uint32_t thread) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float4* four = reinterpret_cast<float4*>(partials + i * kWarpgroupThreads) + thread;
    if constexpr (kAdd) {
      const float4 other = *four;
      values[i] += other.x;
      values[i + 1] += other.y;
      values[i + 2] += other.z;
      values[i + 3] += other.w;
    } else {
      *four = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
    }
  }
}

}  // namespace fastlora::sm90
