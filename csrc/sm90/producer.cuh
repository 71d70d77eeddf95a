// The producer: one thread that claims tiles, hands them to the consumers, and keeps the pipeline's stages full.
#pragma once
#include "pipeline.cuh"
#include "ptx/tma.cuh"

namespace fastlora::sm90 {

template <class Traits>
struct Producer {
  using BaseWeight = typename Traits::BaseWeight;
  using Branch = typename Traits::Branch;
  using RowMap = typename Traits::RowMap;
  using Layers = typename Traits::Layers;
  using Tile = typename Traits::Tile;

  const typename Traits::Params& params;
  SharedMemory<Traits> shared;
  PipelineState<Traits::kStages> pipeline;
  int ticket;
  int layer = 0;           // at hand
  uint32_t cta;            // in the cluster; CTA 0 claims tiles for all
  int awaited_panel = -1;  // of a packed weight, the last one that was waited for

  __device__ __forceinline__ Producer(const typename Traits::Params& kernel_params, SharedMemory<Traits> shared_memory)
      : params(kernel_params), shared(shared_memory), cta(Traits::kCluster == 1 ? 0 : cta_in_cluster()) {}

  __device__ __forceinline__ int claim() { return fetch_add_relaxed(params.workspace + kTicketWord, 1); }

  __device__ __forceinline__ void run() {
    if (cta == 0) ticket = claim();
    prefetch_maps();
    for (int i = 0;; ++i) {
      const int slot = i & 1;
      Tile tile;
      if (cta == 0) {
        tile = describe();
        wait_slot(i);
        publish_tile(tile, slot);
      } else {
        tile = wait_tile(shared, i);
        release_tile(shared, slot);
      }
      if (tile.kind == kExit) return;
      tile = own_tile<Traits>(tile);
      note_tile(tile.kind, tile.row, tile.column, tile.split);
      if (BaseWeight::kDecodes && tile.kind == kDecodeTile) {
        // Not before the consumers are at this tile: another CTA may take the next one sooner.
        if (cta == 0) {
          wait_slot(i + 1);
          ticket = claim();
        }
      } else if (tile.kind == kGradATile || tile.kind == kGradBTile) {
        if constexpr (Traits::kBackward) load_gradient(tile);
      } else if (tile.kind == kShrinkTile) {
        load_shrink(tile);
      } else if (RowMap::is_constant(tile)) {
        ticket = claim();
      } else {
        load_output(tile, slot);
      }
    }
  }

  // What the launch has of the layer at hand.
  __device__ __forceinline__ const Params& own() const { return Layers::of(params, layer); }

  __device__ __forceinline__ void prefetch_maps() {
#pragma unroll 1
    for (layer = 0; layer < Layers::count(params); ++layer) {
      prefetch_map(&own().act);
      prefetch_map(&own().weight);
      if (!has_factors()) continue;
      prefetch_map(&own().lora_a);
      prefetch_map(&own().lora_b);
    }
    layer = 0;
  }

  __device__ __forceinline__ bool has_factors() const { return !Layers::kSeveral || own().r > 0; }

  // Waits until the slot of the cluster's i-th tile is free.
  __device__ __forceinline__ void wait_slot(int i) { mbarrier_wait(shared.tile_empty(i & 1), (i >> 1 & 1) ^ 1); }

  __device__ __forceinline__ void publish_tile(Tile tile, int slot) {
    const uint4 words = make_uint4(tile.kind, tile.row, tile.column, tile.split);
    store_shared_16(shared.tile(slot), words);
    if constexpr (RowMap::kSegmented) {
      store_shared_16(shared.tile(slot) + sizeof(TileInfo),
                      make_uint4(tile.first_row, tile.end_row, tile.segment, tile.adapter));
    }
    mbarrier_arrive(shared.tile_full(slot));
#pragma unroll
    for (uint32_t peer = 1; peer < Traits::kCluster; ++peer) {
      const uint32_t full = peer_address(shared.tile_full(slot), peer);
      mbarrier_arrive_expect_peer(full, SharedMemory<Traits>::kTileBytes);
      store_async_16(peer_address(shared.tile(slot), peer), words, full);
    }
  }

  // The tile of the ticket, or of the next one that has anything to do.
  __device__ __forceinline__ Tile describe() {
    Tile tile{};
    static_cast<TileInfo&>(tile) = look_up();
    while (!RowMap::place(params, shared.segment_table(), tile)) {
      ticket = claim();
      static_cast<TileInfo&>(tile) = look_up();
    }
    return tile;
  }

  __device__ __forceinline__ TileInfo look_up() const {
    const Schedule& schedule = RowMap::schedule(params, shared.segment_table());
    int number = ticket;
    if constexpr (BaseWeight::kDecodes) {
      number -= count_decode_tiles(schedule);
      if (number < 0) return {kDecodeTile, ticket / schedule.parts, ticket % schedule.parts, 0};
    }
    if (number >= RowMap::count_tiles(params, shared.segment_table())) return {kExit, 0, 0, 0};
    const fastlora::Tile tile = locate(schedule, number, gridDim.x / Traits::kCluster, Layers::shrink_columns(params));
    return Layers::template describe<Traits::kFuses>(params, tile);
  }

