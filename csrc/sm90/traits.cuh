// What is fixed when a kernel is compiled: its policies, its tile, and the layout of its shared memory.
#pragma once
#include <type_traits>

#include "base_weight.cuh"
#include "branch.cuh"
#include "layers.cuh"
#include "row_map.cuh"

namespace fastlora::sm90 {

constexpr int kWarpThreads = 32;
constexpr int kWarpgroupThreads = 128;
constexpr int kWarpgroupWarps = kWarpgroupThreads / kWarpThreads;
constexpr int kConsumerWarpgroups = 2;  // that compute; one more warpgroup in front of them loads
constexpr int kConsumerWarps = kConsumerWarpgroups * kWarpgroupWarps;
constexpr int kThreads = (1 + kConsumerWarpgroups) * kWarpgroupThreads;
constexpr int kSharedLimit = 227 * 1024;
constexpr int kMaxStages = 8;

// Of a thread, once the producer warpgroup has returned its own: what 64 Ki registers leave the consumers.
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;

template <class Traits>
struct BiasEpilogue;
template <class Traits>
struct MaskedBranchEpilogue;

constexpr int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

// What a launch is about: a layer; rows in segments, each with a weight and an adapter of its own; or several layers of
// one input.
enum class Call { kLayer, kSegments, kProjections };

// kRank: the rank rounded up to one that is compiled.
template <class Element_, bool kBackward_, int kBlockM_, int kBlockN_, int kRank_, bool kDropout_,
          template <bool, int> class BaseWeight_, Call kCall>
struct KernelTraits {
  using Element = Element_;
  static constexpr bool kBackward = kBackward_, kDropout = kDropout_;
  static constexpr int kBlockM = kBlockM_, kBlockN = kBlockN_, kRank = kRank_;
  static constexpr bool kSegmented = kCall == Call::kSegments, kShared = kCall == Call::kProjections;
  static_assert(kBlockM == kMmaM || kBlockM == 2 * kMmaM, "a warpgroup computes 64 rows");
  static_assert(kRank <= kBox || kRank <= kBlockN, "the shrinking factor takes the weight's place in a stage");

  // A forward in fp16, whose range a scaling above 1 would exceed, splits the scaling between S and the branch.
  static constexpr bool kSplitsScaling = kIsFp16<Element> && !kBackward;

  // Two CTAs share the weight of the largest tile: each loads half of it into both, or L2 could not keep up with the
  // products. A cluster's CTAs take neighbouring row blocks of one column (or neighbouring gradient tiles), step by
  // step together.
  static constexpr int kCluster = kBlockN == 256 ? 2 : 1;
  // The contraction of smaller tiles may be split, where there are too few tiles for all multiprocessors.
  static constexpr bool kSplits = kCluster == 1 && kCall == Call::kLayer;

  // ---- policies
  using BaseWeight = BaseWeight_<kBackward, kBlockN>;
  using Branch = std::conditional_t<kSegmented, AdapterOfSegment<kBackward, kRank, kSplitsScaling>,
                                    SingleAdapter<kBackward, kRank, kSplitsScaling>>;
  using RowMap = std::conditional_t<kSegmented, Segments<kBlockM>, OneSegment<kBlockM, kCluster>>;
  using Tile = typename RowMap::Tile;
  using Layers = std::conditional_t<kShared, Projections<kBackward>, OneLayer>;
  using Params = typename Layers::Params;
  static_assert(!kSegmented || (kCluster == 1 && !kDropout), "no such kernel for rows in segments");
  static_assert(!kShared || kRank <= kBox, "no such kernel for several projections");
  using Epilogue =
      std::conditional_t<kBackward && kDropout, MaskedBranchEpilogue<KernelTraits>, BiasEpilogue<KernelTraits>>;

  // ---- the consumers' share of a tile: 64 rows each, or all 64 rows and half of the columns
  static constexpr int kWarpgroupsM = kBlockM / kMmaM, kWarpgroupsN = kConsumerWarpgroups / kWarpgroupsM;
  static constexpr int kColumns = kBlockN / kWarpgroupsN;  // of a warpgroup
  static constexpr int kSlices = kColumns / kBox;          // in which a warpgroup finishes its columns

  // Column 0 may make S fused with its own tile where both accumulators fit; not where few rows make short tiles, and
  // all would wait for a longer one.
  static constexpr bool kFuses = kRank <= 64 && !kSegmented && !BaseWeight::kConverts;
  // Fragments of X that a forward masks between two commits: all of a step's, or half of them where a fused tile's
  // accumulators leave no room for more. Then the second half waits for all products in flight, the base product's too,
  // and the tensor cores have the other warpgroup's meanwhile.
  static constexpr int kFusedFragments = kBlockN == 256 && kRank > 32 ? kMmasPerStep / 2 : kMmasPerStep;

  // dX under the masks of several branches: each slice of a tile is finished with all of them, and they are loaded so.
  static constexpr bool kMasksSeveral = kShared && kBackward && kDropout;
  // Beyond rank 64 the only branch is loaded slice by slice as well.
  static constexpr bool kSlicedBranch = kBackward && kDropout && (!kFuses || kMasksSeveral);

