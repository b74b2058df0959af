// AlignConv's columns on a CPU: gather the samples of rows, and scatter their gradients. The matrix products around
// them are ATen's, see model/ops/align_conv_products.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "align_conv_checks.h"
#include "cpu/clones.h"

namespace refinedet {
namespace {

using c10::BFloat16;
using c10::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Samples, weights and sums are computed in this type.
template <typename T>
using Accumulate = std::conditional_t<std::is_same_v<T, double>, double, float>;

struct Level {
  const void* cells;
  int64_t image_step, row_step, column_step;  // elements; channels are contiguous
  int64_t begin, pixel_begin;                 // first row number, first cell in the gradient of all levels
  int32_t cells_per_image, height, width;
  double inverse_stride;
};

struct Problem {
  std::vector<Tensor> kept;
  Level levels[kMaxLevels];
  AlignConvShape shape;
  Tensor boxes, rows;
};

// Features as [B, H, W, F]: in place where channels are contiguous, else copied.
Tensor channels_last(const Tensor& feature) {
  const Tensor cells = torch::stable::transpose(torch::stable::transpose(feature, 1, 3), 1, 2);
  return feature.stride(1) == 1 || feature.size(1) == 1 ? cells : torch::stable::contiguous(cells);
}

Problem describe(const std::vector<Tensor>& features, const std::vector<int64_t>& strides, const Tensor& boxes,
                 const Tensor& rows, int64_t aspects, int64_t kernel) {
  const ScalarType type = features.empty() ? ScalarType::Float : features[0].scalar_type();
  Problem problem{{}, {}, check_align_conv(features, strides, boxes, rows, aspects, kernel), {}, {}};
  int64_t begin = 0, pixels = 0;
  for (int l = 0; l < problem.shape.num_levels; ++l) {
    const Tensor cells = channels_last(features[l]);
    const int32_t height = problem.shape.height[l], width = problem.shape.width[l];
    problem.levels[l] = {cells.const_data_ptr(),
                         cells.stride(0),
                         cells.stride(1),
                         cells.stride(2),
                         begin,
                         pixels,
                         height * width,
                         height,
                         width,
                         1.0 / static_cast<double>(strides[l])};
    problem.kept.push_back(cells);
    begin += problem.shape.batch * height * width * aspects;
    pixels += problem.shape.batch * height * width;
  }
  const ScalarType box_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  problem.boxes = torch::stable::contiguous(torch::stable::to(boxes, box_type));
  problem.rows = torch::stable::contiguous(rows);
  return problem;
}

// The four cells around a sample, as offsets from an image's first cell, and their weights.
template <typename A>
struct Sample {
  Corners<A> y, x;

  Sample(const Level& level, const A* box, int kernel, int tap)
      : y(split_coordinate(sample_coordinate(box[1], box[3], tap / kernel, kernel, A(level.inverse_stride)),
                           level.height)),
        x(split_coordinate(sample_coordinate(box[0], box[2], tap % kernel, kernel, A(level.inverse_stride)),
                           level.width)) {}

