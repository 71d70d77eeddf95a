// The kernel: one warp that loads, two warpgroups that compute, tiles until the queue is empty.
#pragma once
#include "gradient.cuh"
#include "loader.cuh"
#include "product.cuh"

namespace fastlora {

template <class T>
__device__ __forceinline__ void consume(const Params& p, Shared<T> shared) {
  Consumer<T> consumer(p, shared);
  // Declared once for all tiles: the assembler gives accumulators of separate variables separate registers.
  float acc[T::kAccumulators], side[T::kSide];
#pragma unroll
  for (float& value : acc) value = 0.f;
#pragma unroll
  for (float& value : side) value = 0.f;
  for (int i = 0;; ++i) {
    const int slot = i & 1;
    const TileInfo tile = own_tile<T>(read_slot(shared, i));
    if (tile.kind == kDone) break;
    if (tile.kind == kGradientA || tile.kind == kGradientB) {
      if constexpr (T::kBackward) any_gradient_tile(consumer, tile, acc, side);
    } else {
      product_tile(consumer, tile, slot, acc, side);
    }
    __syncwarp();  // every lane has read the slot
    if (lane_id() == 0) free_slot(shared, slot);
  }
  if (consumer.thread == 0) tma_store_wait_all();
}

// The last CTA to leave zeroes the workspace: the next launch finds it as this one did, without a memset.
__device__ __forceinline__ void leave(const Params& p, uint32_t shared_word) {
  if (threadIdx.x == 0) store_shared(shared_word, fetch_add_acq_rel(p.workspace + kLeaversWord, 1) == gridDim.x - 1);
  __syncthreads();
  if (load_shared(shared_word)) {
    for (int i = threadIdx.x; i < p.n_words; i += kThreads) p.workspace[i] = 0;
  }
}

template <class T>
__device__ __forceinline__ void sync_all() {
  if constexpr (T::kCluster == 1) {
    __syncthreads();
  } else {
    cluster_sync();
  }
}

template <class T>
__device__ __forceinline__ void run(const Params& p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  const Shared<T> shared = {shared_address(memory)};
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(shared.told(i), 1);
      mbarrier_init(shared.taken(i), T::kCluster * (kConsumerWarps + 1) - 1);  // not by the loader that tells
    }
    for (int i = 0; i < T::kStages; ++i) {
      mbarrier_init(shared.full(i), 1);
      mbarrier_init(shared.empty(i), T::kCluster * kConsumerWarps);
    }
    fence_barrier_init();
  }
  if (!T::kBackward && !p.has_bias) {  // zeros in its place: finished tiles add what is there
    for (int i = threadIdx.x; i < 2 * T::kBiasBytes / 4; i += kThreads) store_shared(shared.bias(0) + i * 4, 0);
  }
  if (T::kBackward && threadIdx.x < 64) {
    store_shared(shared.ones() + threadIdx.x * 4, pack<typename T::Element>(1.f, 1.f));
    fence_async_shared();
  }
  sync_all<T>();
  if (warp_id() < 4) {
    shrink_registers<kLoaderRegisters>();
    if (threadIdx.x == 0) Loader<T>(p, shared).run();
  } else {
    grow_registers<kConsumerRegisters>();
    consume<T>(p, shared);
  }
  sync_all<T>();  // no CTA leaves while another may still signal it
  leave(p, shared.tile(0));
}

template <class T>
Variant variant_of(const char* name, const void* kernel) {
  return {name,           kernel,         T::kBackward,   kIsHalf<typename T::Element>,
          T::kDropout,    T::kSplit,      T::kFused,      T::kCluster,
          T::kBlockM,     T::kBlockN,     T::kRank,       T::kSharedBytes,
          T::kTilePlanes, T::kGradPlanes, T::kGradColumns};
}

}  // namespace fastlora

// A kernel by its own name, so that profiles, disassembly and tests can tell variants apart.
#define FASTLORA_KERNEL(NAME, ...)                                                                \
  extern "C" __global__ void __cluster_dims__(fastlora::Traits<__VA_ARGS__>::kCluster, 1, 1)      \
      __launch_bounds__(fastlora::kThreads, 1) NAME(const __grid_constant__ fastlora::Params p) { \
    fastlora::run<fastlora::Traits<__VA_ARGS__>>(p);                                              \
  }                                                                                               \
  static const fastlora::Registration NAME##_registration(                                        \
      fastlora::variant_of<fastlora::Traits<__VA_ARGS__>>(#NAME, reinterpret_cast<const void*>(&NAME)));
