// What is fixed when a kernel is compiled, and how its shared memory is laid out.
#pragma once
#include "philox.cuh"
#include "schedule.h"
#include "wgmma.cuh"

namespace fastlora {

constexpr int kBlockK = 64;             // contracted elements a step: one 128-byte swizzle span
constexpr int kBoxBytes = 64 * 64 * 2;  // a 64 x 64 box
constexpr int kThreads = 384;           // a warpgroup that loads, two that compute
constexpr int kConsumerWarps = 8;
constexpr int kSharedLimit = 227 * 1024;

// kRank: the rank rounded up to 16, 32, 64, 128 or 256.
template <class Element_, bool kBackward_, int kBlockM_, int kBlockN_, int kRank_, bool kDropout_>
struct Traits {
  using Element = Element_;
  static constexpr bool kBackward = kBackward_, kDropout = kDropout_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kRank = kRank_;
  static_assert(kBlockM == 64 || kBlockM == 128, "a warpgroup computes 64 rows");
  static_assert(kRank <= 64 || kRank <= kBlockN, "D takes V's place in shared memory");

  // Two CTAs share wide tiles' V: each loads half of it into both, or L2 could not keep up with the products. A
  // cluster's CTAs take neighbouring row blocks of one column (or neighbouring gradient tiles), step by step together.
  static constexpr int kCluster = kBlockN == 256 ? 2 : 1;
  // Smaller tiles' contraction may be split, for want of tiles.
  static constexpr bool kSplit = kCluster == 1;

  // The two warpgroups share out rows, or columns where there are only 64 rows.
  static constexpr int kGroupsM = kBlockM / 64, kGroupsN = 2 / kGroupsM;
  static constexpr int kColumns = kBlockN / kGroupsN;  // of a warpgroup

  // Column 0 may make S beside its own tile of C where two accumulators fit (and X's fragments, where dropout masks
  // them).
  static constexpr bool kFused = kRank <= (kBlockN == 256 && kDropout && !kBackward ? 32 : 64);
  static constexpr int kChunk = kRank < 64 ? kRank : 64;  // ranks a step of the expand product

  // A forward in fp16, whose range a scaling above 1 would exceed, splits the scaling between S and the branch.
  static constexpr bool kSplitsScale = kIsHalf<Element> && !kBackward;

  // Registers of a thread: its part of a tile of C, or of whatever else is summed; and beside it its part of S, a slice
  // of dX's masked branch, or a second block of a gradient.
  static constexpr int kAccumulators = kColumns / 2;
  static constexpr int kSide = kFused ? kRank / 2 : 1;

  static constexpr int kTilePlanes = kAccumulators + kRank / 2;  // of 128 floats: a warpgroup's part of a split tile

  // Gradient tiles: 64 rows a step of kGradColumns columns of dY or X, and of S or dS.
  static constexpr int kGradColumns = kBlockN == 256 && kFused ? 256 : 128;
  static constexpr int kGradBlocks = kGradColumns / 128;             // of 64 columns, for each warpgroup
  static constexpr int kGradPlanes = kGradBlocks * (kRank / 2 + 4);  // of 128 floats: a warpgroup's partial sums
  static constexpr int kGradBytes = (kGradColumns + kRank) * 128;

  static constexpr int kUBytes = kBlockM * 128, kVBytes = kBlockN * 128, kDBytes = kRank * 128;
  static constexpr int kVOffset = kUBytes, kDOffset = kFused ? kUBytes + kVBytes : kVOffset;
  static constexpr int kStageBytes = kUBytes + kVBytes + (kFused ? kDBytes : 0);
  // A tile that makes S alone reads so little a step that the ring could not hide its loads: it takes two steps a stage,
  // where they fit into V's place. Steps past the end are zero on both sides.
  static constexpr int kShrinkSteps = !kSplit && 2 * (kUBytes + kDBytes) <= kStageBytes ? 2 : 1;
  static constexpr int kShrinkDOffset = kShrinkSteps == 1 ? kDOffset : kShrinkSteps * kUBytes;
  static_assert(!kBackward || kGradBytes <= kStageBytes, "a gradient step fits a stage");

