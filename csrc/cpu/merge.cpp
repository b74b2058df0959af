// torch.ops.refinedet.nms, soft_nms, box_vote and weighted_box_fusion: plain loops over the boxes of a group, which is
// one class of one image. model/ops/merge.py documents them, model/ops/merge_reference.py is their oracle.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/merge_columns.h"

namespace refinedet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBoxesPerThread = 512;

// The boxes of one group, and where its results go.
struct Group {
  const float *boxes, *scores;
  const int64_t* members;  // ascending
  int64_t count;
  int64_t* index;    // of boxes that are kept
  float* out_boxes;  // that are made
  float* out_scores;

  Box box(int64_t i) const {
    const float* from = boxes + 4 * members[i];
    return {from[0], from[1], from[2], from[3]};
  }
};

// Best first; equal scores in the order of the input.
Columns sort_by_score(const Group& group, float one) {
  std::vector<int64_t> order(group.count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return group.scores[group.members[a]] > group.scores[group.members[b]];
  });
  Columns sorted(group.count);
  for (const int64_t i : order) sorted.append(group.box(i), group.scores[group.members[i]], group.members[i], one);
  return sorted;
}

int64_t nms(const Group& group, const Rule& rule) {
  const float one = rule.plus_one;
  Columns left = sort_by_score(group, one);
  int64_t count = 0;
  while (left.size) {
    find_overlaps(left, left.box(0), one, left.overlap.data());
    group.index[count++] = left.id[0];
    left.score[0] = kGone;
    for (int64_t i = 1; i < left.size; ++i) {
      if (!(left.overlap[i] <= rule.iou)) left.score[i] = kGone;
    }
    left.compact();
  }
  return count;
}

int64_t soft_nms(const Group& group, const Rule& rule) {
  const float one = rule.plus_one;
  Columns left(group.count);
  for (int64_t i = 0; i < group.count; ++i) {
    const float score = group.scores[group.members[i]];
    if (score >= rule.score_threshold) left.append(group.box(i), score, group.members[i], one);
  }
  int64_t count = 0;
  for (;;) {
    const float top = find_top(left.score.data(), left.size);
    if (top == kGone) return count;
    const int64_t best = std::find(left.score.begin(), left.score.begin() + left.size, top) - left.score.begin();
    group.index[count] = left.id[best];
    group.out_scores[count++] = top;
    left.score[best] = kGone;
    find_overlaps(left, left.box(best), one, left.overlap.data());
    if (2 * lower_scores(left, rule) < left.size) left.compact();
  }
}

// NumPy's order of summing a row of numbers.
float sum_pairwise(const float* values, int64_t count) {
  if (count < 8) return std::accumulate(values, values + count, 0.0f);
  if (count > 128) {
    const int64_t half = count / 2 - count / 2 % 8;
    return sum_pairwise(values, half) + sum_pairwise(values + half, count - half);
  }
  float sums[8];
  std::copy_n(values, 8, sums);
  int64_t i = 8;
  for (; i + 8 <= count; i += 8) {
    for (int j = 0; j < 8; ++j) sums[j] += values[i + j];
  }
  const float sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
  return std::accumulate(values + i, values + count, sum);
}

