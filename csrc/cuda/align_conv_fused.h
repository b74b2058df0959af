// The bodies of the fused forward: sample a tile of rows into shared memory and multiply it by the filters there, on
// tensor cores for 16-bit features. Columns never reach the memory of the GPU.
//
// A block computes kTileRows rows of one group for kTileOutputs outputs. It runs over stages of 128 bytes of channels
// and one tap, channels outside and taps inside: the cells that neighbouring taps share are then still in the caches.
// The cells of the next stage are in flight while the current one is multiplied. Between two barriers every thread
// calls one of the functions below, so that the tests can run them on the host, thread by thread.
#pragma once

#include <cmath>

#include "cuda/align_conv_sampling.h"
#include "cuda/align_conv_tile.h"

namespace refinedet {

constexpr int kMaxKernel = 7, kMaxGroups = 64;

// Filters are read where they are: [aspects, O, T, F] of each level, channels innermost.
struct FusedArguments {
  const float* boxes;
  const int64_t* rows;  // [N] ascending
  const void* filters[kMaxLevels];
  const void* bias[kMaxLevels];  // [aspects, O]
  void* output;                  // [N, O]
  int64_t num_rows;
  int32_t outputs, num_groups, parts;  // parts of the channels, of kStageBytes each
};

// First of the rows [N] whose number is `value` or more.
REFINEDET_BOTH int32_t lower_bound(const int64_t* rows, int64_t num_rows, int64_t value) {
  int64_t low = 0, high = num_rows;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (rows[middle] < value) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return static_cast<int32_t>(low);
}

// First row number of a group; that of group num_groups is the first of no anchor.
REFINEDET_BOTH int64_t first_number(const DeviceLevels& levels, int32_t group) {
  const int32_t level = group / levels.aspects, aspect = group - level * levels.aspects;
  if (level < levels.num_levels) {
    return levels.level[level].begin + aspect * levels.batch * levels.level[level].cells_per_image;
  }
  const DeviceLevel& last = levels.level[levels.num_levels - 1];
  return last.begin + levels.aspects * levels.batch * last.cells_per_image;
}

// Thread g finds the first row of group g, so that the host need not read how many rows a group has. Rows before group
// 0 have negative numbers: they are taken for its own, and marked as out of order.
REFINEDET_BOTH void find_starts(const DeviceLevels& levels, const FusedArguments& arguments, int thread,
                                int32_t* starts) {
  if (thread > arguments.num_groups) return;
  starts[thread] = thread == 0 ? 0 : lower_bound(arguments.rows, arguments.num_rows, first_number(levels, thread));
}

// Which rows a block works on. Group num_groups are the empty rows; -1: nothing to do.
struct FusedTile {
  int32_t group, first, count, output_begin;
};

REFINEDET_BOTH FusedTile find_tile(const FusedArguments& arguments, const int32_t* starts, int32_t block,
                                   int32_t output_tile) {
  for (int32_t group = 0; group <= arguments.num_groups; ++group) {
    const int32_t end = group < arguments.num_groups ? starts[group + 1] : static_cast<int32_t>(arguments.num_rows);
    const int32_t rows = end - starts[group], tiles = (rows + kTileRows - 1) / kTileRows;
    if (block < tiles) {
      const int32_t left = rows - block * kTileRows;
      return {group, starts[group] + block * kTileRows, left < kTileRows ? left : kTileRows,
              output_tile * kTileOutputs};
    }
    block -= tiles;
  }
  return {-1, 0, 0, 0};
}

REFINEDET_BOTH int32_t tile_row(const FusedTile& tile, int r) {
  return tile.first +
         (r < tile.count ? r : tile.count - 1);  // beyond the tile its last row, whose sums are not written
}

// Two of the tile's 16-byte pieces of samples belong to each thread: of rows thread / 8 and thread / 8 + 32.
constexpr int kPieces = kTileRows * (kStageBytes / 16) / kFusedThreads;

struct FusedThread {
  int64_t image_begin[kPieces];  // first number of the row's image in the level
  uint4 words[kPieces][4];
  float weight[kPieces][4];
};

// Corners of all taps of the tile's rows.
template <typename T>
REFINEDET_BOTH void begin_tile(const DeviceLevels& levels, const FusedArguments& arguments, const FusedTile& tile,
                               const FusedShared<T>& shared, int thread, FusedThread& state) {
  const DeviceLevel& level = levels.level[tile.group / levels.aspects];
  const int per_row = 2 * levels.kernel;
  for (int item = thread; item < kTileRows * per_row; item += kFusedThreads) {
    const int r = item / per_row, axis = item % per_row / levels.kernel, tap = item % levels.kernel;
    const int32_t row = tile_row(tile, r);
    // Axis 0 of the corners is y, which is coordinate 1 of a box.
    shared.corners()[item] = tap_corners(arguments.boxes + int64_t(row) * 4, 1 - axis, tap, levels.kernel,
                                         level.inverse_stride, axis == 0 ? level.height : level.width);
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int r = thread / 8 + piece * (kTileRows / kPieces);
    const int64_t number = arguments.rows[tile_row(tile, r)] - first_number(levels, tile.group);
    const int64_t image = number / level.cells_per_image;
    // A row of another group would read beyond the features; end_tile marks it.
    state.image_begin[piece] = number < 0 || image >= levels.batch ? 0 : image * level.image_step;
  }
}

// Puts the cells of a stage in flight, to registers.
template <typename T>
REFINEDET_BOTH void fetch_samples(const DeviceLevels& levels, const FusedTile& tile, const FusedShared<T>& shared,
                                  int stage, int thread, FusedThread& state) {
  const DeviceLevel& level = levels.level[tile.group / levels.aspects];
  const int taps = levels.kernel * levels.kernel, part = stage / taps, tap = stage - part * taps;
  const int channel = part * (kStageBytes / int(sizeof(T))) + thread % 8 * Chunk<T>::kCount;
  const int tap_y = tap / levels.kernel, tap_x = tap - tap_y * levels.kernel;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int r = thread / 8 + piece * (kTileRows / kPieces);
    const Corners<float>* corners = shared.corners() + r * 2 * levels.kernel;
    const Corners<float> y = corners[tap_y], x = corners[levels.kernel + tap_x];
    const bool inside = channel < levels.channels;  // else the stage's channels are padding
    const T* cells = static_cast<const T*>(level.data) + state.image_begin[piece] + (inside ? channel : 0);
    const T* low = cells + y.low * level.row_step;
    const T* high = cells + y.high * level.row_step;
    const int64_t left = x.low * level.column_step, right = x.high * level.column_step;
    state.words[piece][0] = load_words(low + left);
    state.words[piece][1] = load_words(low + right);
    state.words[piece][2] = load_words(high + left);
    state.words[piece][3] = load_words(high + right);
    state.weight[piece][0] = inside ? y.low_weight * x.low_weight : 0.0f;
    state.weight[piece][1] = inside ? y.low_weight * x.high_weight : 0.0f;
    state.weight[piece][2] = inside ? y.high_weight * x.low_weight : 0.0f;
    state.weight[piece][3] = inside ? y.high_weight * x.high_weight : 0.0f;
  }
}

