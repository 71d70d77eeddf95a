// The queue of tiles. Rows of tiles are walked in groups, so that a group's rows of U stay in L2. Column 0 makes S for
// its row block, which the others wait for (alone, or beside the first tile of C); so a group's column 0 is queued one
// wave, as many tiles as there are clusters, before the end of the group in front of it. Each group is followed by the
// gradient tiles that read the rows it has just used:
//
//   column 0 of group 0 | group 0 ..., column 0 of group 1, ... one wave | gradients of group 0 | group 1 ... and so on
//
// A tile waits only for tiles of a lower number, whose owners are running: nothing can deadlock, however few CTAs fit.
#pragma once
#include "lora.h"

#ifdef __CUDACC__
#define FL_BOTH __host__ __device__ __forceinline__
#else
#define FL_BOTH inline
#endif

namespace fastlora {

struct Tile {
  int row, column, part;  // row block, column, part of the contraction
  int gradient;           // index among the group's gradient tiles, or -1; then `row` is the group
};

FL_BOTH int ceil_div(int a, int b) { return (a + b - 1) / b; }

FL_BOTH int count_tiles(const Schedule& s) {
  return s.rows * s.columns * s.splits + ceil_div(s.rows, s.group_m) * s.gradients;
}

FL_BOTH Tile locate(const Schedule& s, int ticket, int wave) {
  const int column_tiles = s.columns > 0 ? s.splits : 0;  // of one row block, in column 0
  const int other_columns = s.columns > 0 ? s.columns - 1 : 0;
  const int first_rows = s.rows < s.group_m ? s.rows : s.group_m;
  if (ticket < first_rows * column_tiles) return {ticket / s.splits, 0, ticket % s.splits, -1};

  // A group's stretch: its other columns, column 0 of the next group, its gradient tiles. Only the last group is
  // smaller.
  const int last = ceil_div(s.rows, s.group_m) - 1;
  const int rows_in_last = s.rows - last * s.group_m;
  const int stretch = s.group_m * s.columns * s.splits + s.gradients;
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
    return {(group + 1) * s.group_m + t / s.splits, 0, t % s.splits, -1};
  }
  if (t >= ahead_start) t -= ahead;
  const int i = t / s.splits;
  return {group * s.group_m + i % rows, 1 + i / rows, t % s.splits, -1};
}

}  // namespace fastlora
