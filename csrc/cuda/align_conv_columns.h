// The bodies of the gather and scatter kernels: one call per thread, no barriers, so that a loop can run them on the
// host as well.
#pragma once

#include "cuda/align_conv_sampling.h"

namespace refinedet {

// Columns [N, T, F]: thread `item` writes 16 bytes of one tap of one row. Empty rows become zeros.
template <typename T>
REFINEDET_BOTH void gather_columns(const DeviceLevels& levels, const float* boxes, const int64_t* rows, int64_t item,
                                   T* columns) {
  const int32_t chunks = levels.channels / Chunk<T>::kCount, taps = levels.kernel * levels.kernel;
  const int64_t pair = item / chunks;
  const int32_t chunk = static_cast<int32_t>(item - pair * chunks);
  const int64_t row = pair / taps;
  const int32_t tap = static_cast<int32_t>(pair - row * taps);
  uint4* to = reinterpret_cast<uint4*>(columns) + item;
  const Place place = place_of(levels, rows[row]);
  if (place.level < 0) {
    *to = {0, 0, 0, 0};
    return;
  }
  const DeviceLevel& level = levels.level[place.level];
  const float* box = boxes + row * 4;
  const Sample sample = make_sample(
      level, place.image, tap_corners(box, 1, tap / levels.kernel, levels.kernel, level.inverse_stride, level.height),
      tap_corners(box, 0, tap % levels.kernel, levels.kernel, level.inverse_stride, level.width));
  const T* cells = static_cast<const T*>(level.data) + chunk * Chunk<T>::kCount;
  uint4 words[4];
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) words[corner] = load_words(cells + sample.offset[corner]);
  *to = interpolate<T>(words, sample.weight);
}

// Cells that a sample's gradient goes to, in the gradient of all levels, and their weights. An unused corner has weight
// 0.
struct Target {
  int64_t pixel[4];
  float weight[4];
};

REFINEDET_BOTH Target find_target(const DeviceLevels& levels, const float* boxes, const int64_t* rows, int64_t row,
                                  int32_t tap) {
  const Place place = place_of(levels, rows[row]);
  if (place.level < 0) return {};
  const DeviceLevel& level = levels.level[place.level];
  const float* box = boxes + row * 4;
  const Corners<float> y = tap_corners(box, 1, tap / levels.kernel, levels.kernel, level.inverse_stride, level.height);
  const Corners<float> x = tap_corners(box, 0, tap % levels.kernel, levels.kernel, level.inverse_stride, level.width);
  const int64_t base = level.grad_begin + int64_t(place.image) * level.height * level.width;
  const int64_t low = base + int64_t(y.low) * level.width, high = base + int64_t(y.high) * level.width;
  return {{low + x.low, low + x.high, high + x.low, high + x.high},
          {y.low_weight * x.low_weight, y.low_weight * x.high_weight, y.high_weight * x.low_weight,
           y.high_weight * x.high_weight}};
}

REFINEDET_BOTH void add_atomically(float* to, const float (&values)[4]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(values[0]), "f"(values[1]),
               "f"(values[2]), "f"(values[3])
               : "memory");
#elif defined(__CUDA_ARCH__)
#pragma unroll
  for (int i = 0; i < 4; ++i) atomicAdd(to + i, values[i]);
#else
  for (int i = 0; i < 4; ++i) to[i] += values[i];
#endif
}

// Adds 16 bytes of channels of one tap of one row of the columns' gradient [N, T, F] to the features' gradient
// [pixels, F].
template <typename T>
REFINEDET_BOTH void scatter_columns(const DeviceLevels& levels, const float* boxes, const int64_t* rows,
                                    const T* columns, int64_t item, float* grad) {
  const int32_t chunks = levels.channels / Chunk<T>::kCount, taps = levels.kernel * levels.kernel;
  const int64_t pair = item / chunks;
  const int32_t channel = static_cast<int32_t>(item - pair * chunks) * Chunk<T>::kCount;
  const int64_t row = pair / taps;
  const Target target = find_target(levels, boxes, rows, row, static_cast<int32_t>(pair - row * taps));
  float values[Chunk<T>::kCount];
  Chunk<T>::unpack(load_words(columns + item * Chunk<T>::kCount), values);
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const float weight = target.weight[corner];
    if (weight == 0.0f) continue;
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; i += 4) {
      const float parts[4] = {weight * values[i], weight * values[i + 1], weight * values[i + 2],
                              weight * values[i + 3]};
      add_atomically(grad + target.pixel[corner] * levels.channels + channel + i, parts);
    }
  }
}

}  // namespace refinedet