  // Waits for an empty stage and announces the bytes that will be copied into it.
  __device__ __forceinline__ uint32_t open_stage(uint32_t bytes) {
    mbarrier_wait(shared.stage_empty(pipeline.stage), pipeline.phase ^ 1);
    mbarrier_arrive_expect(shared.stage_full(pipeline.stage), bytes);
    return shared.stage(pipeline.stage);
  }

  __device__ __forceinline__ void copy(uint32_t address, const CUtensorMap* map, int column, int row) {
    tma_load(address, map, column, row, shared.stage_full(pipeline.stage));
  }

  // Copies a box into every CTA of the cluster.
  __device__ __forceinline__ void copy_to_cluster(uint32_t address, const CUtensorMap* map, int column, int row) {
    if constexpr (Traits::kCluster == 1) {
      copy(address, map, column, row);
    } else {
      tma_load_multicast(address, map, column, row, shared.stage_full(pipeline.stage), (1 << Traits::kCluster) - 1);
    }
  }

  // copy_box(i) for this CTA's share of kBoxes boxes that all CTAs of the cluster read. `first` is the number of the
  // first among the stage's boxes: CTAs take turns.
  template <int kBoxes, class CopyBox>
  __device__ __forceinline__ void share_boxes(int first, CopyBox copy_box) {
#pragma unroll
    for (int i = 0; i < kBoxes; i += Traits::kCluster) {
      const int box = i + int((cta + first) % Traits::kCluster);
      if (kBoxes % Traits::kCluster == 0 || box < kBoxes) copy_box(box);
    }
  }

  // Claims the next tile while this one's last copies are in flight: early enough to hide the atomic's latency, late
  // enough that a busy CTA does not delay a tile.
  __device__ __forceinline__ void claim_at(int step, Steps steps, int stride = 1) {
    const int when = steps.end - 2 * stride > steps.first ? steps.end - 2 * stride : steps.first;
    if (cta == 0 && step >= when && step - stride < when) ticket = claim();
  }

  // One that is of a matrix out of a stack.
  __device__ __forceinline__ void copy_to_cluster(uint32_t address, const CUtensorMap* map, OnlyMatrix, int column,
                                                  int row) {
    copy_to_cluster(address, map, column, row);
  }
  __device__ __forceinline__ void copy_to_cluster(uint32_t address, const CUtensorMap* map, int matrix, int column,
                                                  int row) {
    static_assert(Traits::kCluster == 1, "no stack is read by several CTAs");
    tma_load_3d(address, map, column, row, matrix, shared.stage_full(pipeline.stage));
  }

  // Waits until the rows of S of a row block are in memory, and lets the copy engine read them.
  __device__ __forceinline__ void wait_s(int row_block) {
    wait_for(row_flag<Traits>(params, row_block, layer), Traits::kWarpgroupsM);
    fence_async_global();
  }

  // Waits until a panel of a packed weight is decoded, likewise. Tiles of dX have one for all, and wait once.
  __device__ __forceinline__ void wait_panel(int panel) {
    if (panel == awaited_panel) return;
    wait_for(panel_flag(params, panel), params.schedule.parts * Traits::kCluster * kConsumerWarpgroups);
    fence_async_global();
    awaited_panel = panel;
  }

  __device__ __forceinline__ void load_act(uint32_t address, int m, int k) { copy(address, &own().act, k, m); }

  __device__ __forceinline__ void load_shrink(Tile tile) {
    Layers::each(params, tile, [&](int of_tile, bool is_last) {
      layer = of_tile;
      load_shrink_of_layer(tile, is_last);
    });
  }

  // `is_last`: of a tile's layers.
  __device__ __forceinline__ void load_shrink_of_layer(Tile tile, bool is_last) {
    const Steps steps = steps_of<Traits>(params, own(), tile.split);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; step += Traits::kShrinkSteps) {
      const uint32_t stage = open_stage(Traits::kShrinkSteps * (Traits::kActBytes + Traits::kDownBytes));
#pragma unroll
      for (int j = 0; j < Traits::kShrinkSteps; ++j) {
        const int k = (step + j) * kBlockK;
        load_act(stage + j * Traits::kActBytes, RowMap::first_row(tile), k);
        const uint32_t down = stage + Traits::kShrinkDownOffset + j * Traits::kDownBytes;
        Branch::load_down(*this, j, down, RowMap::adapter(tile), k);
      }
      if (is_last) claim_at(step, steps, Traits::kShrinkSteps);
      pipeline.advance();
    }
  }

  __device__ __forceinline__ void load_output(Tile tile, int slot) {
    bool finishes = false;
    Layers::each(params, tile, [&](int of_tile, bool is_last) {
      layer = of_tile;
      finishes = load_contraction(tile, slot, is_last);
    });
    if (!finishes) return;
    if constexpr (Traits::kMasksSeveral) {
#pragma unroll 1
      for (int slice = 0; slice < Traits::kColumns; slice += kBox) load_branches(tile, slice, slice + kBox);
    } else {
      load_branches(tile, 0, Traits::kSlicedBranch ? Traits::kColumns : kBox);
    }
  }

