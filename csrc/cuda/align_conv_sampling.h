// Bilinear samples on a GPU, 16 bytes of channels at a time. Everything here runs on the host too, for the tests.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <cstring>

#include "align_conv_geometry.h"

namespace refinedet {

// A level as the kernels see it; passed by value as a __grid_constant__, so that indexing it costs no local memory.
struct DeviceLevel {
  const void* data;                           // channels of a cell are contiguous, 16-byte aligned
  int64_t image_step, row_step, column_step;  // elements
  int64_t grad_begin;                         // first cell of the level in the gradient of all levels
  int64_t begin;                              // first row number of the level
  int32_t cells_per_image, height, width;
  float inverse_stride;
};

struct DeviceLevels {
  DeviceLevel level[kMaxLevels];
  int32_t num_levels, aspects, kernel, channels;
  int64_t batch;
};

REFINEDET_BOTH Place place_of(const DeviceLevels& levels, int64_t row) {
  return place_of(levels.level, levels.num_levels, levels.aspects, levels.batch, row);
}

// 16 bytes of channels as accumulation values, and back.
template <typename T>
struct Chunk;

template <>
struct Chunk<float> {
  static constexpr int kCount = 4;
  static REFINEDET_BOTH void unpack(const uint4& words, float* values) { memcpy(values, &words, 16); }
  static REFINEDET_BOTH uint4 pack(const float* values) {
    uint4 words;
    memcpy(&words, values, 16);
    return words;
  }
};

REFINEDET_BOTH float bits_to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

template <>
struct Chunk<__nv_bfloat16> {
  static constexpr int kCount = 8;
  static REFINEDET_BOTH void unpack(const uint4& words, float* values) {
    const uint32_t parts[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[2 * i] = bits_to_float(parts[i] << 16);
      values[2 * i + 1] = bits_to_float(parts[i] & 0xffff0000u);
    }
  }
  static REFINEDET_BOTH uint4 pack(const float* values) {
    uint32_t parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(values[2 * i], values[2 * i + 1]);
      memcpy(&parts[i], &pair, 4);
    }
    return {parts[0], parts[1], parts[2], parts[3]};
  }
};

template <>
struct Chunk<__half> {
  static constexpr int kCount = 8;
  static REFINEDET_BOTH void unpack(const uint4& words, float* values) {
    const uint32_t parts[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      __half2 pair;
      memcpy(&pair, &parts[i], 4);
      values[2 * i] = __low2float(pair);
      values[2 * i + 1] = __high2float(pair);
    }
  }
  static REFINEDET_BOTH uint4 pack(const float* values) {
    uint32_t parts[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const __half2 pair = __floats2half2_rn(values[2 * i], values[2 * i + 1]);
      memcpy(&parts[i], &pair, 4);
    }
    return {parts[0], parts[1], parts[2], parts[3]};
  }
};

REFINEDET_BOTH uint4 load_words(const void* from) {
#ifdef __CUDA_ARCH__
  return __ldg(static_cast<const uint4*>(from));
#else
  uint4 words;
  memcpy(&words, from, 16);
  return words;
#endif
}

// The four cells of a sample: offsets in elements from the level's first number, and their weights. A corner off the
// map has weight 0 and is read from a cell on it: a load that is not taken costs more than one that is not needed.
struct Sample {
  int64_t offset[4];
  float weight[4];
};

REFINEDET_BOTH Sample make_sample(const DeviceLevel& level, int32_t image, const Corners<float>& y,
                                  const Corners<float>& x) {
  const int64_t base = image * level.image_step;
  const int64_t low = base + y.low * level.row_step, high = base + y.high * level.row_step;
  return {{low + x.low * level.column_step, low + x.high * level.column_step, high + x.low * level.column_step,
           high + x.high * level.column_step},
          {y.low_weight * x.low_weight, y.low_weight * x.high_weight, y.high_weight * x.low_weight,
           y.high_weight * x.high_weight}};
}

REFINEDET_BOTH Corners<float> tap_corners(const float* box, int axis, int tap, int kernel, float inverse_stride,
                                          int32_t size) {
  return split_coordinate(sample_coordinate(box[axis], box[axis + 2], tap, kernel, inverse_stride), size);
}

// Weighted sum of four 16-byte pieces, in fp32. A piece without weight counts as zeros: an infinity there must not turn
// into NaN.
template <typename T>
REFINEDET_BOTH uint4 interpolate(const uint4 (&words)[4], const float (&weight)[4]) {
  float total[Chunk<T>::kCount] = {};
#pragma unroll
  for (int corner = 0; corner < 4; ++corner) {
    const bool used = weight[corner] != 0.0f;
    const uint4 piece = {used ? words[corner].x : 0, used ? words[corner].y : 0, used ? words[corner].z : 0,
                         used ? words[corner].w : 0};
    float values[Chunk<T>::kCount];
    Chunk<T>::unpack(piece, values);
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i) total[i] += weight[corner] * values[i];
  }
  return Chunk<T>::pack(total);
}

}  // namespace refinedet
