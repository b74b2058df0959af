// Checks of AlignConv's arguments, for both devices; every message states what it received. They guard direct calls of
// the operators: model/ops/align_conv.py checks the same for its callers, with ValueError.
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
  int64_t batch, channels;
  int32_t height[kMaxLevels], width[kMaxLevels];
  int64_t pixels;  // cells of all levels and images
};

inline bool is_like(const torch::stable::Tensor& tensor, const torch::stable::Tensor& first) {
  return tensor.scalar_type() == first.scalar_type() && tensor.is_cuda() == first.is_cuda() &&
         tensor.get_device() == first.get_device();
}

inline AlignConvShape check_align_conv(const std::vector<torch::stable::Tensor>& features,
                                       const std::vector<int64_t>& strides, const torch::stable::Tensor& boxes,
                                       const torch::stable::Tensor& rows, int64_t aspects, int64_t kernel) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(!features.empty() && features.size() <= kMaxLevels, "align_conv: 1 to ", kMaxLevels,
                  " levels are possible, received ", features.size(), ".");
  STD_TORCH_CHECK(strides.size() == features.size(), "align_conv: every level needs a stride, received ",
                  features.size(), " levels and ", strides.size(), " strides.");
  STD_TORCH_CHECK((kernel == 3 || kernel == 5 || kernel == 7) && aspects > 0,
                  "align_conv: the kernel must be 3, 5 or 7 and the aspects positive, received ", kernel, " and ",
                  aspects, ".");
  const ScalarType type = features[0].scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
                      type == ScalarType::Half,
                  "align_conv: features must be float32, float64, bfloat16 or float16, received another dtype.");
  STD_TORCH_CHECK(features[0].dim() == 4, "align_conv: features must be [B, F, H, W], received ", features[0].dim(),
                  " dimensions.");
  AlignConvShape shape{static_cast<int>(features.size()),
                       static_cast<int>(aspects),
                       static_cast<int>(kernel),
                       features[0].size(0),
                       features[0].size(1),
                       {},
                       {},
                       0};
  for (size_t l = 0; l < features.size(); ++l) {
    const torch::stable::Tensor& feature = features[l];
    STD_TORCH_CHECK(feature.dim() == 4 && feature.size(0) == shape.batch && feature.size(1) == shape.channels &&
                        is_like(feature, features[0]),
                    "align_conv: the features of level ", l, " must be [", shape.batch, ", ", shape.channels,
                    ", H, W], of the dtype and on the device of the first.");
    STD_TORCH_CHECK(feature.size(2) > 0 && feature.size(3) > 0 &&
                        feature.numel() <= std::numeric_limits<int32_t>::max() && strides[l] > 0,
                    "align_conv: the features of level ", l, " must hold between 1 and 2^31 - 1 numbers, and its ",
                    "stride must be positive, received ", feature.numel(), " and ", strides[l], ".");
    shape.height[l] = static_cast<int32_t>(feature.size(2));
    shape.width[l] = static_cast<int32_t>(feature.size(3));
    shape.pixels += shape.batch * shape.height[l] * shape.width[l];
  }
  STD_TORCH_CHECK(
      rows.dim() == 1 && rows.scalar_type() == ScalarType::Long && rows.numel() <= std::numeric_limits<int32_t>::max(),
      "align_conv: rows must be [N] int64, received ", rows.dim(), " dimensions, ", rows.numel(), " numbers.");
  STD_TORCH_CHECK(boxes.dim() == 2 && boxes.size(0) == rows.numel() && boxes.size(1) == 4 &&
                      (boxes.scalar_type() == ScalarType::Float || boxes.scalar_type() == ScalarType::Double),
                  "align_conv: boxes must be [", rows.numel(), ", 4] float32 or float64.");
  STD_TORCH_CHECK(rows.is_cuda() == features[0].is_cuda() && boxes.is_cuda() == features[0].is_cuda() &&
                      rows.get_device() == features[0].get_device() && boxes.get_device() == features[0].get_device(),
                  "align_conv: boxes and rows must be on the device of the features.");
  return shape;
}

// `grad` holds [pixels, F] in the type of the sums, columns [N, T * F] in that of the features.
inline void check_scatter(const AlignConvShape& shape, const torch::stable::Tensor& grad,
                          const torch::stable::Tensor& columns, const torch::stable::Tensor& feature, int64_t rows) {
  using torch::headeronly::ScalarType;
  const ScalarType sums = feature.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(grad.is_contiguous() && grad.numel() == shape.pixels * shape.channels && grad.scalar_type() == sums,
                  "align_conv: grad must be ", shape.pixels * shape.channels,
                  " contiguous numbers in the type of the sums, received ", grad.numel(), ".");
  const int64_t wanted = rows * shape.kernel * shape.kernel * shape.channels;
  STD_TORCH_CHECK(columns.is_contiguous() && columns.numel() == wanted && is_like(columns, feature),
                  "align_conv: columns must be ", wanted, " contiguous numbers like the features, received ",
                  columns.numel(), ".");
}

}  // namespace refinedet