  // Loads slices of the branch of each layer.
  __device__ __forceinline__ void load_branches(Tile tile, int first_slice, int end_slice) {
    Layers::each(params, tile, [&](int of_tile, bool) {
      layer = of_tile;
      if (!RowMap::has_branch(tile) || !has_factors()) return;
      load_expand(tile, RowMap::first_row_of_s(tile), tile.column * Traits::kBlockN, first_slice, end_slice);
    });
  }

  // Returns whether it was the last split of a contraction.
  __device__ __forceinline__ bool load_contraction(Tile tile, int slot, bool is_last) {
    const int m = RowMap::first_row(tile), n = tile.column * Traits::kBlockN;
    const auto weight = RowMap::weight(params, tile);
    const bool makes_s = Traits::kFuses && tile.kind == kFusedTile && has_factors();
    const bool finishes = is_last_split<Traits>(params, tile.split);
    const bool loads_bias = finishes && own().has_bias;
    const uint32_t bytes = Traits::kActBytes + BaseWeight::copied_bytes(own()) + (makes_s ? Traits::kDownBytes : 0);
    const Steps steps = steps_of<Traits>(params, own(), tile.split);
    BaseWeight::await(*this, tile.column);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
      const bool bias_now = loads_bias && step == steps.first;
      const uint32_t stage = open_stage(bytes + (bias_now ? Traits::kBiasBytes : 0));
      const int k = step * kBlockK;
      load_act(stage, m, k);
      BaseWeight::load(*this, stage + Traits::kWeightOffset, weight, n, k);
      if (makes_s) Branch::load_down(*this, 0, stage + Traits::kFusedDownOffset, RowMap::adapter(tile), k);
      if (bias_now) copy(shared.bias(slot), &own().bias, n, RowMap::bias(params, tile));
      if (is_last) claim_at(step, steps);
      pipeline.advance();
    }
    return finishes;
  }

  // One more step of the contraction for every 64 ranks: S and the expanding factor through the same stages. A fused
  // tile has its rows of S in registers, where it is of one layer. dX's epilogue masks 64 columns of a warpgroup at a
  // time; beyond rank 64 it also loads them so.
  __device__ __forceinline__ void load_expand(Tile tile, int m, int n, int first_slice, int end_slice) {
    const bool loads_s = tile.kind == kBaseTile || (Traits::kShared && Traits::kBackward);
    constexpr bool kSliced = Traits::kSlicedBranch;
    constexpr int kBoxes = kSliced ? Traits::kWarpgroupsN : Traits::kBlockN / kBox;
    constexpr int kBoxStride = kSliced ? Traits::kColumns : kBox;
    constexpr int kRankBoxBytes = kBox * Branch::kRankSpan;
    if (loads_s) wait_s(tile.row);
#pragma unroll 1
    for (int slice = first_slice; slice < end_slice; slice += kBox) {
#pragma unroll 1
      for (int r = 0; r < (Traits::kFuses ? 1 : Branch::rank(own())); r += Branch::kRankStep) {
        const uint32_t stage = open_stage((kBoxes + (loads_s ? Traits::kWarpgroupsM : 0)) * kRankBoxBytes);
        if (loads_s) {
#pragma unroll
          for (int i = 0; i < Traits::kWarpgroupsM; ++i) copy(stage + i * kRankBoxBytes, &own().s, r, m + i * kBox);
        }
        share_boxes<kBoxes>(0, [&](int j) {
          const uint32_t box = stage + Traits::kWeightOffset + j * kRankBoxBytes;
          Branch::load_up(*this, box, RowMap::adapter(tile), n + slice + j * kBoxStride, r);
        });
        pipeline.advance();
      }
    }
  }

  __device__ __forceinline__ void load_gradient(Tile tile) {
    layer = Layers::of_tile(tile);
    const bool is_a = tile.kind == kGradATile;
    const CUtensorMap *left = is_a ? &own().layer_input : &own().act_square, *right = is_a ? &own().s : &own().saved_s;
    const int column = tile.column * Traits::kGradColumns;
    const Steps steps = RowMap::gradient_steps(params, tile);
#pragma unroll 1
    for (int step = steps.first; step < steps.end; ++step) {
      const int m = RowMap::row_of_step(tile, step), m_of_ds = RowMap::row_of_ds(tile, step);
      if (is_a && m_of_ds % Traits::kBlockM == 0) wait_s(m_of_ds / Traits::kBlockM);
      const uint32_t stage = open_stage(Traits::kGradBytes);
#pragma unroll
      for (int j = 0; j < Traits::kGradColumns / kBox; ++j) copy(stage + j * kBoxBytes, left, column + j * kBox, m);
      share_boxes<Traits::kRank / Branch::kRankStep>(0, [&](int j) {
        copy_to_cluster(stage + Traits::kGradRightOffset + j * kBoxBytes, right, j * kBox, is_a ? m_of_ds : m);
      });
      claim_at(step, steps);
      pipeline.advance();
    }
  }
};

}  // namespace fastlora::sm90
