// The merging kernels for one instruction set. model/ops/merge_reference.py says plainly what each does; the order of
// every sum is the same here, so that the digits are.
//
// Everything but the table at the end has internal linkage: it is compiled once per instruction set, and the linker
// must not mix them. REFINEDET_VECTOR_BYTES and REFINEDET_KERNELS are set by the file that includes this.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/merge.h"
#include "cpu/merge_columns.h"
#include "cpu/merge_soft_nms.h"

namespace refinedet {
namespace {

// Members by descending score; equal ones stay in the order of the input.
void append_sorted(const MergeGroup& group, float one, Columns& left) {
  struct Entry {
    float score;
    int64_t member;
  };
  Buffer<Entry> entries(group.count);
  for (int64_t i = 0; i < group.count; ++i) entries[i] = {group.scores[group.members[i]], group.members[i]};
  std::sort(entries.get(), entries.get() + group.count, [](const Entry& a, const Entry& b) {
    return a.score != b.score ? a.score > b.score : a.member < b.member;
  });
  for (int64_t i = 0; i < group.count; ++i) {
    left.append(group.boxes + 4 * entries[i].member, entries[i].score, entries[i].member, one);
  }
  left.set_size(left.size());
}

// Remove the first box and those that overlap it by `iou` (more than `iou` where `beyond`); the others stay in order.
// `take(i, overlap)` is called for every one removed, before anything moves over it.
template <bool beyond, typename Take>
void take_near(Columns& left, float iou, float one, const Take& take) {
  const First first(left, 0, one);
  const Floats limit = fill(iou);
  const int64_t size = left.size();
  int64_t kept = 0;
  for (int64_t i = 0; i < size; i += kWidth) {
    const Floats overlaps = overlap(left, i, first);
    unsigned near = signs(beyond ? overlaps > limit : overlaps >= limit);
    if (i == 0) near |= 1;
    if (i + kWidth > size) near &= (1u << (size - i)) - 1;
    const int64_t lanes = std::min<int64_t>(kWidth, size - i);
    if (near == 0) {
      if (kept != i) {
        if (lanes == kWidth) {
          for (int column = 0; column < Columns::kNumColumns; ++column)
            store(left[column] + kept, load(left[column] + i));
          std::memmove(left.ids() + kept, left.ids() + i, kWidth * sizeof(int64_t));
        } else {
          for (int64_t lane = 0; lane < lanes; ++lane) left.move(i + lane, kept + lane);
        }
      }
      kept += lanes;
      continue;
    }
    for (int64_t lane = 0; lane < lanes; ++lane) {
      if (near >> lane & 1) {
        take(i + lane, overlaps[lane]);
      } else {
        left.move(i + lane, kept++);
      }
    }
  }
  left.set_size(kept);
}

int64_t nms(const MergeGroup& group, const MergeRule& rule, const MergeOutput& output) {
  const float one = rule.plus_one ? 1.0f : 0.0f;
  Columns left(group.count);
  append_sorted(group, one, left);
  int64_t count = 0;
  while (left.size()) {
    output.index[count++] = left.ids()[0];
    take_near<true>(left, rule.iou, one, [](int64_t, float) {});
  }
  return count;
}

// NumPy's order of summing a row of numbers.
float sum_pairwise(const float* values, int64_t count) {
  if (count < 8) {
    float sum = 0;
    for (int64_t i = 0; i < count; ++i) sum += values[i];
    return sum;
  }
  if (count <= 128) {
    float sums[8];
    for (int j = 0; j < 8; ++j) sums[j] = values[j];
    int64_t i = 8;
    for (; i + 8 <= count; i += 8) {
      for (int j = 0; j < 8; ++j) sums[j] += values[i + j];
    }
    float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    for (; i < count; ++i) sum += values[i];
    return sum;
  }
  const int64_t half = count / 2 - count / 2 % 8;
  return sum_pairwise(values, half) + sum_pairwise(values + half, count - half);
}

// By descending score; equal ones stay in order.
void sort_results(const MergeOutput& output, int64_t count) {
  struct Result {
    float box[4], score;
    int64_t place;
  };
  Buffer<Result> results(count);
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(results[i].box, output.boxes + 4 * i, sizeof(results[i].box));
    results[i].score = output.scores[i];
    results[i].place = i;
  }
  std::sort(results.get(), results.get() + count, [](const Result& a, const Result& b) {
    return a.score != b.score ? a.score > b.score : a.place < b.place;
  });
  for (int64_t i = 0; i < count; ++i) {
    std::memcpy(output.boxes + 4 * i, results[i].box, sizeof(results[i].box));
    output.scores[i] = results[i].score;
  }
}

int64_t vote(const MergeGroup& group, const MergeRule& rule, const MergeOutput& output) {
  const float one = rule.plus_one ? 1.0f : 0.0f;
  Columns left(group.count);
  append_sorted(group, one, left);
  Buffer<float> weights(group.count);
  int64_t count = 0;
  while (left.size()) {
    const float best = left[Columns::kScore][0];
    float box[4] = {left[0][0], left[1][0], left[2][0], left[3][0]}, plain[4] = {}, sums[4] = {};
    const int64_t before = count;
    int64_t voters = 0;
    take_near<false>(left, rule.iou, one, [&](int64_t i, float overlaps) {
      const float score = left[Columns::kScore][i], lowered = score * (1.0f - overlaps);
      const bool kept = rule.soft && lowered >= rule.score_threshold;
      for (int c = 0; c < 4; ++c) {
        plain[c] += left[c][i];
        sums[c] += left[c][i] * score;
        if (kept) output.boxes[4 * count + c] = left[c][i];
      }
      weights[voters++] = score;
      if (kept) output.scores[count++] = lowered;
    });
    if (voters == 1) {
      count = before;  // a box alone stays as it is
    } else {
      const float total = sum_pairwise(weights.get(), voters);
      for (int c = 0; c < 4; ++c) box[c] = total > 0 ? sums[c] / total : plain[c] / static_cast<float>(voters);
    }
    std::memcpy(output.boxes + 4 * count, box, sizeof(box));
    output.scores[count++] = best;
  }
  if (rule.soft) sort_results(output, count);
  return count;
}

int64_t fuse(const MergeGroup& group, const MergeRule& rule, const MergeOutput& output) {
  const float one = rule.plus_one ? 1.0f : 0.0f;
  Columns sorted(group.count), clusters(group.count);
  append_sorted(group, one, sorted);
  struct Sum {
    float box[4], total;
    int64_t members;
  };
  Buffer<Sum> sums(group.count);
  const Floats limit = fill(rule.iou);
  for (int64_t i = 0; i < sorted.size() && sorted[Columns::kScore][i] >= rule.score_threshold; ++i) {
    const First first(sorted, i, one);
    Floats top = limit;
    Ints place = lanes(), top_place = lanes() * 0 - 1;
    for (int64_t j = 0; j < clusters.size(); j += kWidth, place += kWidth) {
      const Floats overlaps = overlap(clusters, j, first);
      const Ints better = overlaps > top;
      top = better ? overlaps : top;
      top_place = better ? place : top_place;
    }
    int64_t best = -1;
    float best_overlap = rule.iou;
    for (int lane = 0; lane < kWidth; ++lane) {
      if (top_place[lane] < 0 || top_place[lane] >= clusters.size()) continue;
      if (top[lane] > best_overlap || (best >= 0 && top[lane] == best_overlap && top_place[lane] < best)) {
        best = top_place[lane];
        best_overlap = top[lane];
      }
    }
    const float score = sorted[Columns::kScore][i];
    const float box[4] = {sorted[0][i], sorted[1][i], sorted[2][i], sorted[3][i]};
    if (best < 0) {
      Sum& sum = sums[clusters.size()];
      for (int c = 0; c < 4; ++c) sum.box[c] = box[c] * score;
      sum.total = score;
      sum.members = 1;
      clusters.append(box, score, clusters.size(), one);
      clusters.set_size(clusters.size());
      continue;
    }
    Sum& sum = sums[best];
    sum.total += score;
    ++sum.members;
    for (int c = 0; c < 4; ++c) {
      sum.box[c] += box[c] * score;
      if (sum.total > 0) clusters[c][best] = sum.box[c] / sum.total;
    }
    clusters[Columns::kArea][best] =
        (clusters[2][best] - clusters[0][best] + one) * (clusters[3][best] - clusters[1][best] + one);
  }
  const float looks = static_cast<float>(rule.num_looks);
  for (int64_t k = 0; k < clusters.size(); ++k) {
    const float members = static_cast<float>(sums[k].members);
    for (int c = 0; c < 4; ++c) output.boxes[4 * k + c] = clusters[c][k];
    output.scores[k] = sums[k].total / members * std::min(members, looks) / looks;
  }
  sort_results(output, clusters.size());
  return clusters.size();
}

}  // namespace

const MergeKernels REFINEDET_KERNELS = {nms, soft_nms, vote, fuse};

}  // namespace refinedet
