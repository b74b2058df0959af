// Gradients of AlignConv on the CPU, to the filters and to the features.
//
// No two threads add to the same number, and every sum runs in the order of the rows: the gradients are the same to the
// last bit whatever the number of threads.
#pragma once

#include "cpu/align_conv_forward.h"

namespace refinedet {
namespace {

template <typename T>
struct BackwardScratch {
  RowCorners<T>* corners;
  T *samples, *grads, *sums;
};

// Output gradients of the rows as [count, outputs], `stride` apart.
template <typename T, typename S>
void gather_grads(const AlignConvProblem& problem, const AlignConvRow* rows, int64_t count, T* grads, int64_t stride) {
  for (int64_t r = 0; r < count; ++r) {
    const S* from = static_cast<const S*>(problem.output_grad) + rows[r].row * problem.outputs;
    for (int64_t o = 0; o < problem.outputs; ++o) grads[r * stride + o] = load(from + o);
  }
}

// weight_grad[o, f] of one tap = sum over the group's rows of grad[row, o] * sample[row, f], and likewise the bias.
template <typename T, typename S>
void filter_gradient(const AlignConvProblem& problem, int group, int tap, const S* zeros,
                     const BackwardScratch<T>& scratch) {
  const AlignConvLevel& level = problem.levels[group / problem.aspects];
  const int aspect = group % problem.aspects;
  const int64_t taps = int64_t(problem.kernel) * problem.kernel;
  const int64_t grads_stride = row_stride<T>(problem.outputs);
  S* weight_grad = static_cast<S*>(level.weight_grad) + aspect * problem.outputs * problem.channels * taps;
  for (int64_t begin = 0; begin < problem.channels; begin += kBlockDepth) {
    const int64_t channels = minimum(kBlockDepth, problem.channels - begin);
    const int64_t stride = row_stride<T>(channels);
    std::memset(scratch.sums, 0, problem.outputs * stride * sizeof(T));
    for (int64_t first = problem.group_start[group]; first < problem.group_start[group + 1]; first += kBlockRows) {
      const int64_t count = minimum(kBlockRows, problem.group_start[group + 1] - first);
      find_corners(problem, level, problem.rows + first, count, scratch.corners);
      gather_grads<T, S>(problem, problem.rows + first, count, scratch.grads, grads_stride);
      sample_rows<T, S>(level, scratch.corners, count, tap / problem.kernel, tap % problem.kernel, begin, channels,
                        zeros, scratch.samples, stride);
      multiply<T>(problem.outputs, channels, count, {scratch.grads, 1, grads_stride}, {scratch.samples, false, stride},
                  scratch.sums, stride, true);
    }
    for (int64_t o = 0; o < problem.outputs; ++o) {
      for (int64_t f = 0; f < channels; ++f) {
        store(weight_grad + (o * problem.channels + begin + f) * taps + tap, scratch.sums[o * stride + f]);
      }
    }
  }
  if (tap != 0) return;
  S* bias_grad = static_cast<S*>(level.bias_grad) + aspect * problem.outputs;
  std::memset(scratch.sums, 0, problem.outputs * sizeof(T));
  for (int64_t r = problem.group_start[group]; r < problem.group_start[group + 1]; ++r) {
    gather_grads<T, S>(problem, problem.rows + r, 1, scratch.grads, grads_stride);
    for (int64_t o = 0; o < problem.outputs; ++o) scratch.sums[o] += scratch.grads[o];
  }
  for (int64_t o = 0; o < problem.outputs; ++o) store(bias_grad + o, scratch.sums[o]);
}

// Filters [O, F, T] of a group as [T, O, stride].
template <typename T, typename S>
void turn_filters(const AlignConvProblem& problem, const S* weight, int64_t output, T* turned, int64_t stride) {
  const int64_t taps = int64_t(problem.kernel) * problem.kernel;
  const S* from = weight + output * problem.channels * taps;
  for (int64_t tap = 0; tap < taps; ++tap) {
    T* to = turned + (tap * problem.outputs + output) * stride;
    for (int64_t f = 0; f < problem.channels; ++f) to[f] = load(from + f * taps + tap);
    for (int64_t f = problem.channels; f < stride; ++f) to[f] = T(0);
  }
}

// Rows of the group that belong to the image: [first, last) of problem.rows.
inline void find_image(const AlignConvProblem& problem, int group, int32_t image, int64_t* first, int64_t* last) {
  const auto bound = [&](int32_t value) {
    int64_t low = problem.group_start[group], high = problem.group_start[group + 1];
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (problem.rows[middle].image < value) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return low;
  };
  *first = bound(image);
  *last = bound(image + 1);
}

// Adds to the gradient of `channels` channels, from `begin` on, of one image of one level.
template <typename T, typename S>
void feature_gradient(const AlignConvProblem& problem, int level_number, int32_t image, int64_t begin, int64_t channels,
                      const T* turned, int64_t stride, const BackwardScratch<T>& scratch) {
  const AlignConvLevel& level = problem.levels[level_number];
  const int64_t taps = int64_t(problem.kernel) * problem.kernel;
  const int64_t grads_stride = row_stride<T>(problem.outputs), columns_stride = row_stride<T>(channels);
  for (int aspect = 0; aspect < problem.aspects; ++aspect, turned += taps * problem.outputs * stride) {
    int64_t first, last;
    find_image(problem, level_number * problem.aspects + aspect, image, &first, &last);
    for (; first < last; first += kBlockRows) {
      const int64_t count = minimum(kBlockRows, last - first);
      find_corners(problem, level, problem.rows + first, count, scratch.corners);
      gather_grads<T, S>(problem, problem.rows + first, count, scratch.grads, grads_stride);
      for (int tap = 0; tap < taps; ++tap) {
        const T* filters = turned + tap * problem.outputs * stride + begin;
        multiply<T>(count, channels, problem.outputs, {scratch.grads, grads_stride, 1}, {filters, false, stride},
                    scratch.samples, columns_stride, false);
        scatter_rows<T>(problem, level, scratch.corners, count, tap / problem.kernel, tap % problem.kernel, begin,
                        channels, scratch.samples, columns_stride);
      }
    }
  }
}

// Channels that one thread owns: whole cache lines, and small enough that every thread finds work.
template <typename T>
int64_t slice_channels(const AlignConvProblem& problem) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const int64_t slices = maximum(1, (4 * problem.num_workers + problem.batch - 1) / problem.batch);
  const int64_t wanted = (problem.channels + slices - 1) / slices;
  return minimum(kBlockDepth, maximum(2 * kLine, (wanted + kLine - 1) / kLine * kLine));
}

template <typename T, typename S>
void feature_gradients(const AlignConvProblem& problem, const BackwardScratch<T>* scratch) {
  const int64_t taps = int64_t(problem.kernel) * problem.kernel;
  const int64_t stride = row_stride<T>(problem.channels), group_size = taps * problem.outputs * stride;
  const int64_t level_size = problem.aspects * group_size;
  const int together =
      static_cast<int>(maximum(1, minimum(problem.num_levels, kPackedBytes / (level_size * int64_t(sizeof(T))))));
  T* turned = allocate<T>(problem, together * level_size);
  const int64_t width = slice_channels<T>(problem), slices = (problem.channels + width - 1) / width;
  for (int base = 0; base < problem.num_levels; base += together) {
    const int64_t levels = minimum(together, problem.num_levels - base);
    Counter to_turn, to_compute;
    run_parallel(problem, [&](int) {
      const int64_t per_level = problem.aspects * problem.outputs;
      for (int64_t task; (task = to_turn.next()) < levels * per_level;) {
        const int64_t level = task / per_level, group = task % per_level / problem.outputs;
        const int64_t start = (base + level) * problem.aspects + group;
        if (problem.group_start[start] == problem.group_start[start + 1]) continue;
        const S* weight = static_cast<const S*>(problem.levels[base + level].weight) +
                          group * problem.outputs * problem.channels * taps;
        turn_filters<T, S>(problem, weight, task % problem.outputs, turned + level * level_size + group * group_size,
                           stride);
      }
    });
    run_parallel(problem, [&](int worker) {
      const int64_t per_level = problem.batch * slices;
      for (int64_t task; (task = to_compute.next()) < levels * per_level;) {
        const int64_t level = task / per_level, begin = task % slices * width;
        feature_gradient<T, S>(problem, static_cast<int>(base + level), static_cast<int32_t>(task % per_level / slices),
                               begin, minimum(width, problem.channels - begin), turned + level * level_size, stride,
                               scratch[worker]);
      }
    });
  }
}

template <typename T, typename S>
void backward(AlignConvProblem& problem) {
  const int num_groups = problem.num_levels * problem.aspects;
  const int taps = problem.kernel * problem.kernel;
  const int64_t stride = row_stride<T>(minimum(kBlockDepth, problem.channels));
  S* zeros = allocate<S>(problem, problem.channels);
  std::memset(static_cast<void*>(zeros), 0, problem.channels * sizeof(S));
  auto* scratch = allocate<BackwardScratch<T>>(problem, problem.num_workers);
  for (int worker = 0; worker < problem.num_workers; ++worker) {
    scratch[worker] = {allocate<RowCorners<T>>(problem, kBlockRows), allocate<T>(problem, kBlockRows * stride),
                       allocate<T>(problem, kBlockRows * row_stride<T>(problem.outputs)),
                       allocate<T>(problem, problem.outputs * stride)};
  }
  if (problem.levels[0].weight_grad != nullptr) {
    copy_cells<S>(problem);
    Counter counter;
    run_parallel(problem, [&](int worker) {
      for (int64_t task; (task = counter.next()) < num_groups * taps;) {
        filter_gradient<T, S>(problem, static_cast<int>(task / taps), static_cast<int>(task % taps), zeros,
                              scratch[worker]);
      }
    });
  }
  if (problem.levels[0].cells_grad != nullptr) feature_gradients<T, S>(problem, scratch);
}

}  // namespace
}  // namespace refinedet
