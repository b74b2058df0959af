// torch.ops.refinedet.nms, soft_nms, box_vote and weighted_box_fusion on the CPU: checks, groups, threads. The
// arithmetic is in merge_kernels.h.
#include "cpu/merge.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <tuple>
#include <vector>

#include "cpu/capability.h"

namespace refinedet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBoxesPerThread = 512;

const MergeKernels& kernels() {
#ifdef REFINEDET_X86_TARGETS
  if (cpu_capability() >= Capability::kAvx2) return kMergeAvx2;
#endif
  return kMergeBaseline;
}

// Boxes sorted by group, in the order of the input within each: group g is members[start[g]] .. members[start[g + 1]].
struct Groups {
  std::vector<int64_t> members, start;
};

Groups sort_groups(const int64_t* groups, int64_t count) {
  Groups sorted;
  sorted.members.resize(count);
  if (count == 0) {
    sorted.start = {0};
    return sorted;
  }
  const auto [low, high] = std::minmax_element(groups, groups + count);
  // The distance of far-apart groups does not fit a signed number.
  const uint64_t range = static_cast<uint64_t>(*high) - static_cast<uint64_t>(*low);
  if (range < static_cast<uint64_t>(4 * count + 4096)) {
    std::vector<int64_t> place(range + 2, 0);
    for (int64_t i = 0; i < count; ++i) ++place[groups[i] - *low + 1];
    for (uint64_t g = 0; g <= range; ++g) {
      if (place[g + 1]) sorted.start.push_back(place[g]);
      place[g + 1] += place[g];
    }
    for (int64_t i = 0; i < count; ++i) sorted.members[place[groups[i] - *low]++] = i;
  } else {
    std::iota(sorted.members.begin(), sorted.members.end(), 0);
    std::stable_sort(sorted.members.begin(), sorted.members.end(),
                     [groups](int64_t a, int64_t b) { return groups[a] < groups[b]; });
    for (int64_t i = 0; i < count; ++i) {
      if (i == 0 || groups[sorted.members[i]] != groups[sorted.members[i - 1]]) sorted.start.push_back(i);
    }
  }
  sorted.start.push_back(count);
  return sorted;
}

struct Inputs {
  Tensor boxes, scores, groups;
  Groups sorted;
};

Inputs check(const Tensor& boxes, const Tensor& scores, const Tensor& groups) {
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(1) == 4, "boxes must be [N, 4], received ", boxes.dim(),
                  " dimensions.");
  for (const Tensor* values : {&scores, &groups}) {
    STD_TORCH_CHECK(values->dim() == 1 && values->size(0) == boxes.size(0), "scores and groups must be [",
                    boxes.size(0), "] as there are boxes, received ", values->numel(), " values.");
  }
  STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float && scores.scalar_type() == ScalarType::Float &&
                      groups.scalar_type() == ScalarType::Long,
                  "boxes and scores must be float32 and groups int64, received another dtype.");
  Inputs inputs{
      torch::stable::contiguous(boxes), torch::stable::contiguous(scores), torch::stable::contiguous(groups), {}};
  inputs.sorted = sort_groups(static_cast<const int64_t*>(inputs.groups.const_data_ptr()), inputs.groups.numel());
  return inputs;
}

struct Merged {
  Tensor index, boxes, scores, groups;
};

