// The loading thread: claims tiles, tells the consumers, and keeps the ring of stages full.
#pragma once
#include "traits.cuh"

namespace fastlora {

// Slot i % 2 holds the i-th tile of this cluster.
template <class T>
__device__ __forceinline__ TileInfo read_slot(Shared<T> shared, int i) {
  mbarrier_wait<(T::kCluster > 1)>(shared.told(i & 1), i >> 1 & 1);
  const uint4 told = load_shared_16(shared.tile(i & 1));
  return {int(told.x), int(told.y), int(told.z), int(told.w)};
}

template <class T>
__device__ __forceinline__ void free_slot(Shared<T> shared, int slot) {
  if constexpr (T::kCluster == 1) {
    mbarrier_arrive(shared.taken(slot));
  } else {
    mbarrier_arrive_peer(peer_address(shared.taken(slot), 0));
  }
}

template <class T>
struct Loader {
  const Params& p;
  Shared<T> shared;
  Ring<T::kStages> ring;
  int ticket;
  uint32_t rank;  // in the cluster; the first CTA claims tiles for all

  __device__ __forceinline__ Loader(const Params& params, Shared<T> shared_memory)
      : p(params), shared(shared_memory), rank(T::kCluster == 1 ? 0 : cluster_rank()) {}

  __device__ __forceinline__ int claim() { return fetch_add_relaxed(p.workspace + kTicketWord, 1); }

  __device__ __forceinline__ void run() {
    if (rank == 0) ticket = claim();
    for (const CUtensorMap* map : {&p.u, &p.v, &p.a, &p.b}) prefetch_map(map);
    for (int i = 0;; ++i) {
      const int slot = i & 1;
      TileInfo tile;
      if (rank == 0) {
        tile = describe(count_tiles(p.schedule));
        mbarrier_wait(shared.taken(slot), (i >> 1 & 1) ^ 1);
        tell(tile, slot);
      } else {
        tile = read_slot(shared, i);
        free_slot(shared, slot);
      }
      if (tile.kind == kDone) return;
      tile = own_tile<T>(tile);
      if (tile.kind == kGradientA || tile.kind == kGradientB) {
        if constexpr (T::kBackward) gradient(tile);
      } else if (tile.kind == kShrinkOnly) {
        shrink(tile);
      } else {
        product(tile, slot);
      }
    }
  }

  __device__ __forceinline__ void tell(TileInfo tile, int slot) {
    const uint4 words = make_uint4(tile.kind, tile.row, tile.column, tile.part);
    store_shared_16(shared.tile(slot), words);
    mbarrier_arrive(shared.told(slot));
#pragma unroll
    for (uint32_t peer = 1; peer < T::kCluster; ++peer) {
      store_peer_16(peer_address(shared.tile(slot), peer), words);
      mbarrier_arrive_peer<true>(peer_address(shared.told(slot), peer));
    }
  }

  __device__ __forceinline__ TileInfo describe(int tiles) {
    if (ticket >= tiles) return {kDone, 0, 0, 0};
    const Tile tile = locate(p.schedule, ticket, gridDim.x / T::kCluster);
    if (tile.gradient >= p.blocks_b) return {kGradientA, tile.row, tile.gradient - p.blocks_b, 0};
    if (tile.gradient >= 0) return {kGradientB, tile.row, tile.gradient, 0};
    const bool fused = T::kFused && p.fused;
    if (tile.column == 0) return {fused ? kFusedShrink : kShrinkOnly, tile.row, 0, tile.part};
    return {kPlain, tile.row, fused ? tile.column : tile.column - 1, tile.part};
  }

  // Waits for a free stage and announces what will be copied into it.
  __device__ __forceinline__ uint32_t open_stage(uint32_t bytes) {
    mbarrier_wait(shared.empty(ring.stage), ring.phase ^ 1);
    mbarrier_arrive_expect(shared.full(ring.stage), bytes);
    return shared.stage(ring.stage);
  }

  __device__ __forceinline__ void copy(uint32_t address, const CUtensorMap* map, int column, int row) {
    tma_load(address, map, column, row, shared.full(ring.stage));
  }

  // Box number `i` of an operand that all CTAs of the cluster want: one of them loads it for all.
  __device__ __forceinline__ void copy_for_all(int i, uint32_t address, const CUtensorMap* map, int column, int row) {
    if constexpr (T::kCluster == 1) {
      copy(address, map, column, row);
    } else if (i % T::kCluster == rank) {
      tma_load_multicast(address, map, column, row, shared.full(ring.stage), (1 << T::kCluster) - 1);
    }
  }

  // Claims the next tile while this one's last copies are under way: early enough to hide the atomic's latency, late
  // enough that a tile is not held back by a CTA that is busy.
  __device__ __forceinline__ void claim_at(int step, Steps steps, int stride = 1) {
    const int when = steps.end - 2 * stride > steps.first ? steps.end - 2 * stride : steps.first;
    if (rank == 0 && step >= when && step - stride < when) ticket = claim();
  }

  __device__ __forceinline__ void copy_u(uint32_t address, int m, int k) {
#pragma unroll
    for (int i = 0; i < T::kBlockM / 64; ++i) copy(address + i * kBoxBytes, &p.u, k, m + i * 64);
  }

