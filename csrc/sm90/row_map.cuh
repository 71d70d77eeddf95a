// Policy: the row map. It defines which rows a row block and a gradient tile hold, which matrices of a stack a tile is
// multiplied by, and over which gradient tiles a gradient is summed.
//
// Two of them: all rows are one segment, of one weight and one adapter; and segments (experts, a mixed batch) whose
// ends lie in device memory, where nobody on the host reads them.
#pragma once
#include "../host/params.h"
#include "ptx/memory.cuh"
#include "ptx/thread.cuh"

namespace fastlora::sm90 {

// A fill tile stores zeros or NaN in the place of a tile of the output; a zero tile, in the place of the gradients of
// adapters without rows.
enum TileKind { kBaseTile, kFusedTile, kShrinkTile, kGradBTile, kGradATile, kExit, kDecodeTile, kFillTile, kZeroTile };

// A tile as the producer hands it to the consumers; 16 bytes. In units of the cluster's tiles. A gradient tile's row is
// its group, its split is unused; a decode tile's row is its panel, its column its part. Of several projections, a
// tile's split is its projection (layers.cuh).
struct TileInfo {
  int kind, row, column, split;
};

// Steps of a contraction.
struct Steps {
  int first, end;
};

// A place in a serial reduction.
struct ReductionStep {
  int index, last;
};

// Which matrix, where there is no stack of them.
struct OnlyMatrix {};

template <int kBlockM, int kCluster>
struct OneSegment {
  static constexpr bool kSegmented = false;
  static constexpr int kTableBytes = 0;
  using Tile = TileInfo;

  __device__ __forceinline__ static void fill_table(const Params&, uint32_t) {}
  __device__ __forceinline__ static const Schedule& schedule(const Params& params, uint32_t) { return params.schedule; }
  __device__ __forceinline__ static int count_tiles(const Params& params, uint32_t) {
    return fastlora::count_tiles(params.schedule);
  }

  // Completes a tile that the queue holds; false where there is nothing to do.
  __device__ __forceinline__ static bool place(const Params&, uint32_t, Tile&) { return true; }
  // Whether nothing need be read for a tile.
  __device__ __forceinline__ static bool is_constant(Tile) { return false; }

  __device__ __forceinline__ static OnlyMatrix weight(const Params&, Tile) { return {}; }
  __device__ __forceinline__ static OnlyMatrix adapter(Tile) { return {}; }
  __device__ __forceinline__ static int bias(const Params&, Tile) { return 0; }
  __device__ __forceinline__ static bool has_branch(Tile) { return true; }

  // Of a tile of the output or of S: its first row; its first row of S as S is copied.
  __device__ __forceinline__ static int first_row(Tile tile) { return tile.row * kBlockM; }
  __device__ __forceinline__ static int first_row_of_s(Tile tile) { return first_row(tile); }
  // Whether a row's S is stored for the copy engine.
  __device__ __forceinline__ static bool is_copied(const Params& params, int row) { return row < params.m; }

  // Of a gradient tile: its steps of 64 rows; a step's first row of X, dY and the forward's S, and of dS as it is
  // copied.
  __device__ __forceinline__ static Steps gradient_steps(const Params& params, Tile tile) {
    const int rows = params.schedule.group_m * kBlockM * kCluster;
    const int first = tile.row * rows, end = first + rows;
    return {first / kBox, ceil_div(end < params.m ? end : params.m, kBox)};
  }
  __device__ __forceinline__ static int row_of_step(Tile, int step) { return step * kBox; }
  __device__ __forceinline__ static int row_of_ds(Tile, int step) { return step * kBox; }

  // The matrix of a stack that a gradient tile adds to, and its place among those that do.
  __device__ __forceinline__ static int owner(Tile) { return 0; }
  __device__ __forceinline__ static ReductionStep reduction_step(const Params& params, uint32_t, Tile tile) {
    return {tile.row, count_groups(params.schedule) - 1};
  }
};

// A tile of rows in segments; 32 bytes. A gradient tile holds the rows of a chunk, up to group_m row blocks of a
// segment: its row is the chunk's first row block. A zero tile's row is the first of its adapters.
struct SegmentTile : TileInfo {
  int first_row, end_row;  // of the row block to the segment's end, or of the chunk
  int segment;
  int adapter;  // or kNone
};

// Each segment has row blocks of its own, numbered over all segments, so that queue, flags and tiles are those of one
// product. The rows past the last end are a segment more, whose tiles store zeros. A tile's last rows may be the next
// segment's: they are loaded, and neither stored nor summed.
//
// Every CTA reads the ends once, into a table in shared memory. Ends that decrease or pass M are taken for the largest
// in front of them, or for M: nothing outside of the operands is touched, whatever they say. Rows whose weight or
// adapter does not exist are NaN.
template <int kBlockM>
struct Segments {
  static constexpr bool kSegmented = true;
  static constexpr int kTableBytes = (kMaxSegments + 1) * 16;
  static constexpr int kNone = -1, kMissing = -2;
  using Tile = SegmentTile;