  // ---- registers of a thread
  // The accumulators of an output tile, or of whatever else a tile sums; the extra ones hold S in a fused tile, a slice
  // of dX's masked branch, or a gradient tile's second block.
  static constexpr int kAccumulators = kColumns / 2;
  static constexpr int kShrinkAccumulators = kRank / 2;
  static constexpr int kSliceAccumulators = kBox / 2;
  static constexpr int kExtraAccumulators = kFuses ? kShrinkAccumulators : 1;
  static constexpr int kSplitPartials = kAccumulators + kShrinkAccumulators;  // of a split tile, kept in memory

  // ---- gradient tiles: 64 rows a step of kGradColumns columns of dY or X, and of S or dS
  static constexpr int kGradColumns = kBlockN == 256 && kFuses ? 256 : 128;
  static constexpr int kGradBlocks = kGradColumns / (kConsumerWarpgroups * kBox);  // of 64 columns, of a warpgroup
  static constexpr int kOnesAccumulators = 4;  // of a product with eight columns of ones
  // Kept in memory. Rows in segments have no dbias: its sums would be of weights, not of adapters.
  static constexpr int kGradPartials = kGradBlocks * (kShrinkAccumulators + (kSegmented ? 0 : kOnesAccumulators));
  static constexpr int kGradRightOffset = kGradColumns * kSwizzleSpan;
  static constexpr int kGradBytes = kGradRightOffset + kRank * kSwizzleSpan;

  // ---- a pipeline stage: a step of the activations, the weight, and in a fused tile the shrinking factor
  static constexpr int kActBytes = kBlockM * kSwizzleSpan, kDownBytes = Branch::kDownBytes;
  static constexpr int kWeightOffset = kActBytes, kFusedDownOffset = kWeightOffset + BaseWeight::kStageBytes;
  static constexpr int kStageBytes = kFusedDownOffset + (kFuses ? kDownBytes : 0);
  // A shrink tile reads so little a step that the pipeline could not hide its loads: it loads two steps into a stage,
  // where they fit into the weight's place. Steps past the end are zero on both sides.
  static constexpr int kShrinkSteps = !kSplits && 2 * (kActBytes + kDownBytes) <= kStageBytes ? 2 : 1;
  static constexpr int kShrinkDownOffset =
      kShrinkSteps == 1 ? (kFuses ? kFusedDownOffset : kWeightOffset) : kShrinkSteps * kActBytes;
  static_assert(!kBackward || kGradBytes <= kStageBytes, "a gradient step fits a stage");

  // ---- shared memory: staging buffers of finished tiles, two biases, barriers, ones, the table of segments, what
  // dropout keeps of each of several branches, then the pipeline's stages
  static constexpr int kKeepBytes = kMasksSeveral ? kMaxProjections * kConsumerWarpgroups * kMmaM * kColumns / 8 : 0;
  static constexpr int kStagingBuffers =
      kBlockN == 256 && (kRank >= 64 || kMasksSeveral) ? 2 : kSlices;  // of a box, of a warpgroup
  static_assert(kSlices % kStagingBuffers == 0, "a tile starts with the buffer that was filled longest ago");
  // Slices that are staged between two barriers: all of them where the whole tile fits.
  static constexpr int kSlicesPerPhase = kStagingBuffers == kSlices ? kSlices : 1;
  static constexpr int kStagingOffset = 0;
  static constexpr int kBiasOffset = kStagingOffset + kConsumerWarpgroups * kStagingBuffers * kBoxBytes;
  static constexpr int kBiasBytes = kBlockN * kElementBytes;
  static constexpr int kBarrierOffset = kBiasOffset + 2 * kBiasBytes;
  static constexpr int kBarrierBytes = 256;
  static constexpr int kOnesBytes = 8 * kMmaK * kElementBytes;  // an 8 x 16 matrix of ones, for dbias
  static constexpr int kOnesOffset = round_up(kBarrierOffset + kBarrierBytes, kOnesBytes);
  static constexpr int kTableOffset = kOnesOffset + kOnesBytes;
  static constexpr int kKeepOffset = kTableOffset + RowMap::kTableBytes;
  static constexpr int kStageOffset = round_up(kKeepOffset + kKeepBytes, kSwizzleRows* kSwizzleSpan);
  static constexpr int kStages = (kSharedLimit - kStageOffset) / kStageBytes < kMaxStages
                                     ? (kSharedLimit - kStageOffset) / kStageBytes
                                     : kMaxStages;
  static constexpr int kSharedBytes = kStageOffset + kStages * kStageBytes;
  static_assert(kStages >= 3, "the pipeline is too short to hide a load");
};

// The flag of a row block's S of a layer; behind these lie the flags of the serial reductions.
template <class Traits>
__device__ __forceinline__ int* row_flag(const typename Traits::Params& params, int row_block, int layer) {
  return params.workspace + kFlagsWord + row_block * Traits::Layers::count(params) + layer;
}

// The flag of a panel of a packed weight: the last words.
__device__ __forceinline__ int* panel_flag(const Params& params, int panel) {
  return params.workspace + params.workspace_words - params.schedule.panels + panel;
}

}  // namespace fastlora::sm90
