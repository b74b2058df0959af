// The bodies of the fused forward: sample a tile of rows into shared memory and multiply it by the filters there, on
// tensor cores for 16-bit features. Columns never reach the memory of the GPU.
//
// A block computes kTileRows rows of one group for kTileOutputs outputs. It runs over stages of one tap and 128 bytes
// of channels; the cells of the next stage are in flight while the current one is multiplied. Between two barriers
// every thread calls one of the functions below, so that the tests can run them on the host, thread by thread.
#pragma once

#ifdef __CUDACC__
#include <mma.h>
#endif

#include "cuda/align_conv_sampling.h"

namespace refinedet {

constexpr int kTileRows = 64, kTileOutputs = 96;
constexpr int kFusedThreads = 256;
constexpr int kStageBytes = 128;               // of channels
constexpr int kStagePitch = kStageBytes + 16;  // keeps the rows of a tile in different banks
constexpr int kMaxKernel = 7, kMaxGroups = 64;

// Filters of all groups as [groups, T, tiles of outputs, kTileOutputs, channels padded to whole stages], zeros beyond.
// Rows of group g are order[group_start[g] .. group_start[g + 1]).
struct FusedArguments {
  const float* boxes;
  const int64_t* index;
  const int32_t *order, *group_start;
  const void* filters;
  const void* bias[kMaxLevels];  // [aspects, O]
  void* output;                  // [N, O]
  int32_t outputs, output_tiles, num_groups, stages_per_tap;
};

template <typename T>
struct FusedShared {
  // The stages' samples [rows, channels] and filters [outputs, channels], two of each; then the sums of the tile.
  static constexpr int kSamples = kTileRows * kStagePitch, kFilters = kTileOutputs * kStagePitch;
  static constexpr int kSumsPitch = kTileOutputs + 4;
  unsigned char* bytes;  // 16-byte aligned

  REFINEDET_BOTH unsigned char* samples(int buffer) const { return bytes + buffer * kSamples; }
  REFINEDET_BOTH unsigned char* filters(int buffer) const { return bytes + 2 * kSamples + buffer * kFilters; }
  REFINEDET_BOTH float* sums() const { return reinterpret_cast<float*>(bytes); }
  REFINEDET_BOTH Corners<float>* corners() const {  // [rows, (y, x), K]
    return reinterpret_cast<Corners<float>*>(bytes + 2 * (kSamples + kFilters));
  }
  static REFINEDET_BOTH int size(int kernel) {
    return 2 * (kSamples + kFilters) + kTileRows * 2 * kernel * static_cast<int>(sizeof(Corners<float>));
  }
};

// Which rows a block works on; group is -1 where there is nothing to do.
struct FusedTile {
  int32_t group, first, count, output_tile;
};

REFINEDET_BOTH FusedTile find_tile(const FusedArguments& arguments, int32_t block, int32_t output_tile) {
  for (int32_t group = 0; group < arguments.num_groups; ++group) {
    const int32_t start = arguments.group_start[group], rows = arguments.group_start[group + 1] - start;
    const int32_t tiles = (rows + kTileRows - 1) / kTileRows;
    if (block < tiles) {
      const int32_t left = rows - block * kTileRows;
      return {group, start + block * kTileRows, left < kTileRows ? left : kTileRows, output_tile};
    }
    block -= tiles;
  }
  return {-1, 0, 0, 0};
}

// Two of the tile's 16-byte pieces of samples belong to each thread: of rows thread / 8 and thread / 8 + 32.
constexpr int kPieces = kTileRows * (kStageBytes / 16) / kFusedThreads;

struct FusedThread {
  int64_t image_begin[kPieces];  // first number of the row's image in the level; -1 beyond the tile
  uint4 words[kPieces][4];
  float weight[kPieces][4];
};

// Corners of all taps of the tile's rows. Rows beyond the tile repeat its last one; their sums are not written.
template <typename T>
REFINEDET_BOTH void begin_tile(const DeviceLevels& levels, const FusedArguments& arguments, const FusedTile& tile,
                               const FusedShared<T>& shared, int thread, FusedThread& state) {
  const DeviceLevel& level = levels.level[tile.group / levels.aspects];
  const int per_row = 2 * levels.kernel;
  for (int item = thread; item < kTileRows * per_row; item += kFusedThreads) {
    const int r = item / per_row, axis = item % per_row / levels.kernel, tap = item % levels.kernel;
    const int32_t row = arguments.order[tile.first + (r < tile.count ? r : tile.count - 1)];
    // Axis 0 of the corners is y, which is coordinate 1 of a box.
    shared.corners()[item] = tap_corners(arguments.boxes + int64_t(row) * 4, 1 - axis, tap, levels.kernel,
                                         level.inverse_stride, axis == 0 ? level.height : level.width);
  }
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int r = thread / 8 + piece * (kTileRows / kPieces);
    const int32_t row = arguments.order[tile.first + (r < tile.count ? r : tile.count - 1)];
    state.image_begin[piece] = arguments.index[row] / levels.anchors * level.image_step;
  }
}

