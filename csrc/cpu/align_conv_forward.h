// AlignConv on the CPU: sample a block of rows of one tap into cache, multiply it by that tap's filters, next tap.
//
// The columns of a whole level (600 MB at 1024 pixels) never exist: a block's samples of one tap (192 rows of 256
// channels) stay in the second-level cache, and its sums stay there over all taps.
#pragma once

#include "cpu/align_conv_layout.h"
#include "cpu/align_conv_sampling.h"

namespace refinedet {
namespace {

constexpr int64_t kBlockRows = 96;
// Of channels a product runs over; a panel of filters this deep stays in the first-level cache.
constexpr int64_t kBlockDepth = REFINEDET_VECTOR_BYTES == 64 ? 128 : 256;
// Packed filters of the groups that are worked on together.
constexpr int64_t kPackedBytes = int64_t(16) << 20;

struct Block {
  int group;
  int64_t first, count;  // rows
};

// Filters [O, F, T] of a group as [T, channel blocks][panels][depth, panel width], `outputs` columns from `column` on.
template <typename T, typename S>
void pack_filters(const AlignConvProblem& problem, const S* weight, int64_t column, T* packed) {
  using Vector = typename Simd<T>::Vector;
  constexpr int kWidth = Simd<T>::kWidth;
  const int64_t taps = int64_t(problem.kernel) * problem.kernel;
  const int64_t columns = round_up<T>(problem.outputs), vectors = columns / kWidth;
  // The panel that this vector of columns falls into.
  int64_t panel = 0;
  int width = panel_vectors(vectors);
  while ((panel + width) * kWidth <= column) {
    panel += width;
    width = panel_vectors(vectors - panel);
  }
  const S* rows[kWidth];
  T mask[kWidth];
  for (int i = 0; i < kWidth; ++i) {
    const bool inside = column + i < problem.outputs;
    rows[i] = weight + (inside ? column + i : 0) * problem.channels * taps;
    mask[i] = inside ? T(1) : T(0);
  }
  const bool whole = column + kWidth <= problem.outputs;
  for (int64_t begin = 0; begin < problem.channels; begin += kBlockDepth) {
    const int64_t depth = minimum(kBlockDepth, problem.channels - begin);
    T* block = packed + begin * columns + panel * kWidth * depth + (column - panel * kWidth);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at = (begin + k) * taps + tap;
        Vector values;
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) values[i] = load(rows[i] + at);
        if (!whole) values = values * load_vector<T>(mask);
        store_vector<T>(block + tap * problem.channels * columns + k * width * kWidth, values);
      }
    }
  }
}

template <typename T, typename S>
struct ForwardScratch {
  RowCorners<T>* corners;
  T *samples, *sums;
};

template <typename T, typename S>
void forward_block(const AlignConvProblem& problem, const Block& block, const T* packed, const S* zeros,
                   const ForwardScratch<T, S>& scratch) {
  const AlignConvLevel& level = problem.levels[block.group / problem.aspects];
  const AlignConvRow* rows = problem.rows + block.first;
  const int64_t columns = round_up<T>(problem.outputs);
  const int64_t stride = row_stride<T>(minimum(kBlockDepth, problem.channels));
  const S* bias = static_cast<const S*>(level.bias) + block.group % problem.aspects * problem.outputs;
  for (int64_t r = 0; r < block.count; ++r) {
    T* sums = scratch.sums + r * columns;
    for (int64_t o = 0; o < columns; ++o) sums[o] = o < problem.outputs ? load(bias + o) : T(0);
  }
  find_corners(problem, level, rows, block.count, scratch.corners);
  for (int tap = 0; tap < problem.kernel * problem.kernel; ++tap) {
    const T* filters = packed + tap * problem.channels * columns;
    for (int64_t begin = 0; begin < problem.channels; begin += kBlockDepth) {
      const int64_t depth = minimum(kBlockDepth, problem.channels - begin);
      sample_rows<T, S>(level, scratch.corners, block.count, tap / problem.kernel, tap % problem.kernel, begin, depth,
                        zeros, scratch.samples, stride);
      multiply<T>(block.count, columns, depth, {scratch.samples, stride, 1}, {filters + begin * columns, true, 0},
                  scratch.sums, columns, true);
    }
  }
  for (int64_t r = 0; r < block.count; ++r) {
    S* to = static_cast<S*>(problem.output) + rows[r].row * problem.outputs;
    for (int64_t o = 0; o < problem.outputs; ++o) store(to + o, scratch.sums[r * columns + o]);
  }
}