  // Finished tiles leave through slabs of 64 x 64 for each warpgroup.
  static constexpr int kSlabs = kBlockN == 256 && kRank == 64 ? 2 : kColumns / 64;
  static_assert(kColumns / 64 % kSlabs == 0, "a tile starts with the slab that was filled longest ago");
  static constexpr int kSlabOffset = 0;
  static constexpr int kBiasOffset = kSlabOffset + 2 * kSlabs * kBoxBytes;
  static constexpr int kBiasBytes = kBlockN * 2;
  static constexpr int kBarrierOffset = kBiasOffset + 2 * kBiasBytes;
  static constexpr int kOnesOffset = (kBarrierOffset + 256 + 255) / 256 * 256;  // an 8 x 16 matrix of ones, for dbias
  static constexpr int kFixedBytes = (kOnesOffset + 256 + 1023) / 1024 * 1024;
  static constexpr int kStageOffset = kFixedBytes;
  static constexpr int kStages =
      (kSharedLimit - kFixedBytes) / kStageBytes < 8 ? (kSharedLimit - kFixedBytes) / kStageBytes : 8;
  static constexpr int kSharedBytes = kStageOffset + kStages * kStageBytes;
  static_assert(kStages >= 3, "the ring is too short to hide a load");
};

// The registers that 64 Ki leave two warpgroups that compute once the loader has shrunk.
constexpr int kLoaderRegisters = 40, kConsumerRegisters = 232;

enum TileKind { kPlain, kFusedShrink, kShrinkOnly, kGradientB, kGradientA, kDone };

// What the loader tells the consumers about a tile; 16 bytes.
struct TileInfo {
  int kind, row, column, part;  // in units of the cluster's tiles; a gradient tile's row is its group, its part unused
};

// A CTA's own tile of its cluster's.
template <class T>
__device__ __forceinline__ TileInfo own_tile(TileInfo tile) {
  if (T::kCluster == 1) return tile;
  const int rank = int(cluster_rank());
  if (tile.kind == kGradientA || tile.kind == kGradientB) {
    tile.column = tile.column * T::kCluster + rank;
  } else {
    tile.row = tile.row * T::kCluster + rank;
  }
  return tile;
}

// Addresses in shared memory.
template <class T>
struct Shared {
  uint32_t base;

  __device__ __forceinline__ uint32_t stage(int i) const { return base + T::kStageOffset + i * T::kStageBytes; }
  __device__ __forceinline__ uint32_t slab(int warpgroup, int i) const {
    return base + T::kSlabOffset + (warpgroup * T::kSlabs + i) * kBoxBytes;
  }
  __device__ __forceinline__ uint32_t bias(int slot) const { return base + T::kBiasOffset + slot * T::kBiasBytes; }
  __device__ __forceinline__ uint32_t tile(int slot) const { return base + T::kBarrierOffset + slot * 16; }
  __device__ __forceinline__ uint32_t barrier(int i) const { return base + T::kBarrierOffset + 32 + i * 8; }
  __device__ __forceinline__ uint32_t ones() const { return base + T::kOnesOffset; }
  // Two tile slots: told (by the first CTA's loader) and taken (by all who read them; the first CTA's counts).
  __device__ __forceinline__ uint32_t told(int slot) const { return barrier(slot); }
  __device__ __forceinline__ uint32_t taken(int slot) const { return barrier(2 + slot); }
  // Stages: full (loaded) and empty (read by the consumers' warps, of all CTAs, since each loads for all).
  __device__ __forceinline__ uint32_t full(int i) const { return barrier(4 + i); }
  __device__ __forceinline__ uint32_t empty(int i) const { return barrier(4 + T::kStages + i); }
};

// A place in the ring of stages; both sides step through it in the same order.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Steps of a part of a tile's contraction.
struct Steps {
  int first, end;
};

template <class T>
__device__ __forceinline__ Steps steps_of(const Params& p, int part) {
  const int steps = ceil_div(p.k, kBlockK);
  if constexpr (!T::kSplit) return {0, steps};
  const int splits = p.schedule.splits;
  return {int(int64_t(steps) * part / splits), int(int64_t(steps) * (part + 1) / splits)};
}

template <class T>
__device__ __forceinline__ bool is_last_part(const Params& p, int part) {
  return !T::kSplit || part == p.schedule.splits - 1;
}

// Rows of a group: what its gradient tiles sum over.
template <class T>
__device__ __forceinline__ Steps rows_of_group(const Params& p, int group) {
  const int rows = p.schedule.group_m * T::kBlockM * T::kCluster;
  const int first = group * rows, end = first + rows;
  return {first, end < p.m ? end : p.m};
}

// The flag of a row block; behind the flags lie the chains.
template <class T>
__device__ __forceinline__ int* flag_of(const Params& p, int row) {
  return p.workspace + kFlagsWord + row;
}

}  // namespace fastlora
