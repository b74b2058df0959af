// torch.ops.refinedet.suppress on a CPU: greedy NMS of each image of a batch, an image a thread.
#include "suppress.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "suppress_checks.h"

namespace refinedet {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> suppress(Tensor boxes, Tensor scores, Tensor labels, double iou,
                                                    double score_threshold, int64_t max_kept) {
  const SuppressTensors t(boxes, scores, labels, max_kept);
  const auto limit = static_cast<float>(iou), lowest = static_cast<float>(score_threshold);
  torch::stable::parallel_for(0, t.batch, 1, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      const float* box = t.from_boxes() + image * t.candidates * 4;
      const float* score = t.from_scores() + image * t.candidates;
      const int64_t* label = t.from_labels() + image * t.candidates;
      std::vector<int64_t> kept;
      for (int64_t i = 0; i < t.candidates && score[i] > lowest && int64_t(kept.size()) < t.max_kept; ++i) {
        const bool alone = limit >= 1 || std::none_of(kept.begin(), kept.end(), [&](int64_t k) {
                             return label[k] == label[i] && box_overlap(box + 4 * k, box + 4 * i) > limit;
                           });
        if (!alone) continue;
        const int64_t to = image * t.max_kept + int64_t(kept.size());
        std::copy_n(box + 4 * i, 4, t.to_boxes() + 4 * to);
        t.to_scores()[to] = score[i];
        t.to_labels()[to] = label[i];
        kept.push_back(i);
      }
      t.to_counts()[image] = static_cast<int64_t>(kept.size());
    }
  });
  return t.results();
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CPU, m) { m.impl("suppress", TORCH_BOX(&refinedet::suppress)); }
