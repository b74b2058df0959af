// Where AlignConv samples: the maths that the CPU kernels, the CUDA kernels and the tests of their bodies share.
//
// Legend: B images, F channels, H W cells of a level, N rows (anchors that are computed), K kernel side, T = K * K
// taps, O outputs. A group is one aspect of one level: the rows that share filters. A row number counts the anchors of
// all images in the order (level, aspect, image, y, x), so that ascending rows come group by group.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define REFINEDET_BOTH __host__ __device__ __forceinline__
#else
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

// Where a row lies. level is -1 for an empty row, whose number is that of no anchor.
struct Place {
  int32_t level, aspect, image;
};

// Levels have `begin`, their first row number, and `cells_per_image`, H * W.
template <typename Level>
REFINEDET_BOTH Place place_of(const Level* levels, int32_t num_levels, int32_t aspects, int64_t batch, int64_t row) {
  if (row < 0) return {-1, 0, 0};
  for (int32_t level = 0; level < num_levels; ++level) {
    const int64_t rest = row - levels[level].begin, group = batch * levels[level].cells_per_image;
    if (rest >= group * aspects) continue;
    const int32_t aspect = static_cast<int32_t>(rest / group);
    return {level, aspect, static_cast<int32_t>((rest - aspect * group) / levels[level].cells_per_image)};
  }
  return {-1, 0, 0};
}

}  // namespace refinedet
