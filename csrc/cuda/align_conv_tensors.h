// Tensors into what the kernels of AlignConv take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

#include "align_conv_checks.h"
#include "cuda/align_conv_sampling.h"

namespace refinedet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The tensor as the kernels can read it, 16 bytes of channels at a time: in place where that is possible.
inline Tensor sampled_layout(const Tensor& feature) {
  const int64_t pieces = 16 / static_cast<int64_t>(feature.element_size());
  STD_TORCH_CHECK(feature.size(1) % pieces == 0, "align_conv: on a GPU the channels must be a multiple of ", pieces,
                  " for this dtype, received ", feature.size(1), "; align_conv of model.ops pads them.");
  const auto readable = [&](const Tensor& tensor) {
    return tensor.stride(1) == 1 && tensor.stride(0) % pieces == 0 && tensor.stride(2) % pieces == 0 &&
           tensor.stride(3) % pieces == 0 && reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  };
  if (readable(feature)) return feature;
  // [B, H, W, F] memory of its own, whatever the strides were.
  Tensor cells =
      torch::stable::new_empty(feature, {feature.size(0), feature.size(2), feature.size(3), feature.size(1)});
  Tensor view = torch::stable::transpose(torch::stable::transpose(cells, 1, 3), 2, 3);
  torch::stable::copy_(view, feature);
  return view;
}

struct DeviceInputs {
  std::vector<Tensor> features;
  Tensor boxes, rows;
  DeviceLevels levels;
};

inline DeviceInputs device_inputs(const AlignConvShape& shape, const std::vector<Tensor>& features,
                                  const std::vector<int64_t>& strides, const Tensor& boxes, const Tensor& rows) {
  const bool single = boxes.scalar_type() == ScalarType::Float;
  DeviceInputs inputs{{},
                      torch::stable::contiguous(single ? boxes : torch::stable::to(boxes, ScalarType::Float)),
                      torch::stable::contiguous(rows),
                      {}};
  int64_t pixels = 0;
  DeviceLevels& levels = inputs.levels;
  levels.num_levels = shape.num_levels;
  levels.aspects = shape.aspects;
  levels.kernel = shape.kernel;
  levels.channels = static_cast<int32_t>(shape.channels);
  levels.batch = shape.batch;
  for (int l = 0; l < shape.num_levels; ++l) {
    inputs.features.push_back(sampled_layout(features[l]));
    const Tensor& feature = inputs.features[l];
    const int32_t cells = shape.height[l] * shape.width[l];
    levels.level[l] = {feature.const_data_ptr(),
                       feature.stride(0),
                       feature.stride(2),
                       feature.stride(3),
                       pixels,
                       pixels * shape.aspects,
                       cells,
                       shape.height[l],
                       shape.width[l],
                       1.0f / static_cast<float>(strides[l])};
    pixels += shape.batch * cells;
  }
  return inputs;
}

// Calls run(T()) for the type of the features.
template <typename Run>
void by_device_type(ScalarType type, const Run& run) {
  if (type == ScalarType::Float) return run(float());
  if (type == ScalarType::BFloat16) return run(__nv_bfloat16());
  STD_TORCH_CHECK(type == ScalarType::Half, "align_conv: features must be float32, bfloat16 or float16 on a GPU.");
  run(__half());
}

}  // namespace refinedet