  // Of a segment, and all in front of it: rows, row blocks, chunks; and its adapter, kNone or kMissing.
  struct Entry {
    int end_row, end_block, end_chunk, adapter;
  };

  __device__ __forceinline__ static Entry entry(uint32_t table, int segment) {
    if (segment < 0) return {};
    const uint4 words = load_shared_16(table + segment * 16);
    return {int(words.x), int(words.y), int(words.z), int(words.w)};
  }

  // By one warp.
  __device__ __forceinline__ static void fill_table(const Params& params, uint32_t table) {
    const SegmentParams& segments = params.segments;
    const int lane = int(lane_id());
    Entry before{};
#pragma unroll 1
    for (int first = 0; first <= segments.count; first += 32) {
      const int g = first + lane;
      const int given = g < segments.count ? segments.ends[g] : params.m;
      const int end = scan(max(before.end_row, min(given, params.m)), [](int a, int b) { return max(a, b); });
      const int previous = __shfl_up_sync(kFullMask, end, 1);
      const int adapter =
          g < segments.count ? index_of(segments.adapters, segments.wide_adapters, g, segments.n_adapters) : kNone;
      const int blocks = ceil_div(end - (lane == 0 ? before.end_row : previous), kBlockM);
      const int chunks = adapter >= 0 ? ceil_div(blocks, params.schedule.group_m) : 0;
      const auto add = [](int a, int b) { return a + b; };
      const Entry own = {end, before.end_block + scan(blocks, add), before.end_chunk + scan(chunks, add), adapter};
      if (g <= segments.count) {
        store_shared_16(table + g * 16, make_uint4(own.end_row, own.end_block, own.end_chunk, own.adapter));
      }
      before = {__shfl_sync(kFullMask, own.end_row, 31), __shfl_sync(kFullMask, own.end_block, 31),
                __shfl_sync(kFullMask, own.end_chunk, 31), kNone};
    }
  }

  // The launch's schedule has as many row blocks as there may be; this one, as there are.
  __device__ __forceinline__ static Schedule schedule(const Params& params, uint32_t table) {
    Schedule schedule = params.schedule;
    schedule.rows = entry(table, params.segments.count).end_block;
    return schedule;
  }

  // Behind the tiles of the output and of S: a gradient tile of each chunk and column, then zero tiles.
  __device__ __forceinline__ static int count_tiles(const Params& params, uint32_t table) {
    const int chunks = entry(table, params.segments.count).end_chunk;
    const int zeroed = ceil_div(params.segments.n_adapters, kAdaptersOfZeroTile);
    return count_column_tiles(schedule(params, table)) + (chunks + zeroed) * params.schedule.gradient_tiles;
  }

  __device__ __forceinline__ static bool place(const Params& params, uint32_t table, Tile& tile) {
    if (tile.kind == kExit) return true;
    const int count = params.segments.count;
    if (tile.kind == kGradATile || tile.kind == kGradBTile) {
      const int chunk = tile.row;
      if (chunk >= entry(table, count).end_chunk) {
        if (tile.kind == kGradATile) tile.column += params.grad_b_tiles;
        tile.row = (chunk - entry(table, count).end_chunk) * kAdaptersOfZeroTile;
        tile.kind = kZeroTile;
        return true;
      }
      const int segment = find(table, count, [=](Entry each) { return each.end_chunk > chunk; });
      const Entry before = entry(table, segment - 1), own = entry(table, segment);
      const int first = (chunk - before.end_chunk) * params.schedule.group_m;  // row block, in the segment
      tile.row = before.end_block + first;
      tile.first_row = before.end_row + first * kBlockM;
      tile.end_row = min(tile.first_row + params.schedule.group_m * kBlockM, own.end_row);
      tile.segment = segment;
      tile.adapter = own.adapter;
      return true;
    }
    const int block = tile.row;
    const int segment = find(table, count, [=](Entry each) { return each.end_block > block; });
    const Entry before = entry(table, segment - 1), own = entry(table, segment);
    tile.first_row = before.end_row + (block - before.end_block) * kBlockM;
    tile.end_row = own.end_row;
    tile.segment = segment;
    tile.adapter = own.adapter;
    if (tile.kind == kShrinkTile) return own.adapter >= 0;
    if (segment == count || own.adapter == kMissing || expert(params, segment) == kMissing) tile.kind = kFillTile;
    return true;
  }

