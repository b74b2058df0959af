// Boxes in columns, and their overlap with one, a vector at a time. Internal linkage, as in merge_kernels.h.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "cpu/merge.h"
#include "cpu/merge_vector.h"

namespace refinedet {
namespace {

constexpr float kGone = -FLT_MAX;  // score of a box that was taken or dropped

// Memory of one call. A type of this file, so that no code of the standard library is compiled for one instruction set
// and linked into another's.
template <typename T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : values_(static_cast<T*>(std::aligned_alloc(64, (size * sizeof(T) + 64) / 64 * 64))) {
    if (values_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(values_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* get() { return values_; }
  T& operator[](int64_t i) { return values_[i]; }

 private:
  T* values_;
};

// The boxes that are left, in columns, padded to whole vectors.
class Columns {
 public:
  enum { kX1, kY1, kX2, kY2, kArea, kScore, kNumColumns };

  explicit Columns(int64_t capacity)
      : capacity_((capacity + kWidth - 1) / kWidth * kWidth), ids_(capacity_), values_(capacity_ * kNumColumns) {}

  float* operator[](int column) { return values_.get() + column * capacity_; }
  int64_t* ids() { return ids_.get(); }
  int64_t size() const { return size_; }

  void append(const float* box, float score, int64_t id, float one) {
    for (int i = 0; i < 4; ++i) (*this)[i][size_] = box[i];
    (*this)[kArea][size_] = (box[2] - box[0] + one) * (box[3] - box[1] + one);
    (*this)[kScore][size_] = score;
    ids_[size_++] = id;
  }

  void move(int64_t from, int64_t to) {
    for (int column = 0; column < kNumColumns; ++column) (*this)[column][to] = (*this)[column][from];
    ids_[to] = ids_[from];
  }

  // To the next whole vector, with boxes that nothing overlaps and that are gone.
  void set_size(int64_t size) {
    size_ = size;
    for (int64_t i = size; i < capacity_ && i % kWidth; ++i) {
      for (int column = 0; column < kNumColumns; ++column) (*this)[column][i] = 0;
      (*this)[kScore][i] = kGone;
    }
  }

 private:
  int64_t capacity_, size_ = 0;
  Buffer<int64_t> ids_;
  Buffer<float> values_;
};

// One box, in every lane.
struct First {
  Floats x1, y1, x2, y2, area, one;

  First(Columns& left, int64_t i, float plus_one)
      : First(left[0][i], left[1][i], left[2][i], left[3][i], left[Columns::kArea][i], plus_one) {}
  First(float x1, float y1, float x2, float y2, float area, float plus_one)
      : x1(fill(x1)), y1(fill(y1)), x2(fill(x2)), y2(fill(y2)), area(fill(area)), one(fill(plus_one)) {}
};

// IoU of a vector of boxes with one; 0 where both are empty.
inline Floats overlap(Floats x1, Floats y1, Floats x2, Floats y2, Floats area, const First& first) {
  const Floats zero{};
  const Floats width = vmax(vmin(x2, first.x2) - vmax(x1, first.x1) + first.one, zero);
  const Floats height = vmax(vmin(y2, first.y2) - vmax(y1, first.y1) + first.one, zero);
  const Floats shared = width * height;
  const Floats both = area + first.area - shared;
  return reinterpret_cast<Floats>(reinterpret_cast<Ints>(shared / both) & (both > zero));
}

inline Floats overlap(Columns& left, int64_t i, const First& first) {
  return overlap(load(left[0] + i), load(left[1] + i), load(left[2] + i), load(left[3] + i),
                 load(left[Columns::kArea] + i), first);
}

}  // namespace
}  // namespace refinedet
