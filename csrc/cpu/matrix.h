// C (+)= A * B on small blocks that lie in cache: a register tile of rows x vectors, over the whole depth.
#pragma once

#include "cpu/numbers.h"

namespace refinedet {
namespace {

// A tile's accumulators, one row of B and one broadcast element of A fit into the registers.
#if REFINEDET_VECTOR_REGISTERS >= 32
constexpr int kTileRows[] = {0, 12, 12, 8};
#else
constexpr int kTileRows[] = {0, 12, 6, 4};
#endif

// B is cut into panels of up to three vectors; never one of a single vector where it can be helped.
inline int panel_vectors(int64_t vectors_left) {
  if (vectors_left >= 5 || vectors_left == 3) return 3;
  return vectors_left >= 2 ? 2 : 1;
}

template <typename T>
inline int64_t round_up(int64_t count) {
  return (count + Simd<T>::kWidth - 1) / Simd<T>::kWidth * Simd<T>::kWidth;
}

// Rows this far apart do not fall into the same cache sets, as they would at a power of two.
template <typename T>
inline int64_t row_stride(int64_t count) {
  return round_up<T>(count) + 64 / sizeof(T);
}

template <typename T>
struct Left {  // element (row, depth) at data[row * row_step + depth * depth_step]
  const T* data;
  int64_t row_step, depth_step;
};

template <typename T>
struct Right {  // packed: panel after panel, each [depth, panel width]; else row-major, depth_step apart
  const T* data;
  bool packed;
  int64_t depth_step;
};

template <typename T, int kRows, int kVectors>
inline void multiply_tile(int64_t depth, const T* a, int64_t a_row, int64_t a_step, const T* b, int64_t b_step, T* c,
                          int64_t c_row, bool add) {
  using Vector = typename Simd<T>::Vector;
  constexpr int kWidth = Simd<T>::kWidth;
  Vector sums[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sums[i][j] = Vector{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vector right[kVectors];
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) right[j] = load_vector<T>(b + j * kWidth);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const T left = a[i * a_row];
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) sums[i][j] += left * right[j];
    }
    a += a_step;
    b += b_step;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      T* to = c + i * c_row + j * kWidth;
      store_vector<T>(to, add ? load_vector<T>(to) + sums[i][j] : sums[i][j]);
    }
  }
}

template <typename T, int kRows, int kVectors>
inline void multiply_rows(int64_t rows, int64_t depth, const Left<T>& a, const T* b, int64_t b_step, T* c,
                          int64_t c_row, bool add) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    multiply_tile<T, kRows, kVectors>(depth, a.data + row * a.row_step, a.row_step, a.depth_step, b, b_step,
                                      c + row * c_row, c_row, add);
  }
  if constexpr (kRows > 1) {
    if (row < rows) {
      const Left<T> rest{a.data + row * a.row_step, a.row_step, a.depth_step};
      multiply_rows<T, (kRows > 4 ? kRows / 2 : kRows - 1), kVectors>(rows - row, depth, rest, b, b_step,
                                                                      c + row * c_row, c_row, add);
    }
  }
}

// c has round_up(columns) columns; those beyond `columns` get whatever B holds there.
template <typename T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const Left<T>& a, const Right<T>& b, T* c, int64_t c_row,
              bool add) {
  constexpr int kWidth = Simd<T>::kWidth;
  const int64_t vectors = round_up<T>(columns) / kWidth;
  for (int64_t at = 0; at < vectors;) {
    const int count = panel_vectors(vectors - at);
    const T* panel = b.data + (b.packed ? depth : 1) * at * kWidth;
    const int64_t b_step = b.packed ? count * kWidth : b.depth_step;
    T* to = c + at * kWidth;
    if (count == 3) {
      multiply_rows<T, kTileRows[3], 3>(rows, depth, a, panel, b_step, to, c_row, add);
    } else if (count == 2) {
      multiply_rows<T, kTileRows[2], 2>(rows, depth, a, panel, b_step, to, c_row, add);
    } else {
      multiply_rows<T, kTileRows[1], 1>(rows, depth, a, panel, b_step, to, c_row, add);
    }
    at += count;
  }
}

}  // namespace
}  // namespace refinedet