// Puts the cells of a stage in flight, to registers.
template <typename T>
REFINEDET_BOTH void fetch_samples(const DeviceLevels& levels, const FusedTile& tile, int stages_per_tap,
                                  const FusedShared<T>& shared, int stage, int thread, FusedThread& state) {
  const DeviceLevel& level = levels.level[tile.group / levels.aspects];
  const int tap = stage / stages_per_tap;
  const int channel = (stage - tap * stages_per_tap) * (kStageBytes / int(sizeof(T))) + thread % 8 * Chunk<T>::kCount;
  const int tap_y = tap / levels.kernel, tap_x = tap - tap_y * levels.kernel;
#pragma unroll
  for (int piece = 0; piece < kPieces; ++piece) {
    const int r = thread / 8 + piece * (kTileRows / kPieces);
    const Corners<float>* corners = shared.corners() + r * 2 * levels.kernel;
    const Corners<float> y = corners[tap_y], x = corners[levels.kernel + tap_x];
    const bool inside = channel < levels.channels;  // else the stage's channels are padding
    const T* cells = static_cast<const T*>(level.cells) + state.image_begin[piece] + (inside ? channel : 0);
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

// Puts the filters of a stage in flight, to shared memory; wait_for_filters before the next barrier.
template <typename T>
REFINEDET_BOTH void fetch_filters(const FusedArguments& arguments, const FusedTile& tile, int taps, int stage,
                                  const FusedShared<T>& shared, int buffer, int thread) {
  const int tap = stage / arguments.stages_per_tap, part = stage - tap * arguments.stages_per_tap;
  const int64_t row_bytes = int64_t(arguments.stages_per_tap) * kStageBytes;
  const unsigned char* from =
      static_cast<const unsigned char*>(arguments.filters) +
      ((int64_t(tile.group) * taps + tap) * arguments.output_tiles + tile.output_tile) * kTileOutputs * row_bytes +
      part * kStageBytes;
#pragma unroll
  for (int item = thread; item < kTileOutputs * 8; item += kFusedThreads) {
    const int output = item / 8, piece = item % 8;
    unsigned char* to = shared.filters(buffer) + output * kStagePitch + piece * 16;
    const unsigned char* source = from + output * row_bytes + piece * 16;
#ifdef __CUDA_ARCH__
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
                 "l"(source));
#else
    memcpy(to, source, 16);
#endif
  }
}

REFINEDET_BOTH void wait_for_filters() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Sums of a tile: warp w holds the 16 rows from w / 2 * 16 on and the 48 outputs from w % 2 * 48 on.
template <typename T>
class TileSums {
#ifdef __CUDA_ARCH__
  using Fragment = nvcuda::wmma::fragment<nvcuda::wmma::accumulator, 16, 16, 16, float>;
  Fragment sums_[3];

 public:
  __device__ __forceinline__ TileSums() {
#pragma unroll
    for (int i = 0; i < 3; ++i) nvcuda::wmma::fill_fragment(sums_[i], 0.0f);
  }

  __device__ __forceinline__ void multiply(const FusedShared<T>& shared, int buffer, int thread) {
    using namespace nvcuda::wmma;
    const int warp = thread / 32;
    constexpr int kPitch = kStagePitch / sizeof(T);
    const T* samples = reinterpret_cast<const T*>(shared.samples(buffer)) + warp / 2 * 16 * kPitch;
    const T* filters = reinterpret_cast<const T*>(shared.filters(buffer)) + warp % 2 * 48 * kPitch;
#pragma unroll
    for (int k = 0; k < kStageBytes / int(sizeof(T)); k += 16) {
      fragment<matrix_a, 16, 16, 16, T, row_major> left;
      load_matrix_sync(left, samples + k, kPitch);
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        fragment<matrix_b, 16, 16, 16, T, col_major> right;
        load_matrix_sync(right, filters + i * 16 * kPitch + k, kPitch);
        mma_sync(sums_[i], left, right, sums_[i]);
      }
    }
  }

  __device__ __forceinline__ void store(const FusedShared<T>& shared, int thread) const {
    const int warp = thread / 32;
    float* to = shared.sums() + warp / 2 * 16 * shared.kSumsPitch + warp % 2 * 48;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      nvcuda::wmma::store_matrix_sync(to + i * 16, sums_[i], shared.kSumsPitch, nvcuda::wmma::mem_row_major);
    }
  }