// The results by descending score; equal ones stay in order.
void sort_results(const Group& group, int64_t count) {
  std::vector<std::pair<float, Box>> results(count);
  for (int64_t i = 0; i < count; ++i) {
    results[i].first = group.out_scores[i];
    std::copy_n(group.out_boxes + 4 * i, 4, results[i].second.begin());
  }
  std::stable_sort(results.begin(), results.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  for (int64_t i = 0; i < count; ++i) {
    group.out_scores[i] = results[i].first;
    std::copy_n(results[i].second.begin(), 4, group.out_boxes + 4 * i);
  }
}

int64_t vote(const Group& group, const Rule& rule) {
  const float one = rule.plus_one;
  Columns left = sort_by_score(group, one);
  std::vector<float> weights;
  int64_t count = 0;
  const auto emit = [&](const Box& box, float score) {
    std::copy_n(box.begin(), 4, group.out_boxes + 4 * count);
    group.out_scores[count++] = score;
  };
  while (left.size) {
    find_overlaps(left, left.box(0), one, left.overlap.data());
    const float best = left.score[0];
    Box merged = left.box(0), plain{}, sums{};
    const int64_t before = count;
    weights.clear();
    for (int64_t i = 0; i < left.size; ++i) {
      if (i > 0 && !(left.overlap[i] >= rule.iou)) continue;
      const Box box = left.box(i);
      const float score = left.score[i], lowered = score * (1.0f - left.overlap[i]);
      for (int c = 0; c < 4; ++c) {
        plain[c] += box[c];
        sums[c] += box[c] * score;
      }
      weights.push_back(score);
      if (rule.flag && lowered >= rule.score_threshold) emit(box, lowered);
      left.score[i] = kGone;
    }
    const int64_t voters = static_cast<int64_t>(weights.size());
    if (voters == 1) {
      count = before;  // a box alone stays as it is
    } else {
      const float total = sum_pairwise(weights.data(), voters);
      for (int c = 0; c < 4; ++c) merged[c] = total > 0 ? sums[c] / total : plain[c] / static_cast<float>(voters);
    }
    emit(merged, best);
    left.compact();
  }
  if (rule.flag) sort_results(group, count);
  return count;
}

int64_t fuse(const Group& group, const Rule& rule) {
  const float one = rule.plus_one;
  const Columns sorted = sort_by_score(group, one);
  Columns clusters(group.count);  // score: the total, sum: the members
  std::vector<Box> sums(group.count);
  for (int64_t i = 0; i < sorted.size && sorted.score[i] >= rule.score_threshold; ++i) {
    const Box box = sorted.box(i);
    find_overlaps(clusters, box, one, clusters.overlap.data());
    const auto end = clusters.overlap.begin() + clusters.size;
    int64_t best = std::max_element(clusters.overlap.begin(), end) - clusters.overlap.begin();
    if (best == clusters.size || !(clusters.overlap[best] > rule.iou)) {
      best = clusters.size;
      clusters.append(box, 0, best, one);
      sums[best] = {};
    }
    clusters.score[best] += sorted.score[i];
    clusters.sum[best] += 1;
    Box mean = clusters.box(best);
    for (int c = 0; c < 4; ++c) {
      sums[best][c] += box[c] * sorted.score[i];
      if (clusters.sum[best] > 1 && clusters.score[best] > 0) mean[c] = sums[best][c] / clusters.score[best];
    }
    clusters.set(best, mean, one);
  }
  const float views = static_cast<float>(rule.num_views);
  for (int64_t k = 0; k < clusters.size; ++k) {
    const float members = clusters.sum[k];
    const Box box = clusters.box(k);
    std::copy_n(box.begin(), 4, group.out_boxes + 4 * k);
    group.out_scores[k] = clusters.score[k] / members * std::min(members, views) / views;
  }
  sort_results(group, clusters.size);
  return clusters.size;
}

struct Merged {
  Tensor index, boxes, scores, groups;
};

// Run a rule on every group and put the results together, by group; at most `spread` results come from one box.
Merged merge(const Tensor& boxes, const Tensor& scores, const Tensor& groups, const Rule& rule,
             int64_t (*run)(const Group&, const Rule&), int64_t spread) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must be [N, 4], received ", boxes.dim(),
                  " dimensions.");
  const int64_t num_boxes = boxes.size(0);
  for (const Tensor* values : {&scores, &groups}) {
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == num_boxes, "scores and groups must be [", num_boxes,
                    "] as there are boxes, received ", values->numel(), " values.");
  }
  STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float && scores.scalar_type() == ScalarType::Float &&
                      groups.scalar_type() == ScalarType::Long,
                  "boxes and scores must be float32 and groups int64, received another dtype.");
  const Tensor kept[3] = {torch::stable::contiguous(boxes), torch::stable::contiguous(scores),
                          torch::stable::contiguous(groups)};
  const int64_t* numbers = static_cast<const int64_t*>(kept[2].const_data_ptr());
  std::vector<int64_t> members(num_boxes), start;
  std::iota(members.begin(), members.end(), 0);
  std::stable_sort(members.begin(), members.end(), [&](int64_t a, int64_t b) { return numbers[a] < numbers[b]; });
  for (int64_t i = 0; i < num_boxes; ++i) {
    if (i == 0 || numbers[members[i]] != numbers[members[i - 1]]) start.push_back(i);
  }
  const int64_t num_groups = static_cast<int64_t>(start.size());
  start.push_back(num_boxes);

  std::vector<int64_t> index(num_boxes), counts(num_groups);
  std::vector<float> out_boxes(4 * spread * num_boxes), out_scores(spread * num_boxes);
  const int64_t grain = num_boxes ? std::max<int64_t>(1, kBoxesPerThread * num_groups / num_boxes) : int64_t(1);
  torch::stable::parallel_for(0, num_groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      counts[g] =
          run({static_cast<const float*>(kept[0].const_data_ptr()), static_cast<const float*>(kept[1].const_data_ptr()),
               members.data() + start[g], start[g + 1] - start[g], index.data() + start[g],
               out_boxes.data() + 4 * spread * start[g], out_scores.data() + spread * start[g]},
              rule);
    }
  });

  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t(0));
  Merged merged{torch::stable::new_empty(kept[2], {total}), torch::stable::new_empty(kept[0], {total, 4}),
                torch::stable::new_empty(kept[1], {total}), torch::stable::new_empty(kept[2], {total})};
  int64_t place = 0;
  for (int64_t g = 0; g < num_groups; place += counts[g++]) {
    std::copy_n(index.data() + start[g], std::min(counts[g], start[g + 1] - start[g]),
                static_cast<int64_t*>(merged.index.mutable_data_ptr()) + place);
    std::copy_n(out_boxes.data() + 4 * spread * start[g], 4 * counts[g],
                static_cast<float*>(merged.boxes.mutable_data_ptr()) + 4 * place);
    std::copy_n(out_scores.data() + spread * start[g], counts[g],
                static_cast<float*>(merged.scores.mutable_data_ptr()) + place);
    std::fill_n(static_cast<int64_t*>(merged.groups.mutable_data_ptr()) + place, counts[g], numbers[members[start[g]]]);
  }
  return merged;
}