  int32_t row(int corner) const { return corner < 2 ? y.low : y.high; }
  int32_t column(int corner) const { return corner % 2 == 0 ? x.low : x.high; }
  A weight(int corner) const {
    return (corner < 2 ? y.low_weight : y.high_weight) * (corner % 2 == 0 ? x.low_weight : x.high_weight);
  }
};

// `next` is read by the call after this one: it comes into the cache meanwhile, since no hardware foresees where to.
template <typename T, typename A>
REFINEDET_INLINE void blend_channels(const T* const* cells, const A* weights, const T* const* next, int64_t count,
                                     T* to) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const T *a = cells[0], *b = cells[1], *c = cells[2], *d = cells[3];
  const A wa = weights[0], wb = weights[1], wc = weights[2], wd = weights[3];
  const auto blend_one = [&](int64_t i) {
    to[i] = static_cast<T>(wa * static_cast<A>(a[i]) + wb * static_cast<A>(b[i]) + wc * static_cast<A>(c[i]) +
                           wd * static_cast<A>(d[i]));
  };
  int64_t first = 0;
  for (; first + kLine <= count; first += kLine) {
    for (int corner = 0; corner < 4; ++corner) __builtin_prefetch(next[corner] + first);
    for (int64_t i = first; i < first + kLine; ++i) blend_one(i);
  }
  for (; first < count; ++first) blend_one(first);
}

template <typename T, typename A>
REFINEDET_INLINE void add_channels(const T* from, A weight, int64_t count, A* to) {
  for (int64_t i = 0; i < count; ++i) to[i] += weight * static_cast<A>(from[i]);
}

// Weighted sum of four cells, and weighted addition to one.
#define REFINEDET_CHANNELS(T, A)                                                                                     \
  REFINEDET_CLONES void blend(const T* const* cells, const A* weights, const T* const* next, int64_t count, T* to) { \
    blend_channels(cells, weights, next, count, to);                                                                 \
  }                                                                                                                  \
  REFINEDET_CLONES void add(const T* from, A weight, int64_t count, A* to) { add_channels(from, weight, count, to); }
REFINEDET_CHANNELS(float, float)
REFINEDET_CHANNELS(double, double)
REFINEDET_CHANNELS(BFloat16, float)
REFINEDET_CHANNELS(Half, float)

Place place_of_row(const Problem& problem, int64_t row) {
  const AlignConvShape& shape = problem.shape;
  return place_of(problem.levels, shape.num_levels, shape.aspects, shape.batch, row);
}

template <typename T>
void gather(const Problem& problem, Tensor& columns) {
  using A = Accumulate<T>;
  const AlignConvShape& shape = problem.shape;
  const int taps = shape.kernel * shape.kernel;
  const int64_t* rows = static_cast<const int64_t*>(problem.rows.const_data_ptr());
  const A* boxes = static_cast<const A*>(problem.boxes.const_data_ptr());
  T* to = static_cast<T*>(columns.mutable_data_ptr());
  const std::vector<T> zeros(shape.channels);  // read in place of a corner off the map: an infinity must not spread
  torch::stable::parallel_for(0, problem.rows.numel(), 64, [&](int64_t begin, int64_t end) {
    const T* cells[2][4];
    A weights[2][4];
    const auto find = [&](int64_t sample_number) {
      const int64_t row = sample_number / taps, slot = sample_number % 2;
      const Place place = place_of_row(problem, rows[row]);
      const bool empty = place.level < 0;
      const Level& level = problem.levels[empty ? 0 : place.level];
      const T* image = static_cast<const T*>(level.cells) + place.image * level.image_step;
      const Sample<A> sample(level, boxes + 4 * row, shape.kernel, sample_number % taps);
      for (int corner = 0; corner < 4; ++corner) {
        const A weight = empty ? A(0) : sample.weight(corner);
        weights[slot][corner] = weight;
        cells[slot][corner] =
            weight != 0 ? image + sample.row(corner) * level.row_step + sample.column(corner) * level.column_step
                        : zeros.data();
      }
    };
    const int64_t last = end * taps - 1;
    find(begin * taps);
    for (int64_t now = begin * taps; now <= last; ++now) {
      const int64_t next = std::min(now + 1, last);
      if (next != now) find(next);
      blend(cells[now % 2], weights[now % 2], cells[next % 2], shape.channels, to + now * shape.channels);
    }
  });
}

// Every thread owns a slice of the channels, so that the sums have one order.
template <typename T>
void scatter(const Problem& problem, const Tensor& columns, Tensor& grad) {
  using A = Accumulate<T>;
  const AlignConvShape& shape = problem.shape;
  const int taps = shape.kernel * shape.kernel;
  const int64_t* rows = static_cast<const int64_t*>(problem.rows.const_data_ptr());
  const A* boxes = static_cast<const A*>(problem.boxes.const_data_ptr());
  const T* from = static_cast<const T*>(columns.const_data_ptr());
  A* to = static_cast<A*>(grad.mutable_data_ptr());
  torch::stable::parallel_for(0, shape.channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t row = 0; row < problem.rows.numel(); ++row) {
      const Place place = place_of_row(problem, rows[row]);
      if (place.level < 0) continue;
      const Level& level = problem.levels[place.level];
      const int64_t first = level.pixel_begin + int64_t(place.image) * level.cells_per_image;
      for (int tap = 0; tap < taps; ++tap) {
        const Sample<A> sample(level, boxes + 4 * row, shape.kernel, tap);
        for (int corner = 0; corner < 4; ++corner) {
          const A weight = sample.weight(corner);
          if (weight == 0) continue;
          const int64_t pixel = first + int64_t(sample.row(corner)) * level.width + sample.column(corner);
          add(from + (row * taps + tap) * shape.channels + begin, weight, end - begin,
              to + pixel * shape.channels + begin);
        }
      }
    }
  });
}

template <typename Run>
void by_type(ScalarType type, const Run& run) {
  if (type == ScalarType::Float) return run(float());
  if (type == ScalarType::Double) return run(double());
  if (type == ScalarType::BFloat16) return run(BFloat16());
  run(Half());
}

Tensor align_conv_columns(std::vector<Tensor> features, std::vector<int64_t> strides, Tensor boxes, Tensor rows,
                          int64_t aspects, int64_t kernel) {
  const Problem problem = describe(features, strides, boxes, rows, aspects, kernel);
  Tensor columns = torch::stable::new_empty(features[0], {rows.numel(), kernel * kernel * problem.shape.channels});
  by_type(features[0].scalar_type(), [&](auto type) { gather<decltype(type)>(problem, columns); });
  return columns;
}

void align_conv_scatter(Tensor grad, Tensor columns, std::vector<Tensor> features, std::vector<int64_t> strides,
                        Tensor boxes, Tensor rows, int64_t aspects, int64_t kernel) {
  const Problem problem = describe(features, strides, boxes, rows, aspects, kernel);
  check_scatter(problem.shape, grad, columns, features[0], rows.numel());
  by_type(features[0].scalar_type(), [&](auto type) { scatter<decltype(type)>(problem, columns, grad); });
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CPU, m) {
  m.impl("align_conv_columns", TORCH_BOX(&refinedet::align_conv_columns));
  m.impl("align_conv_scatter", TORCH_BOX(&refinedet::align_conv_scatter));
}
