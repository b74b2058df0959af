// The rows sorted by group without the host's knowing how many each has: a stable counting sort in three launches.
//
// A block of the first and the last kernel covers kOrderRows rows. Bodies of the parts between barriers, as in
// align_conv_fused.h.
#pragma once

#include "cuda/align_conv_sampling.h"

namespace refinedet {

constexpr int kOrderRows = 256;  // one a thread

// Group of a row; -1 for an empty row, and for the threads beyond the last row.
REFINEDET_BOTH int32_t group_of(const DeviceLevels& levels, const int64_t* index, int64_t row, int64_t num_rows) {
  if (row >= num_rows) return -1;
  const Place place = place_of(levels, index[row]);
  return place.level < 0 ? -1 : place.level * levels.aspects + place.aspect;
}

// Thread g turns the blocks' counts [blocks, groups] of its group into the rows of the group before each block, and
// returns the group's rows.
REFINEDET_BOTH int32_t scan_counts(int32_t* counts, int64_t num_blocks, int32_t num_groups, int32_t group) {
  int32_t total = 0;
  for (int64_t block = 0; block < num_blocks; ++block) {
    int32_t* count = counts + block * num_groups + group;
    const int32_t here = *count;
    *count = total;
    total += here;
  }
  return total;
}

// Place of the block's row `thread` in the order; groups [kOrderRows] are those of the block's rows.
REFINEDET_BOTH int32_t place_in_order(const int32_t* groups, const int32_t* before, const int32_t* group_start,
                                      int thread) {
  const int32_t group = groups[thread];
  int32_t rank = 0;
  for (int earlier = 0; earlier < thread; ++earlier) rank += groups[earlier] == group ? 1 : 0;
  return group_start[group] + before[group] + rank;
}

}  // namespace refinedet