Tensor nms_op(Tensor boxes, Tensor scores, Tensor groups, double iou, bool plus_one) {
  return merge(boxes, scores, groups, {float(iou), 0, 0, plus_one}, nms, 1).index;
}

std::tuple<Tensor, Tensor> soft_nms_op(Tensor boxes, Tensor scores, Tensor groups, double iou, double sigma,
                                       double score_threshold, bool gaussian, bool plus_one) {
  const Rule rule{float(iou), float(sigma), float(score_threshold), plus_one, gaussian};
  const Merged merged = merge(boxes, scores, groups, rule, soft_nms, 1);
  return {merged.index, merged.scores};
}

std::tuple<Tensor, Tensor, Tensor> box_vote_op(Tensor boxes, Tensor scores, Tensor groups, double iou,
                                               double score_threshold, bool soft, bool plus_one) {
  const Rule rule{float(iou), 0, float(score_threshold), plus_one, soft};
  const Merged merged = merge(boxes, scores, groups, rule, vote, soft ? 2 : 1);
  return {merged.boxes, merged.scores, merged.groups};
}

std::tuple<Tensor, Tensor, Tensor> fuse_op(Tensor boxes, Tensor scores, Tensor groups, int64_t num_views, double iou,
                                           double score_threshold, bool plus_one) {
  const Rule rule{float(iou), 0, float(score_threshold), plus_one, false, num_views};
  const Merged merged = merge(boxes, scores, groups, rule, fuse, 1);
  return {merged.boxes, merged.scores, merged.groups};
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CPU, m) {
  m.impl("nms", TORCH_BOX(&refinedet::nms_op));
  m.impl("soft_nms", TORCH_BOX(&refinedet::soft_nms_op));
  m.impl("box_vote", TORCH_BOX(&refinedet::box_vote_op));
  m.impl("weighted_box_fusion", TORCH_BOX(&refinedet::fuse_op));
}
