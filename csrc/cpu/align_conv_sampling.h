// Bilinear samples of a level's cells into rows of columns, and their gradients back.
#pragma once

#include "cpu/matrix.h"

namespace refinedet {
namespace {

constexpr int kMaxKernel = 7;

// Where a row's samples lie: the corners of each of its K rows and K columns of taps.
template <typename T>
struct RowCorners {
  Corners<T> y[kMaxKernel], x[kMaxKernel];
  int32_t image;
};

// Coordinates are computed in double: in float, the rounding of a pixel coordinate alone costs 1e-5 of a cell.
template <typename T>
void find_corners(const AlignConvProblem& problem, const AlignConvLevel& level, const AlignConvRow* rows, int64_t count,
                  RowCorners<T>* corners) {
  for (int64_t r = 0; r < count; ++r) {
    double box[4];
    for (int i = 0; i < 4; ++i) {
      const int64_t at = int64_t(rows[r].row) * 4 + i;
      box[i] = problem.boxes_double ? static_cast<const double*>(problem.boxes)[at]
                                    : static_cast<const float*>(problem.boxes)[at];
    }
    corners[r].image = rows[r].image;
    for (int tap = 0; tap < problem.kernel; ++tap) {
      const auto narrow = [](const Corners<double>& wide) {
        return Corners<T>{wide.low, wide.high, T(wide.low_weight), T(wide.high_weight)};
      };
      const double y = sample_coordinate(box[1], box[3], tap, problem.kernel, level.inverse_stride);
      const double x = sample_coordinate(box[0], box[2], tap, problem.kernel, level.inverse_stride);
      corners[r].y[tap] = narrow(split_coordinate(y, level.height));
      corners[r].x[tap] = narrow(split_coordinate(x, level.width));
    }
  }
}

// samples[r, 0 .. channels) of tap (tap_y, tap_x), from channel `first` on; zeros up to the next whole vector.
template <typename T, typename S>
void sample_rows(const AlignConvLevel& level, const RowCorners<T>* corners, int64_t count, int tap_y, int tap_x,
                 int64_t first, int64_t channels, const S* zeros, T* samples, int64_t stride) {
  constexpr int kWidth = Simd<T>::kWidth;
  const int64_t padded = round_up<T>(channels);
  for (int64_t r = 0; r < count; ++r, samples += stride) {
    const Corners<T>& y = corners[r].y[tap_y];
    const Corners<T>& x = corners[r].x[tap_x];
    const T weights[4] = {y.low_weight * x.low_weight, y.low_weight * x.high_weight, y.high_weight * x.low_weight,
                          y.high_weight * x.high_weight};
    // A corner without weight is read from a row of zeros, so that an infinity elsewhere does not turn into NaN.
    const S* cells = static_cast<const S*>(level.cells) + corners[r].image * level.image_step + first;
    const S* low = cells + y.low * level.row_step;
    const S* high = cells + y.high * level.row_step;
    const S* from[4] = {weights[0] != 0 ? low + x.low * level.column_step : zeros,
                        weights[1] != 0 ? low + x.high * level.column_step : zeros,
                        weights[2] != 0 ? high + x.low * level.column_step : zeros,
                        weights[3] != 0 ? high + x.high * level.column_step : zeros};
    int64_t c = 0;
    for (; c + kWidth <= channels; c += kWidth) {
      store_vector<T>(samples + c, weights[0] * load_vector<T>(from[0] + c) + weights[1] * load_vector<T>(from[1] + c) +
                                       weights[2] * load_vector<T>(from[2] + c) +
                                       weights[3] * load_vector<T>(from[3] + c));
    }
    for (; c < channels; ++c) {
      samples[c] = weights[0] * load(from[0] + c) + weights[1] * load(from[1] + c) + weights[2] * load(from[2] + c) +
                   weights[3] * load(from[3] + c);
    }
    for (; c < padded; ++c) samples[c] = T(0);
  }
}

// Adds columns[r, 0 .. channels) of tap (tap_y, tap_x) to the cells' gradient, from channel `first` on.
template <typename T>
void scatter_rows(const AlignConvProblem& problem, const AlignConvLevel& level, const RowCorners<T>* corners,
                  int64_t count, int tap_y, int tap_x, int64_t first, int64_t channels, const T* columns,
                  int64_t stride) {
  constexpr int kWidth = Simd<T>::kWidth;
  for (int64_t r = 0; r < count; ++r, columns += stride) {
    const Corners<T>& y = corners[r].y[tap_y];
    const Corners<T>& x = corners[r].x[tap_x];
    const T weights[4] = {y.low_weight * x.low_weight, y.low_weight * x.high_weight, y.high_weight * x.low_weight,
                          y.high_weight * x.high_weight};
    T* cells = static_cast<T*>(level.cells_grad) +
               int64_t(corners[r].image) * level.height * level.width * problem.channels + first;
    for (int corner = 0; corner < 4; ++corner) {
      const T weight = weights[corner];
      if (weight == 0) continue;
      T* to = cells + (int64_t(corner < 2 ? y.low : y.high) * level.width + (corner % 2 == 0 ? x.low : x.high)) *
                          problem.channels;
      int64_t c = 0;
      for (; c + kWidth <= channels; c += kWidth) {
        store_vector<T>(to + c, load_vector<T>(to + c) + weight * load_vector<T>(columns + c));
      }
      for (; c < channels; ++c) to[c] += weight * columns[c];
    }
  }
}

}  // namespace
}  // namespace refinedet