template <typename T, typename S>
void forward_groups(const AlignConvProblem& problem, int first_group, int last_group, T* packed, const S* zeros,
                    const ForwardScratch<T, S>* scratch) {
  const int64_t taps = int64_t(problem.kernel) * problem.kernel;
  const int64_t columns = round_up<T>(problem.outputs), group_size = taps * problem.channels * columns;
  const int64_t vectors = columns / Simd<T>::kWidth;
  Counter to_pack, to_compute;
  const auto place = [&](int group) {  // of the group's filters, among the groups that have rows
    T* at = packed;
    for (int g = first_group; g < group; ++g)
      at += problem.group_start[g + 1] > problem.group_start[g] ? group_size : 0;
    return at;
  };
  run_parallel(problem, [&](int) {
    for (int64_t task; (task = to_pack.next()) < (last_group - first_group) * vectors;) {
      const int group = first_group + static_cast<int>(task / vectors);
      if (problem.group_start[group] == problem.group_start[group + 1]) continue;
      const AlignConvLevel& level = problem.levels[group / problem.aspects];
      const S* weight =
          static_cast<const S*>(level.weight) + group % problem.aspects * problem.outputs * problem.channels * taps;
      pack_filters<T, S>(problem, weight, task % vectors * Simd<T>::kWidth, place(group));
    }
  });
  const auto num_blocks = [&](int group) {
    return (problem.group_start[group + 1] - problem.group_start[group] + kBlockRows - 1) / kBlockRows;
  };
  run_parallel(problem, [&](int worker) {
    int group = first_group;
    int64_t passed = 0;  // blocks of the groups before this one
    while (true) {
      const int64_t task = to_compute.next();
      while (group < last_group && task - passed >= num_blocks(group)) passed += num_blocks(group++);
      if (group == last_group) break;
      const int64_t first = problem.group_start[group] + (task - passed) * kBlockRows;
      const Block block{group, first, minimum(kBlockRows, problem.group_start[group + 1] - first)};
      forward_block<T, S>(problem, block, place(group), zeros, scratch[worker]);
    }
  });
}

template <typename T, typename S>
void forward(AlignConvProblem& problem) {
  const int64_t taps = int64_t(problem.kernel) * problem.kernel;
  const int64_t columns = round_up<T>(problem.outputs), group_size = taps * problem.channels * columns;
  const int num_groups = problem.num_levels * problem.aspects;
  int used = 0;
  for (int g = 0; g < num_groups; ++g) used += problem.group_start[g + 1] > problem.group_start[g];
  if (used == 0) return;
  copy_cells<S>(problem);
  const int64_t together = maximum(1, minimum(used, kPackedBytes / (group_size * int64_t(sizeof(T)))));
  T* packed = allocate<T>(problem, together * group_size);
  S* zeros = allocate<S>(problem, problem.channels);
  std::memset(static_cast<void*>(zeros), 0, problem.channels * sizeof(S));
  auto* scratch = allocate<ForwardScratch<T, S>>(problem, problem.num_workers);
  for (int worker = 0; worker < problem.num_workers; ++worker) {
    scratch[worker] = {allocate<RowCorners<T>>(problem, kBlockRows),
                       allocate<T>(problem, kBlockRows * row_stride<T>(minimum(kBlockDepth, problem.channels))),
                       allocate<T>(problem, kBlockRows * columns)};
  }
  for (int first = 0; first < num_groups;) {
    int last = first;
    for (int64_t taken = 0; last < num_groups; ++last) {
      taken += problem.group_start[last + 1] > problem.group_start[last];
      if (taken > together) break;
    }
    forward_groups<T, S>(problem, first, last, packed, zeros, scratch);
    first = last;
  }
}

}  // namespace
}  // namespace refinedet