  __device__ __forceinline__ static bool is_constant(Tile tile) {
    return tile.kind == kFillTile || tile.kind == kZeroTile;
  }

  __device__ __forceinline__ static int weight(const Params& params, Tile tile) { return expert(params, tile.segment); }
  __device__ __forceinline__ static int adapter(Tile tile) { return tile.adapter; }
  __device__ __forceinline__ static int bias(const Params& params, Tile tile) {
    return params.segments.n_biases > 1 ? expert(params, tile.segment) : 0;
  }
  __device__ __forceinline__ static bool has_branch(Tile tile) { return tile.adapter >= 0; }

  __device__ __forceinline__ static int first_row(Tile tile) { return tile.first_row; }
  // S is copied from rows that no two row blocks share: a block's last rows would else be read while the next segment's
  // are written.
  __device__ __forceinline__ static int first_row_of_s(Tile tile) { return tile.row * kBlockM; }
  // Whole row blocks are: of a block's last rows, which nobody sums or stores, whatever there is.
  __device__ __forceinline__ static bool is_copied(const Params&, int) { return true; }

  __device__ __forceinline__ static Steps gradient_steps(const Params&, Tile tile) {
    return {0, ceil_div(tile.end_row - tile.first_row, kBox)};
  }
  __device__ __forceinline__ static int row_of_step(Tile tile, int step) { return tile.first_row + step * kBox; }
  __device__ __forceinline__ static int row_of_ds(Tile tile, int step) { return tile.row * kBlockM + step * kBox; }

  __device__ __forceinline__ static int owner(Tile tile) { return tile.adapter; }

  // By a converged warp: which of its adapter's chunks a gradient tile holds.
  __device__ __forceinline__ static ReductionStep reduction_step(const Params& params, uint32_t table, Tile tile) {
    const int first_block = entry(table, tile.segment - 1).end_block;
    const ReductionStep all = count_chunks(params, table, tile.adapter, tile.segment);
    return {all.index + (tile.row - first_block) / params.schedule.group_m, all.last};
  }

  // By a converged warp: an adapter's chunks in front of a segment, and one less than all of them.
  __device__ __forceinline__ static ReductionStep count_chunks(const Params& params, uint32_t table, int adapter,
                                                               int segment) {
    int before = 0, all = 0;
#pragma unroll 1
    for (int g = int(lane_id()); g < params.segments.count; g += 32) {
      const Entry each = entry(table, g);
      if (each.adapter != adapter) continue;
      const int chunks = each.end_chunk - entry(table, g - 1).end_chunk;
      all += chunks;
      if (g < segment) before += chunks;
    }
    return {__reduce_add_sync(kFullMask, before), __reduce_add_sync(kFullMask, all) - 1};
  }

 private:
  // The weight of a segment, or kMissing.
  __device__ __forceinline__ static int expert(const Params& params, int segment) {
    const SegmentParams& segments = params.segments;
    const int found = index_of(segments.experts, segments.wide_experts, segment, segments.n_weights);
    return found == kNone ? kMissing : found;
  }

  // What segment g has by a list of 32-bit or 64-bit numbers; without one its own number, or the only matrix.
  __device__ __forceinline__ static int index_of(const void* list, int wide, int g, int count) {
    if (!list) return min(g, count - 1);
    const int64_t found = wide ? static_cast<const int64_t*>(list)[g] : static_cast<const int32_t*>(list)[g];
    return found >= 0 && found < count ? int(found) : found == kNone ? kNone : kMissing;
  }

  // The first segment for which `is_behind` holds; the last one, which it need not be asked for.
  template <class Predicate>
  __device__ __forceinline__ static int find(uint32_t table, int count, Predicate is_behind) {
    int first = 0, last = count;
#pragma unroll 1
    while (first < last) {
      const int middle = (first + last) / 2;
      if (is_behind(entry(table, middle))) {
        last = middle;
      } else {
        first = middle + 1;
      }
    }
    return first;
  }

  // The sum, by `combine`, of a warp's values up to the lane's own.
  template <class Combine>
  __device__ __forceinline__ static int scan(int value, Combine combine) {
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const int other = __shfl_up_sync(kFullMask, value, distance);
      if (int(lane_id()) >= distance) value = combine(value, other);
    }
    return value;
  }
};

}  // namespace fastlora::sm90