  // Of D's boxes, number `first` on.
  __device__ __forceinline__ void copy_d(int first, uint32_t address, int k) {
#pragma unroll
    for (int j = 0; j < T::kRank / T::kChunk; ++j) {
      if constexpr (T::kBackward) {
        copy_for_all(first + j, address + j * kBoxBytes, &p.b, j * 64, k);
      } else {
        copy_for_all(first + j, address + j * kBoxBytes, &p.a, k, j * 64);
      }
    }
  }

  // A tile that makes S alone.
  __device__ __forceinline__ void shrink(TileInfo tile) {
    const Steps steps = steps_of<T>(p, tile.part);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; step += T::kShrinkSteps) {
      const uint32_t stage = open_stage(T::kShrinkSteps * (T::kUBytes + T::kDBytes));
#pragma unroll
      for (int j = 0; j < T::kShrinkSteps; ++j) {
        const int k = (step + j) * kBlockK;
        copy_u(stage + j * T::kUBytes, tile.row * T::kBlockM, k);
        copy_d(j, stage + T::kShrinkDOffset + j * T::kDBytes, k);
      }
      claim_at(step, steps, T::kShrinkSteps);
      ring.next();
    }
  }

  __device__ __forceinline__ void product(TileInfo tile, int slot) {
    const int m = tile.row * T::kBlockM, n = tile.column * T::kBlockN;
    const bool makes_s = T::kFused && tile.kind == kFusedShrink;
    const bool expands = is_last_part<T>(p, tile.part);
    const bool loads_bias = expands && p.has_bias;
    const uint32_t bytes = T::kUBytes + T::kVBytes + (makes_s ? T::kDBytes : 0);
    const Steps steps = steps_of<T>(p, tile.part);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
      const bool bias_now = loads_bias && step == steps.first;
      const uint32_t stage = open_stage(bytes + (bias_now ? T::kBiasBytes : 0));
      const int k = step * kBlockK;
      copy_u(stage, m, k);
#pragma unroll
      for (int j = 0; j < T::kBlockN / 64; ++j) {
        const uint32_t box = stage + T::kVOffset + j * kBoxBytes;
        if constexpr (T::kBackward) {
          copy_for_all(j, box, &p.v, n + j * 64, k);
        } else {
          copy_for_all(j, box, &p.v, k, n + j * 64);
        }
      }
      if (makes_s) copy_d(0, stage + T::kDOffset, k);
      if (bias_now) copy(shared.bias(slot), &p.bias, n, 0);
      claim_at(step, steps);
      ring.next();
    }
    if (expands) expand(tile, m, n);
  }

  // One more step of the contraction for every 64 ranks: S and P through the same stages. A fused tile has its rows of
  // S in registers. dX's dropout masks 64 columns of a warpgroup at a time, and beyond rank 64 loads so, too.
  __device__ __forceinline__ void expand(TileInfo tile, int m, int n) {
    const bool loads_s = tile.kind == kPlain;
    constexpr bool kSliced = T::kBackward && T::kDropout && !T::kFused;
    constexpr int kBoxes = kSliced ? T::kGroupsN : T::kBlockN / 64, kBoxStride = kSliced ? T::kColumns : 64;
    constexpr int kRowsBytes = 64 * T::kChunk * 2;  // of 64 rows or columns
    if (loads_s) {
      wait_for(flag_of<T>(p, tile.row), T::kGroupsM);
      fence_async_global();
    }
#pragma unroll 1
    for (int slice = 0; slice < (kSliced ? T::kColumns : 64); slice += 64) {
#pragma unroll 1
      for (int r = 0; r < (T::kFused ? 1 : p.r); r += T::kChunk) {
        const uint32_t stage = open_stage((kBoxes + (loads_s ? T::kGroupsM : 0)) * kRowsBytes);
        if (loads_s) {
#pragma unroll
          for (int i = 0; i < T::kGroupsM; ++i) copy(stage + i * kRowsBytes, &p.s, r, m + i * 64);
        }
#pragma unroll
        for (int j = 0; j < kBoxes; ++j) {
          const uint32_t box = stage + T::kVOffset + j * kRowsBytes;
          const int column = n + slice + j * kBoxStride;
          if constexpr (T::kBackward) {
            copy_for_all(j, box, &p.a, column, r);
          } else {
            copy_for_all(j, box, &p.b, r, column);
          }
        }
        ring.next();
      }
    }
  }

  __device__ __forceinline__ void gradient(TileInfo tile) {
    const bool is_a = tile.kind == kGradientA;
    const CUtensorMap *left = is_a ? &p.x : &p.u, *right = is_a ? &p.s : &p.saved;
    const int column = tile.column * T::kGradColumns;
    const Steps rows = rows_of_group<T>(p, tile.row);
    const Steps steps = {rows.first / 64, ceil_div(rows.end, 64)};
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
      const int m = step * 64;
      if (is_a && m % T::kBlockM == 0) {
        wait_for(flag_of<T>(p, m / T::kBlockM), T::kGroupsM);
        fence_async_global();
      }
      const uint32_t stage = open_stage(T::kGradBytes);
#pragma unroll
      for (int j = 0; j < T::kGradColumns / 64; ++j) copy(stage + j * kBoxBytes, left, column + j * 64, m);
#pragma unroll
      for (int j = 0; j < T::kRank / T::kChunk; ++j) {
        copy_for_all(j, stage + T::kGradColumns * 128 + j * kBoxBytes, right, j * 64, m);
      }
      claim_at(step, steps);
      ring.next();
    }
  }
};

}  // namespace fastlora