#else
  // On the host the first thread of a warp does the work of all.
  float sums_[16][48] = {};

 public:
  void multiply(const FusedShared<T>& shared, int buffer, int thread) {
    if (thread % 32 != 0) return;
    const int warp = thread / 32;
    constexpr int kCount = Chunk<T>::kCount, kChannels = kStageBytes / sizeof(T);
    float left[16][kChannels], right[48][kChannels];
    for (int piece = 0; piece < 8; ++piece) {
      const unsigned char* samples = shared.samples(buffer) + warp / 2 * 16 * kStagePitch + piece * 16;
      const unsigned char* filters = shared.filters(buffer) + warp % 2 * 48 * kStagePitch + piece * 16;
      for (int i = 0; i < 16; ++i) Chunk<T>::unpack(load_words(samples + i * kStagePitch), left[i] + piece * kCount);
      for (int i = 0; i < 48; ++i) Chunk<T>::unpack(load_words(filters + i * kStagePitch), right[i] + piece * kCount);
    }
    for (int row = 0; row < 16; ++row) {
      for (int output = 0; output < 48; ++output) {
        for (int i = 0; i < kChannels; ++i) sums_[row][output] += left[row][i] * right[output][i];
      }
    }
  }

  void store(const FusedShared<T>& shared, int thread) const {
    if (thread % 32 != 0) return;
    const int warp = thread / 32;
    for (int row = 0; row < 16; ++row) {
      memcpy(shared.sums() + (warp / 2 * 16 + row) * shared.kSumsPitch + warp % 2 * 48, sums_[row], sizeof(sums_[row]));
    }
  }
#endif
};

// fp32 has no tensor cores of full precision: thread t holds 4 rows from t / 16 * 4 on and every 16th output from t
// % 16.
template <>
class TileSums<float> {
  float sums_[4][6] = {};

 public:
  REFINEDET_BOTH TileSums() {}

  REFINEDET_BOTH void multiply(const FusedShared<float>& shared, int buffer, int thread) {
    const unsigned char* samples = shared.samples(buffer) + thread / 16 * 4 * kStagePitch;
    const unsigned char* filters = shared.filters(buffer) + thread % 16 * kStagePitch;
#pragma unroll 1
    for (int piece = 0; piece < 8; ++piece) {
      float4 left[4];
#pragma unroll
      for (int row = 0; row < 4; ++row) {
        left[row] = *reinterpret_cast<const float4*>(samples + row * kStagePitch + piece * 16);
      }
#pragma unroll
      for (int output = 0; output < 6; ++output) {
        const float4 right = *reinterpret_cast<const float4*>(filters + output * 16 * kStagePitch + piece * 16);
#pragma unroll
        for (int row = 0; row < 4; ++row) {
          sums_[row][output] +=
              left[row].x * right.x + left[row].y * right.y + left[row].z * right.z + left[row].w * right.w;
        }
      }
    }
  }

  REFINEDET_BOTH void store(const FusedShared<float>& shared, int thread) const {
#pragma unroll
    for (int row = 0; row < 4; ++row) {
#pragma unroll
      for (int output = 0; output < 6; ++output) {
        shared.sums()[(thread / 16 * 4 + row) * shared.kSumsPitch + thread % 16 + output * 16] = sums_[row][output];
      }
    }
  }
};

REFINEDET_BOTH float to_float(float value) { return value; }
REFINEDET_BOTH float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
REFINEDET_BOTH float to_float(__half value) { return __half2float(value); }
REFINEDET_BOTH void from_float(float value, float* to) { *to = value; }
REFINEDET_BOTH void from_float(float value, __nv_bfloat16* to) { *to = __float2bfloat16(value); }
REFINEDET_BOTH void from_float(float value, __half* to) { *to = __float2half(value); }

// The tile's sums and the bias to the output.
template <typename T>
REFINEDET_BOTH void end_tile(const DeviceLevels& levels, const FusedArguments& arguments, const FusedTile& tile,
                             const FusedShared<T>& shared, int thread) {
  const int32_t level = tile.group / levels.aspects, aspect = tile.group - level * levels.aspects;
  const int32_t begin = tile.output_tile * kTileOutputs;
  const int32_t left = arguments.outputs - begin, columns = left < kTileOutputs ? left : kTileOutputs;
  const T* bias = static_cast<const T*>(arguments.bias[level]) + int64_t(aspect) * arguments.outputs + begin;
  for (int item = thread; item < tile.count * columns; item += kFusedThreads) {
    const int r = item / columns, column = item - r * columns;
    T* to = static_cast<T*>(arguments.output) + int64_t(arguments.order[tile.first + r]) * arguments.outputs + begin;
    from_float(shared.sums()[r * shared.kSumsPitch + column] + to_float(bias[column]), to + column);
  }
}

// Filters [aspects, O, F, T] of a level, one number a thread, into the layout of FusedArguments.
template <typename T>
REFINEDET_BOTH void pack_filter(const T* weight, int32_t level, int32_t aspects, int32_t outputs, int32_t channels,
                                int32_t taps, int32_t output_tiles, int32_t padded_channels, int64_t item, T* packed) {
  // Written in order: channel, output, tap, aspect.
  const int32_t channel = static_cast<int32_t>(item % padded_channels);
  int64_t rest = item / padded_channels;
  const int32_t padded_outputs = output_tiles * kTileOutputs;
  const int32_t output = static_cast<int32_t>(rest % padded_outputs);
  rest /= padded_outputs;
  const int32_t tap = static_cast<int32_t>(rest % taps), aspect = static_cast<int32_t>(rest / taps);
  T value{};
  if (channel < channels && output < outputs) {
    value = weight[((int64_t(aspect) * outputs + output) * channels + channel) * taps + tap];
  }
  packed[int64_t(level) * aspects * taps * padded_outputs * padded_channels + item] = value;
}

}  // namespace refinedet
