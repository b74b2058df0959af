// Arguments and results of torch.ops.refinedet.suppress, for both devices.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>

namespace refinedet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct SuppressTensors {
  Tensor boxes, scores, labels;                         // [B, K, 4], [B, K] descending, [B, K]
  Tensor kept_boxes, kept_scores, kept_labels, counts;  // [B, D, 4], [B, D], [B, D], [B]; zeros beyond the counts
  int64_t batch, candidates, max_kept;

  SuppressTensors(const Tensor& given_boxes, const Tensor& given_scores, const Tensor& given_labels, int64_t most)
      : boxes(torch::stable::contiguous(given_boxes)),
        scores(torch::stable::contiguous(given_scores)),
        labels(torch::stable::contiguous(given_labels)) {
    STD_TORCH_CHECK(boxes.dim() == 3 && boxes.size(2) == 4, "suppress: boxes must be [B, K, 4], received ", boxes.dim(),
                    " dimensions.");
    batch = boxes.size(0);
    candidates = boxes.size(1);
    for (const Tensor* values : {&scores, &labels}) {
      STD_TORCH_CHECK(values->dim() == 2 && values->size(0) == batch && values->size(1) == candidates,
                      "suppress: scores and labels must be [", batch, ", ", candidates, "], received ", values->numel(),
                      " values.");
      STD_TORCH_CHECK(values->is_cuda() == boxes.is_cuda() && values->get_device() == boxes.get_device(),
                      "suppress: scores and labels must be on the device of the boxes.");
    }
    STD_TORCH_CHECK(boxes.scalar_type() == ScalarType::Float && scores.scalar_type() == ScalarType::Float &&
                        labels.scalar_type() == ScalarType::Long,
                    "suppress: boxes and scores must be float32 and labels int64, received another dtype.");
    STD_TORCH_CHECK(most > 0, "suppress: max_kept must be positive, received ", most, ".");
    max_kept = std::min(most, candidates);
    kept_boxes = torch::stable::new_zeros(boxes, {batch, max_kept, 4});
    kept_scores = torch::stable::new_zeros(scores, {batch, max_kept});
    kept_labels = torch::stable::new_zeros(labels, {batch, max_kept});
    counts = torch::stable::new_zeros(labels, {batch});
  }

  const float* from_boxes() const { return static_cast<const float*>(boxes.const_data_ptr()); }
  const float* from_scores() const { return static_cast<const float*>(scores.const_data_ptr()); }
  const int64_t* from_labels() const { return static_cast<const int64_t*>(labels.const_data_ptr()); }
  float* to_boxes() const { return static_cast<float*>(kept_boxes.mutable_data_ptr()); }
  float* to_scores() const { return static_cast<float*>(kept_scores.mutable_data_ptr()); }
  int64_t* to_labels() const { return static_cast<int64_t*>(kept_labels.mutable_data_ptr()); }
  int64_t* to_counts() const { return static_cast<int64_t*>(counts.mutable_data_ptr()); }
  std::tuple<Tensor, Tensor, Tensor, Tensor> results() const { return {kept_boxes, kept_scores, kept_labels, counts}; }
};

}  // namespace refinedet