template <typename T>
REFINEDET_BOTH void store_samples(const FusedShared<T>& shared, int buffer, int thread, const FusedThread& state) {
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int r = thread / 8 + piece * (kTileRows / kPieces);
    *reinterpret_cast<uint4*>(shared.samples(buffer) + r * kStagePitch + thread % 8 * 16) =
        interpolate<T>(state.words[piece], state.weight[piece]);
  }
}

// Puts the filters of a stage in flight, to shared memory; wait_for_filters before the next barrier. Outputs and
// channels beyond the last are zeros.
template <typename T>
REFINEDET_BOTH void fetch_filters(const DeviceLevels& levels, const FusedArguments& arguments, const FusedTile& tile,
                                  int stage, const FusedShared<T>& shared, int buffer, int thread) {
  const int taps = levels.kernel * levels.kernel, part = stage / taps, tap = stage - part * taps;
  const int32_t level = tile.group / levels.aspects, aspect = tile.group - level * levels.aspects;
  const int channel = part * (kStageBytes / int(sizeof(T))) + thread % 8 * Chunk<T>::kCount;
  const T* from = static_cast<const T*>(arguments.filters[level]);
#pragma unroll
  for (int item = thread; item < kTileOutputs * 8; item += kFusedThreads) {
    const int output = item / 8, wanted = tile.output_begin + output;
    const bool inside = wanted < arguments.outputs && channel < levels.channels;
    unsigned char* to = shared.filters(buffer) + output * kStagePitch + thread % 8 * 16;
    const int64_t filter = (int64_t(aspect) * arguments.outputs + (inside ? wanted : 0)) * taps + tap;
    const T* source = from + filter * levels.channels + (inside ? channel : 0);
#ifdef __CUDA_ARCH__
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
        "l"(source), "r"(inside ? 16 : 0));
#else
    const unsigned char zeros[16] = {};
    memcpy(to, inside ? reinterpret_cast<const unsigned char*>(source) : zeros, 16);
#endif
  }
}

REFINEDET_BOTH void wait_for_filters() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

REFINEDET_BOTH float to_float(float value) { return value; }
REFINEDET_BOTH float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
REFINEDET_BOTH float to_float(__half value) { return __half2float(value); }
REFINEDET_BOTH void from_float(float value, float* to) { *to = value; }
REFINEDET_BOTH void from_float(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }
REFINEDET_BOTH void from_float(float value, __half* to) { *to = __float2half(value); }

// The tile's sums and the bias to the output; zeros for empty rows, NaN for rows that are not in ascending order.
template <typename T>
REFINEDET_BOTH void end_tile(const DeviceLevels& levels, const FusedArguments& arguments, const FusedTile& tile,
                             const FusedShared<T>& shared, int thread) {
  const bool empty = tile.group == arguments.num_groups;
  const int32_t level = empty ? 0 : tile.group / levels.aspects, aspect = tile.group - level * levels.aspects;
  const int32_t left = arguments.outputs - tile.output_begin, columns = left < kTileOutputs ? left : kTileOutputs;
  const T* bias = static_cast<const T*>(arguments.bias[level]) +
                  (empty ? 0 : int64_t(aspect) * arguments.outputs + tile.output_begin);
  const int64_t low = first_number(levels, tile.group);
  const int64_t high = empty ? INT64_MAX : first_number(levels, tile.group + 1);
  for (int item = thread; item < tile.count * columns; item += kFusedThreads) {
    const int r = item / columns, column = item - r * columns;
    const int64_t row = tile.first + r;
    T* to = static_cast<T*>(arguments.output) + row * arguments.outputs + tile.output_begin + column;
    float value = empty ? 0.0f : shared.sums()[r * shared.kSumsPitch + column] + to_float(bias[column]);
    if (arguments.rows[row] < low || arguments.rows[row] >= high) value = NAN;
    from_float(value, to);
  }
}

}  // namespace refinedet
