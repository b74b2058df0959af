// A tile of the fused forward in shared memory, and its product: samples times filters, on tensor cores for 16-bit
// features. On the host ldmatrix and mma are emulated by their definitions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>
#include <type_traits>

#include "align_conv_geometry.h"

namespace refinedet {

constexpr int kTileRows = 64, kTileOutputs = 96;
constexpr int kFusedThreads = 256;
constexpr int kStageBytes = 128;               // of channels
constexpr int kStagePitch = kStageBytes + 16;  // keeps the rows of a tile in different banks

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

// Sums of a tile: warp w holds the 16 rows from w / 2 * 16 on and the 48 outputs from w % 2 * 48 on, as six products
// m16n8k16 of the tensor cores. Lane l has of each product the rows l / 4 and l / 4 + 8, the outputs l % 4 * 2 and
// l % 4 * 2 + 1.
constexpr int kProducts = 6;

// Where lane `lane` of a warp points ldmatrix.x4 for 16 samples, and for 16 outputs, by 16 channels from `channel` on.
// The four 8x8 matrices of the samples come rows first; those of the filters, outputs by channels, channels first.
REFINEDET_BOTH int sample_offset(int warp, int lane, int channel) {
  return (warp / 2 * 16 + lane % 16) * kStagePitch + channel * 2 + lane / 16 * 16;
}
REFINEDET_BOTH int filter_offset(int warp, int lane, int channel, int pair) {
  return (warp % 2 * 48 + pair * 16 + lane / 16 * 8 + lane % 8) * kStagePitch + channel * 2 + lane / 8 % 2 * 16;
}
// Place in the tile's sums of a lane's number i (of 4) of a product.
REFINEDET_BOTH int sum_offset(int warp, int lane, int product, int i, int pitch) {
  return (warp / 2 * 16 + lane / 4 + i / 2 * 8) * pitch + warp % 2 * 48 + product * 8 + lane % 4 * 2 + i % 2;
}

#ifdef __CUDA_ARCH__
__device__ __forceinline__ void load_matrices(const unsigned char* from, uint32_t (&words)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from))));
}

template <typename T>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&left)[4], uint32_t low, uint32_t high) {
  if constexpr (sizeof(T) == 2 && std::is_same_v<T, __half>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(low), "r"(high));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(low), "r"(high));
  }
}
#endif

template <typename T>
class TileSums {
#ifdef __CUDA_ARCH__
  float sums_[kProducts][4] = {};

 public:
  __device__ __forceinline__ TileSums() {}

  __device__ __forceinline__ void multiply(const FusedShared<T>& shared, int buffer, int thread) {
    const int warp = thread / 32, lane = thread % 32;
#pragma unroll
    for (int channel = 0; channel < kStageBytes / 2; channel += 16) {
      uint32_t left[4], right[4];
      load_matrices(shared.samples(buffer) + sample_offset(warp, lane, channel), left);
#pragma unroll
      for (int pair = 0; pair < kProducts / 2; ++pair) {
        load_matrices(shared.filters(buffer) + filter_offset(warp, lane, channel, pair), right);
        multiply_add<T>(sums_[2 * pair], left, right[0], right[1]);
        multiply_add<T>(sums_[2 * pair + 1], left, right[2], right[3]);
      }
    }
  }

  __device__ __forceinline__ void store(const FusedShared<T>& shared, int thread) const {
#pragma unroll
    for (int product = 0; product < kProducts; ++product) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared.sums()[sum_offset(thread / 32, thread % 32, product, i, shared.kSumsPitch)] = sums_[product][i];
      }
    }
  }
#else
  // On the host the first thread of a warp does the work of all, by the definitions of ldmatrix and mma: number i of a
  // lane in matrix m is at row lane / 4, column lane % 4 * 2 + i of the 8 rows that lanes 8 m .. 8 m + 7 point to.
  float sums_[32][kProducts][4] = {};

  static float element(const unsigned char* memory, const int (&offsets)[32], int matrix, int row, int column) {
    T value;
    memcpy(&value, memory + offsets[8 * matrix + row] + column * 2, 2);
    return static_cast<float>(value);
  }

 public:
  void multiply(const FusedShared<T>& shared, int buffer, int thread) {
    if (thread % 32 != 0) return;
    const int warp = thread / 32;
    for (int channel = 0; channel < kStageBytes / 2; channel += 16) {
      int samples[32], filters[32];
      for (int lane = 0; lane < 32; ++lane) samples[lane] = sample_offset(warp, lane, channel);
      for (int product = 0; product < kProducts; ++product) {
        for (int lane = 0; lane < 32; ++lane) filters[lane] = filter_offset(warp, lane, channel, product / 2);
        for (int lane = 0; lane < 32; ++lane) {
          for (int i = 0; i < 4; ++i) {
            const int row = lane / 4, half = i / 2, output = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 16; ++k) {
              // a0, a1: channels 0..7 of rows 0..7 and 8..15; a2, a3: channels 8..15. b0, b1: channels 0..7, 8..15.
              const float left = element(shared.samples(buffer), samples, half + k / 8 * 2, row, k % 8);
              const float right = element(shared.filters(buffer), filters, product % 2 * 2 + k / 8, output, k % 8);
              sums_[lane][product][i] += left * right;
            }
          }
        }
      }
    }
  }

  void store(const FusedShared<T>& shared, int thread) const {
    if (thread % 32 != 0) return;
    for (int lane = 0; lane < 32; ++lane) {
      for (int product = 0; product < kProducts; ++product) {
        for (int i = 0; i < 4; ++i) {
          shared.sums()[sum_offset(thread / 32, lane, product, i, shared.kSumsPitch)] = sums_[lane][product][i];
        }
      }
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

}  // namespace refinedet
