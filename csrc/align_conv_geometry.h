// Where AlignConv samples: the maths that the CPU kernels, the CUDA kernels and the tests of their bodies share.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define REFINEDET_BOTH __host__ __device__ __forceinline__
#else
// Always inline: a copy compiled for AVX-512 must not serve the kernels for other CPUs.
#define REFINEDET_BOTH __attribute__((always_inline)) inline
#endif

namespace refinedet {

// Levels of the pyramid; enough for strides 4 to 512.
constexpr int kMaxLevels = 8;

// The two cells that one coordinate of a sample lies between. A cell off the map has weight 0 and a position on it.
template <typename T>
struct Corners {
  int32_t low, high;
  T low_weight, high_weight;
};

// Coordinate, in cells, of the centre of part `tap` of `kernel` equal parts of [start, end] (pixels of the image).
template <typename T>
REFINEDET_BOTH T sample_coordinate(T start, T end, int tap, int kernel, T inverse_stride) {
  return (start + (end - start) * ((T(tap) + T(0.5)) / T(kernel))) * inverse_stride - T(0.5);
}

// A coordinate that is not finite lies off the map: every comparison with NaN is false.
template <typename T>
REFINEDET_BOTH Corners<T> split_coordinate(T coordinate, int32_t size) {
  if (!(coordinate > T(-1) && coordinate < T(size))) return {0, 0, T(0), T(0)};
  const int32_t truncated = static_cast<int32_t>(coordinate);
  const int32_t low = T(truncated) > coordinate ? truncated - 1 : truncated;  // the floor
  const T fraction = coordinate - T(low);
  const bool low_inside = low >= 0, high_inside = low + 1 < size;
  return {low_inside ? low : 0, high_inside ? low + 1 : low, low_inside ? T(1) - fraction : T(0),
          high_inside ? fraction : T(0)};
}

}  // namespace refinedet
