// The queue of tiles, for the host and the kernels. Rows of tiles are walked in groups, so that a group's rows of the
// activations stay in L2. Column 0 makes S for its row block (fused with the first tile of the output, or in a separate
// tile), and the other columns wait for it; so a group's column 0 is queued one wave, as many tiles as there are
// clusters, before the end of the group in front of it. Each group is followed by the gradient tiles that read the rows
// it has just used:
//
//   column 0 of group 0 | group 0 ..., column 0 of group 1, ... one wave | gradients of group 0 | group 1 ... and so on
//
// Of several projections that share an input, the first `shrink_columns` columns make S, each that of a projection.
//
// Where a tile of the output takes long, short gradient tiles between these make the last wave ragged; then all of them
// come last, group by group.
//
// A tile waits only for tiles of a lower number, whose owners are running: nothing can deadlock, however few CTAs fit.
#pragma once

#ifdef __CUDACC__
#define FL_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define FL_HOST_DEVICE inline
#endif

namespace fastlora {

// A cluster of CTAs takes a tile each at a time, from neighbouring row blocks; so "row blocks" here are the cluster's.
struct Schedule {
  int rows;            // row blocks of the output
  int columns;         // columns of tiles; column 0 makes S, or the first `shrink_columns` do
  int group_m;         // row blocks of a group
  int gradient_tiles;  // of each group
  int gradients_last;  // gradient tiles follow all other tiles, not their own group's
  int splits;          // of the contraction of each tile of a column
  int panels;          // of a packed base weight, which tiles in front of this queue decode; 0 of a dense one
  int parts;           // tiles that decode a panel
};

struct Tile {
  int row, column, split;  // row block, column, split of the contraction
  int gradient;            // index among the group's gradient tiles, or -1; if it is none, `row` is the group
};

FL_HOST_DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

FL_HOST_DEVICE int count_groups(const Schedule& s) { return ceil_div(s.rows, s.group_m); }

FL_HOST_DEVICE int count_column_tiles(const Schedule& s) { return s.rows * s.columns * s.splits; }

FL_HOST_DEVICE int count_tiles(const Schedule& s) { return count_column_tiles(s) + count_groups(s) * s.gradient_tiles; }

// Tiles that decode the base weight, panel by panel: the first tickets. Those of the queue follow.
FL_HOST_DEVICE int count_decode_tiles(const Schedule& s) { return s.panels * s.parts; }

// What ticket number `ticket`, counted from the queue's first tile, stands for, where `wave` clusters run at once.
FL_HOST_DEVICE Tile locate(const Schedule& s, int ticket, int wave, int shrink_columns = 1) {
  const int behind = ticket - count_column_tiles(s);
  if (s.gradients_last && behind >= 0) return {behind / s.gradient_tiles, 0, 0, behind % s.gradient_tiles};

  const int column_tiles = s.columns > 0 ? s.splits * shrink_columns : 0;  // of one row block, that make S
  const int other_columns = s.columns > 0 ? s.columns - shrink_columns : 0;
  const int first_rows = s.rows < s.group_m ? s.rows : s.group_m;
  if (ticket < first_rows * column_tiles) {
    return {ticket / s.splits / shrink_columns, ticket / s.splits % shrink_columns, ticket % s.splits, -1};
  }

  // A group's stretch of the queue: its other columns, column 0 of the next group, its gradient tiles if they are here.
  // Only the last group is smaller.
  const int last = count_groups(s) - 1;
  const int rows_in_last = s.rows - last * s.group_m;
  const int stretch = s.group_m * s.columns * s.splits + (s.gradients_last ? 0 : s.gradient_tiles);
  const int last_start = last == 0 ? 0 : last * stretch - (s.group_m - rows_in_last) * column_tiles;
  int t = ticket - first_rows * column_tiles;
  const int group = t >= last_start ? last : t / stretch;
  t -= group == last ? last_start : group * stretch;
  const int rows = group == last ? rows_in_last : s.group_m;
  const int rows_ahead = group + 1 < last ? s.group_m : group + 1 == last ? rows_in_last : 0;
  const int others = rows * other_columns * s.splits, ahead = rows_ahead * column_tiles;
  const int ahead_start = others > wave ? others - wave : 0;
  if (t >= others + ahead) return {group, 0, 0, t - others - ahead};
  if (t >= ahead_start && t < ahead_start + ahead) {
    t -= ahead_start;
    return {(group + 1) * s.group_m + t / s.splits / shrink_columns, t / s.splits % shrink_columns, t % s.splits, -1};
  }
  if (t >= ahead_start) t -= ahead;
  const int i = t / s.splits;
  return {group * s.group_m + i % rows, shrink_columns + i / rows, t % s.splits, -1};
}

}  // namespace fastlora
