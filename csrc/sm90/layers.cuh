// Policy: the layers of a launch. It defines which tiles the columns and gradient tiles of the queue are, and of which
// layer a tile or a part of its contraction is; the layer then says which matrices are read and written, their sizes,
// the scaling and the mask.
//
// Two of them: one layer; and several projections of one input. A tile of the latter's Y, of its S and of its gradients
// is of one projection. A tile of dX or dS is of all of them: dX is contracted over the columns of all dY, projection
// by projection, and their branches follow; dS is made one by one.
#pragma once
#include "row_map.cuh"

namespace fastlora::sm90 {

struct OneLayer {
  static constexpr bool kSeveral = false;
  using Params = fastlora::Params;

  __device__ __forceinline__ static const Params& of(const Params& params, int) { return params; }
  __device__ __forceinline__ static int count(const Params&) { return 1; }
  __device__ __forceinline__ static int shrink_columns(const Params&) { return 1; }
  __device__ __forceinline__ static int first_gradient(const Params&, int) { return 0; }

  // The tile at a place of the queue; where kFuses, the columns that make S may make a tile of the output besides.
  template <bool kFuses>
  __device__ __forceinline__ static TileInfo describe(const Params& params, const fastlora::Tile& tile) {
    if (tile.gradient >= params.grad_b_tiles) return {kGradATile, tile.row, tile.gradient - params.grad_b_tiles, 0};
    if (tile.gradient >= 0) return {kGradBTile, tile.row, tile.gradient, 0};
    const bool fused = kFuses && params.fused_shrink;
    if (tile.column == 0) return {fused ? kFusedTile : kShrinkTile, tile.row, 0, tile.split};
    return {kBaseTile, tile.row, fused ? tile.column : tile.column - 1, tile.split};
  }

  // The layer of a tile that is of one.
  __device__ __forceinline__ static int of_tile(TileInfo) { return 0; }
  // Calls body(layer, is_last) for each layer that a tile of the output or of S is made from.
  template <class Body>
  __device__ __forceinline__ static void each(const Params&, TileInfo, Body body) {
    body(0, true);
  }
};

// No contraction is split: a tile has its projection in the place of its split.
template <bool kBackward>
struct Projections {
  static constexpr bool kSeveral = true;
  using Params = SharedParams;

  __device__ __forceinline__ static const fastlora::Params& of(const Params& params, int layer) {
    return params.layers[layer];
  }
  __device__ __forceinline__ static int count(const Params& params) { return params.count; }
  __device__ __forceinline__ static int shrink_columns(const Params& params) {
    return kBackward ? 1 : params.shrink_columns;
  }
  __device__ __forceinline__ static int first_gradient(const Params& params, int layer) {
    return params.first_gradient[layer];
  }

  template <bool kFuses>
  __device__ __forceinline__ static TileInfo describe(const Params& params, const fastlora::Tile& tile) {
    if (tile.gradient >= 0) {
      const int layer = find(params, params.first_gradient, tile.gradient);
      TileInfo found = OneLayer::describe<kFuses>(params.layers[layer],
                                                  {tile.row, 0, 0, tile.gradient - params.first_gradient[layer]});
      found.split = layer;
      return found;
    }
    if constexpr (kBackward) return OneLayer::describe<kFuses>(params, tile);
    const bool fused = kFuses && params.fused_shrink;
    if (tile.column < params.shrink_columns) return {fused ? kFusedTile : kShrinkTile, tile.row, 0, tile.column};
    const int layer = find(params, params.first_column, tile.column);
    const bool first_is_made = fused && layer < params.shrink_columns;
    return {kBaseTile, tile.row, tile.column - params.first_column[layer] + first_is_made, layer};
  }

  __device__ __forceinline__ static int of_tile(TileInfo tile) { return tile.split; }

  template <class Body>
  __device__ __forceinline__ static void each(const Params& params, TileInfo tile, Body body) {
    if constexpr (!kBackward) {
      body(tile.split, true);
    } else {
      const bool shrinks = tile.kind == kShrinkTile;
      const int last = shrinks ? params.last_shrunk : params.count - 1;
#pragma unroll 1
      for (int layer = 0; layer <= last; ++layer) {
        // Not every dS is needed where there is no dX.
        if (!shrinks || params.layers[layer].s_out) body(layer, layer == last);
      }
    }
  }

 private:
  // The last one that begins at or in front of a place.
  __device__ __forceinline__ static int find(const Params& params, const int (&first)[kMaxProjections], int place) {
    int layer = params.count - 1;
    while (layer > 0 && first[layer] > place) --layer;
    return layer;
  }
};

}  // namespace fastlora::sm90
