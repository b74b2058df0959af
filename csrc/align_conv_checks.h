// What both devices ask of AlignConv's arguments before they touch memory; every message says what it received.
//
// model/ops/align_conv.py checks the same for its callers, with ValueError; these guard direct calls of the operator.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <limits>
#include <vector>

#include "align_conv_geometry.h"

namespace refinedet {

struct AlignConvShape {
  int num_levels, aspects, kernel;
  int64_t batch, channels, outputs;
  int32_t height[kMaxLevels], width[kMaxLevels];
  int64_t level_begin[kMaxLevels + 1];  // first anchor of each level
  int64_t anchors;                      // of one image
};

inline void check_like(const torch::stable::Tensor& tensor, const torch::stable::Tensor& first, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == first.scalar_type(), "align_conv: ", name,
                  " must have the dtype of the features, received another.");
  STD_TORCH_CHECK(tensor.is_cuda() == first.is_cuda() && tensor.get_device() == first.get_device(),
                  "align_conv: ", name, " must be on the device of the features, received another.");
}

inline AlignConvShape check_align_conv(const std::vector<torch::stable::Tensor>& features,
                                       const std::vector<int64_t>& strides, const torch::stable::Tensor& boxes,
                                       const torch::stable::Tensor& index,
                                       const std::vector<torch::stable::Tensor>& weight,
                                       const std::vector<torch::stable::Tensor>& bias) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!features.empty() && features.size() <= kMaxLevels, "align_conv: 1 to ", kMaxLevels,
                  " levels are possible, received ", features.size(), ".");
  STD_TORCH_CHECK(strides.size() == features.size() && weight.size() == features.size() &&
                      (bias.empty() || bias.size() == features.size()),
                  "align_conv: every level needs a stride, a weight and a bias, received ", features.size(),
                  " levels, ", strides.size(), " strides, ", weight.size(), " weights, ", bias.size(), " biases.");
  const ScalarType type = features[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "align_conv: features must be float32, float64, bfloat16 or float16, received another dtype.");
  STD_TORCH_CHECK(weight[0].dim() == 5, "align_conv: weight must be [aspects, outputs, F, K, K], received ",
                  weight[0].dim(), " dimensions.");
  AlignConvShape shape{};
  shape.num_levels = static_cast<int>(features.size());
  shape.aspects = static_cast<int>(weight[0].size(0));
  shape.outputs = weight[0].size(1);
  shape.channels = weight[0].size(2);
  shape.kernel = static_cast<int>(weight[0].size(3));
  STD_TORCH_CHECK(shape.kernel == 3 || shape.kernel == 5 || shape.kernel == 7,
                  "align_conv: the kernel must be 3, 5 or 7, received ", shape.kernel, ".");
  STD_TORCH_CHECK(shape.aspects > 0 && shape.outputs > 0 && shape.channels > 0,
                  "align_conv: weight must not be empty, received ", shape.aspects, " aspects, ", shape.outputs,
                  " outputs, ", shape.channels, " channels.");
  for (size_t l = 0; l < features.size(); ++l) {
    STD_TORCH_CHECK(features[l].dim() == 4 && features[l].size(1) == shape.channels &&
                        (l == 0 || features[l].size(0) == shape.batch),
                    "align_conv: the features of level ", l, " must be [B, ", shape.channels, ", H, W].");
    shape.batch = features[l].size(0);
    STD_TORCH_CHECK(features[l].size(2) > 0 && features[l].size(3) > 0 &&
                        features[l].numel() <= std::numeric_limits<int32_t>::max(),
                    "align_conv: the features of level ", l, " must hold between 1 and 2^31 - 1 numbers, received ",
                    features[l].numel(), ".");
    STD_TORCH_CHECK(strides[l] > 0, "align_conv: strides must be positive, received ", strides[l], ".");
    check_like(features[l], features[0], "features");
    STD_TORCH_CHECK(weight[l].dim() == 5 && weight[l].size(0) == shape.aspects && weight[l].size(1) == shape.outputs &&
                        weight[l].size(2) == shape.channels && weight[l].size(3) == shape.kernel &&
                        weight[l].size(4) == shape.kernel,
                    "align_conv: the weight of level ", l, " must be [", shape.aspects, ", ", shape.outputs, ", ",
                    shape.channels, ", ", shape.kernel, ", ", shape.kernel, "].");
    check_like(weight[l], features[0], "weight");
    if (!bias.empty()) {
      STD_TORCH_CHECK(bias[l].dim() == 2 && bias[l].size(0) == shape.aspects && bias[l].size(1) == shape.outputs,
                      "align_conv: the bias of level ", l, " must be [", shape.aspects, ", ", shape.outputs, "].");
      check_like(bias[l], features[0], "bias");
    }
    shape.height[l] = static_cast<int32_t>(features[l].size(2));
    shape.width[l] = static_cast<int32_t>(features[l].size(3));
    shape.level_begin[l] = shape.anchors;
    shape.anchors += int64_t(shape.height[l]) * shape.width[l] * shape.aspects;
  }
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == ScalarType::Long &&
                      index.numel() <= std::numeric_limits<int32_t>::max(),
                  "align_conv: index must be [N] int64, received ", index.dim(), " dimensions, ", index.numel(),
                  " numbers.");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == index.numel() && boxes.size(1) == 4 &&
                      (boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double),
                  "align_conv: boxes must be [", index.numel(), ", 4] float32 or float64.");
  STD_TORCH_CHECK(index.is_cuda() == features[0].is_cuda() && boxes.is_cuda() == features[0].is_cuda() &&
                      index.get_device() == features[0].get_device() && boxes.get_device() == features[0].get_device(),
                  "align_conv: boxes and index must be on the device of the features.");
  return shape;
}

inline void check_gradient(const torch::stable::Tensor& grad, const torch::stable::Tensor& feature, int64_t rows,
                           int64_t outputs) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == rows && grad.size(1) == outputs,
                  "align_conv: the gradient of the output must be [", rows, ", ", outputs, "].");
  check_like(grad, feature, "the gradient of the output");
}

}  // namespace refinedet
