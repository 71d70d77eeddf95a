// Policy: which rows a row block and a group of row blocks hold, and between which groups a gradient is summed.
//
// Today's one: all rows are one segment; a gradient is one sum over all groups. The next one (segments whose offsets
// lie in device memory: experts, a mixed batch) goes here: a struct with the same members; KernelTraits::RowMap names
// it.
#pragma once
#include "../host/params.h"

namespace fastlora::sm90 {

struct RowRange {
  int first, end;
};

template <int kBlockM, int kCluster>
struct OneSegment {
  __device__ __forceinline__ static int first_row(int row_block) { return row_block * kBlockM; }

  __device__ __forceinline__ static RowRange rows_of_group(const Params& params, int group) {
    const int rows = params.schedule.group_m * kBlockM * kCluster;
    const int first = group * rows, end = first + rows;
    return {first, end < params.m ? end : params.m};
  }

  // First and last of the groups that a gradient which includes `group` is summed over.
  __device__ __forceinline__ static int first_group(const Params&, int) { return 0; }
  __device__ __forceinline__ static int last_group(const Params& params, int) {
    return count_groups(params.schedule) - 1;
  }
};

}  // namespace fastlora::sm90