// Run a kernel on every group and put the results together, by group. `spread` results at most come from one box.
Merged merge(const Inputs& inputs, const MergeRule& rule,
             int64_t (*kernel)(const MergeGroup&, const MergeRule&, const MergeOutput&), int64_t spread,
             bool makes_boxes) {
  const Groups& sorted = inputs.sorted;
  const int64_t num_boxes = static_cast<int64_t>(sorted.members.size());
  const int64_t num_groups = static_cast<int64_t>(sorted.start.size()) - 1;
  const float* boxes = static_cast<const float*>(inputs.boxes.const_data_ptr());
  const float* scores = static_cast<const float*>(inputs.scores.const_data_ptr());
  std::vector<int64_t> counts(num_groups);
  // Not vectors, which would be filled with zeros first.
  const std::unique_ptr<int64_t[]> index(new int64_t[makes_boxes ? 0 : num_boxes]);
  const std::unique_ptr<float[]> out_boxes(new float[makes_boxes ? 4 * spread * num_boxes : 0]);
  const std::unique_ptr<float[]> out_scores(new float[spread * num_boxes]);
  const int64_t grain = num_boxes ? std::max<int64_t>(1, kBoxesPerThread * num_groups / num_boxes) : int64_t(1);
  torch::stable::parallel_for(0, num_groups, grain, [&](int64_t begin, int64_t end) {
    for (int64_t g = begin; g < end; ++g) {
      const int64_t first = sorted.start[g];
      const MergeGroup group{boxes, scores, sorted.members.data() + first, sorted.start[g + 1] - first};
      const MergeOutput output{index.get() + (makes_boxes ? 0 : first),
                               out_boxes.get() + (makes_boxes ? 4 * spread * first : 0),
                               out_scores.get() + spread * first};
      counts[g] = kernel(group, rule, output);
    }
  });

  const int64_t total = std::accumulate(counts.begin(), counts.end(), int64_t(0));
  Merged merged;
  merged.scores = torch::stable::new_empty(inputs.scores, {total});
  if (makes_boxes) {
    merged.boxes = torch::stable::new_empty(inputs.boxes, {total, 4});
    merged.groups = torch::stable::new_empty(inputs.groups, {total});
  } else {
    merged.index = torch::stable::new_empty(inputs.groups, {total});
  }
  const int64_t* numbers = static_cast<const int64_t*>(inputs.groups.const_data_ptr());
  float* to_scores = static_cast<float*>(merged.scores.mutable_data_ptr());
  int64_t place = 0;
  for (int64_t g = 0; g < num_groups; place += counts[g++]) {
    const int64_t first = sorted.start[g], count = counts[g];
    std::copy_n(out_scores.get() + spread * first, count, to_scores + place);
    if (makes_boxes) {
      std::copy_n(out_boxes.get() + 4 * spread * first, 4 * count,
                  static_cast<float*>(merged.boxes.mutable_data_ptr()) + 4 * place);
      std::fill_n(static_cast<int64_t*>(merged.groups.mutable_data_ptr()) + place, count,
                  numbers[sorted.members[first]]);
    } else {
      std::copy_n(index.get() + first, count, static_cast<int64_t*>(merged.index.mutable_data_ptr()) + place);
    }
  }
  return merged;
}

Tensor nms(Tensor boxes, Tensor scores, Tensor groups, double iou, bool plus_one) {
  MergeRule rule;
  rule.iou = static_cast<float>(iou);
  rule.plus_one = plus_one;
  return merge(check(boxes, scores, groups), rule, kernels().nms, 1, false).index;
}

std::tuple<Tensor, Tensor> soft_nms(Tensor boxes, Tensor scores, Tensor groups, double iou, double sigma,
                                    double score_threshold, bool gaussian, bool plus_one) {
  MergeRule rule;
  rule.iou = static_cast<float>(iou);
  rule.sigma = static_cast<float>(sigma);
  rule.score_threshold = static_cast<float>(score_threshold);
  rule.gaussian = gaussian;
  rule.plus_one = plus_one;
  const Merged merged = merge(check(boxes, scores, groups), rule, kernels().soft_nms, 1, false);
  return {merged.index, merged.scores};
}

std::tuple<Tensor, Tensor, Tensor> box_vote(Tensor boxes, Tensor scores, Tensor groups, double iou,
                                            double score_threshold, bool soft, bool plus_one) {
  MergeRule rule;
  rule.iou = static_cast<float>(iou);
  rule.score_threshold = static_cast<float>(score_threshold);
  rule.soft = soft;
  rule.plus_one = plus_one;
  const Merged merged = merge(check(boxes, scores, groups), rule, kernels().vote, soft ? 2 : 1, true);
  return {merged.boxes, merged.scores, merged.groups};
}

std::tuple<Tensor, Tensor, Tensor> weighted_box_fusion(Tensor boxes, Tensor scores, Tensor groups, int64_t num_looks,
                                                       double iou, double score_threshold, bool plus_one) {
  MergeRule rule;
  rule.iou = static_cast<float>(iou);
  rule.score_threshold = static_cast<float>(score_threshold);
  rule.num_looks = num_looks;
  rule.plus_one = plus_one;
  const Merged merged = merge(check(boxes, scores, groups), rule, kernels().fuse, 1, true);
  return {merged.boxes, merged.scores, merged.groups};
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CPU, m) {
  m.impl("nms", TORCH_BOX(&refinedet::nms));
  m.impl("soft_nms", TORCH_BOX(&refinedet::soft_nms));
  m.impl("box_vote", TORCH_BOX(&refinedet::box_vote));
  m.impl("weighted_box_fusion", TORCH_BOX(&refinedet::weighted_box_fusion));
}
