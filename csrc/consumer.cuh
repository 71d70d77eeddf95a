// One of the two warpgroups that compute: its place, and what product and gradient tiles share.
#pragma once
#include "traits.cuh"

namespace fastlora {

template <class T>
struct Consumer {
  using Element = typename T::Element;

  const Params& p;
  Shared<T> shared;
  Ring<T::kStages> ring;
  Dropout dropout;
  int group;  // 0 or 1
  int group_m, group_n;
  uint32_t thread;  // in the warpgroup
  uint32_t warp;    // in the warpgroup
  int held = -1;    // stage that products in flight may still read

  __device__ __forceinline__ Consumer(const Params& params, Shared<T> shared_memory)
      : p(params), shared(shared_memory), thread(threadIdx.x & 127), warp(warp_id() & 3) {
    group = int(warp_id() >> 2) - 1;
    group_m = group % T::kGroupsM;
    group_n = group / T::kGroupsM;
    if constexpr (T::kDropout) {
      const int columns = T::kBackward ? p.n : p.k;
      dropout = {p.seed_address ? *p.seed_address : p.seed, p.drop_threshold, uint32_t(columns) / kElementsPerCall};
    }
  }

  // Among the warpgroup's threads; hardware barrier 0 is __syncthreads's.
  __device__ __forceinline__ void sync_group() { named_barrier(1 + group, 128); }

  // Row of this thread's first accumulator in the warpgroup's 64; the second one of each pair of rows is 8 below.
  __device__ __forceinline__ int fragment_row() const { return int(warp * 16 + lane_id() / 4); }
  __device__ __forceinline__ int fragment_column() const { return int(lane_id() % 4 * 2); }

  __device__ __forceinline__ uint32_t wait_stage() {
    mbarrier_wait(shared.full(ring.stage), ring.phase);
    return shared.stage(ring.stage);
  }

  // Gives the held stage back to the loader, and holds the current one.
  __device__ __forceinline__ void turn_stage() {
    release_stage();
    held = ring.stage;
    ring.next();
  }

  __device__ __forceinline__ void release_stage() {
    if (held >= 0) {
      if constexpr (T::kCluster == 1) {
        if (lane_id() == 0) mbarrier_arrive(shared.empty(held));
      } else {
        if (lane_id() < T::kCluster) mbarrier_arrive_peer(peer_address(shared.empty(held), lane_id()));
      }
    }
    held = -1;
  }

  // This warpgroup's chain of a gradient block's sums, or of a product tile's parts.
  __device__ __forceinline__ int* chain(int block) const {
    return flag_of<T>(p, p.schedule.rows * T::kCluster) + block * 2 + group;
  }

  // Makes what this warpgroup has written to global memory visible to whoever sees the flag.
  __device__ __forceinline__ void publish(int* flag) {
    sync_group();
    if (thread == 0) add_release(flag, 1);
  }

  // Until the flag has this value; everything released with it is visible to the warpgroup afterwards.
  __device__ __forceinline__ void wait_flag(const int* flag, int value) {
    if (thread == 0) wait_for(flag, value);
    sync_group();
  }
};

// Adds (kLoad) a thread's numbers of a partial sum in memory to its own, or stores its own there. A warpgroup's kCount
// planes of 128 floats are kept four by four, thread by thread.
template <bool kLoad, int kCount>
__device__ __forceinline__ void exchange(float (&values)[kCount], float* planes, uint32_t thread) {
#pragma unroll
  for (int i = 0; i < kCount; i += 4) {
    float4* four = reinterpret_cast<float4*>(planes + i * 128) + thread;
    if constexpr (kLoad) {
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

}  // namespace fastlora
