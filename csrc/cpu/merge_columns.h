// The boxes of one group in columns, and the vector loops over them: overlaps, the highest score, lowered scores.
#pragma once

#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "cpu/clones.h"

namespace refinedet {
namespace {

using Box = std::array<float, 4>;
constexpr float kGone = -std::numeric_limits<float>::max();  // score of a box that was taken or dropped

struct Rule {
  float iou, sigma, score_threshold;
  bool plus_one, flag = false;  // flag: Gaussian soft-NMS, or soft voting
  int64_t num_views = 1;
};

// The boxes of a group that are left, in columns.
struct Columns {
  std::vector<float> x1, y1, x2, y2, area, score, overlap, first_score, sum;
  std::vector<int64_t> id;
  int64_t size = 0;

  explicit Columns(int64_t capacity) {
    for (auto* column : {&x1, &y1, &x2, &y2, &area, &score, &overlap, &first_score, &sum}) column->resize(capacity);
    id.resize(capacity);
  }

  Box box(int64_t i) const { return {x1[i], y1[i], x2[i], y2[i]}; }

  void set(int64_t i, const Box& box, float one) {
    x1[i] = box[0], y1[i] = box[1], x2[i] = box[2], y2[i] = box[3];
    area[i] = (box[2] - box[0] + one) * (box[3] - box[1] + one);
  }

  void append(const Box& box, float new_score, int64_t new_id, float one) {
    set(size, box, one);
    score[size] = first_score[size] = new_score;
    sum[size] = 0;
    id[size++] = new_id;
  }

  // Drop the boxes that are gone; the others keep their order.
  void compact() {
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      if (score[i] == kGone) continue;
      for (auto* column : {&x1, &y1, &x2, &y2, &area, &score, &overlap, &first_score, &sum}) {
        (*column)[kept] = (*column)[i];
      }
      id[kept++] = id[i];
    }
    size = kept;
  }
};

// IoU of `count` boxes with one box, 0 where both are empty.
REFINEDET_CLONES void find_overlaps(const Columns& columns, const Box& box, float one, float* to) {
  const float *x1 = columns.x1.data(), *y1 = columns.y1.data(), *x2 = columns.x2.data(), *y2 = columns.y2.data();
  const float* areas = columns.area.data();
  const float left = box[0], top = box[1], right = box[2], bottom = box[3];
  const float area = (right - left + one) * (bottom - top + one);
#pragma omp simd
  for (int64_t i = 0; i < columns.size; ++i) {
    float width = (x2[i] < right ? x2[i] : right) - (x1[i] > left ? x1[i] : left) + one;
    float height = (y2[i] < bottom ? y2[i] : bottom) - (y1[i] > top ? y1[i] : top) + one;
    width = width > 0 ? width : 0;
    height = height > 0 ? height : 0;
    const float shared = width * height, both = areas[i] + area - shared;
    const float overlap = shared / both;
    to[i] = both > 0 ? overlap : 0;
  }
}

REFINEDET_CLONES float find_top(const float* scores, int64_t count) {
  float top = kGone;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < count; ++i) top = scores[i] > top ? scores[i] : top;
  return top;
}

// exp(-x) for x >= 0, to two units in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes).
REFINEDET_INLINE float exp_negative(float x) {
  const float y = -(x < 87.0f ? x : 87.0f);
  const int32_t n = static_cast<int32_t>(y * 1.44269504f - 0.5f);  // truncation rounds, as y is not positive
  const float whole = static_cast<float>(n);
  const float r = y - whole * 0.693359375f + whole * 2.12194440e-4f;
  float p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const int32_t bits = (n + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return p * power;
}

// Lower the scores by the overlaps; below the threshold a box is gone. Returns how many are left.
REFINEDET_CLONES int64_t lower_scores(Columns& columns, const Rule& rule) {
  const float* overlaps = columns.overlap.data();
  const float* first = columns.first_score.data();
  float *scores = columns.score.data(), *sums = columns.sum.data();
  const float iou = rule.iou, threshold = rule.score_threshold, scale = 1.0f / rule.sigma;
  int64_t left = 0;
  if (rule.flag) {
#pragma omp simd reduction(+ : left)
    for (int64_t i = 0; i < columns.size; ++i) {
      sums[i] += overlaps[i] * overlaps[i];
      const float lowered = first[i] * exp_negative(sums[i] * scale);
      const bool stays = scores[i] != kGone && lowered >= threshold;
      scores[i] = stays ? lowered : kGone;
      left += stays;
    }
  } else {
#pragma omp simd reduction(+ : left)
    for (int64_t i = 0; i < columns.size; ++i) {
      const float product = scores[i] * (1.0f - overlaps[i]);
      const float lowered = overlaps[i] > iou ? product : scores[i];
      const bool stays = scores[i] != kGone && lowered >= threshold;
      scores[i] = stays ? lowered : kGone;
      left += stays;
    }
  }
  return left;
}

}  // namespace
}  // namespace refinedet
