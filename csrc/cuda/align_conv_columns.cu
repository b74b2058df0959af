// Gather and scatter of columns on a GPU: what the backward of AlignConv does around its matrix products, which are
// ATen's (model/ops/align_conv_products.py).
#include <torch/csrc/stable/library.h>

#include "cuda/align_conv_columns.h"
#include "cuda/align_conv_tensors.h"
#include "cuda/launch.h"

namespace refinedet {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ DeviceLevels levels, const float* boxes, const int64_t* rows,
                  int64_t num_items, T* columns) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item < num_items) gather_columns<T>(levels, boxes, rows, item, columns);
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ DeviceLevels levels, const float* boxes, const int64_t* rows,
                   const T* columns, int64_t num_items, float* grad) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item < num_items) scatter_columns<T>(levels, boxes, rows, columns, item, grad);
}

unsigned blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "align_conv: ", items, " numbers are too many for one launch.");
  return static_cast<unsigned>(blocks);
}

const float* boxes_of(const DeviceInputs& inputs) { return static_cast<const float*>(inputs.boxes.const_data_ptr()); }
const int64_t* rows_of(const DeviceInputs& inputs) { return static_cast<const int64_t*>(inputs.rows.const_data_ptr()); }

// [N, T * F], taps outside, channels inside.
Tensor align_conv_columns(std::vector<Tensor> features, std::vector<int64_t> strides, Tensor boxes, Tensor rows,
                          int64_t aspects, int64_t kernel) {
  const AlignConvShape shape = check_align_conv(features, strides, boxes, rows, aspects, kernel);
  const DeviceInputs inputs = device_inputs(shape, features, strides, boxes, rows);
  Tensor columns = torch::stable::new_empty(features[0], {rows.numel(), kernel * kernel * shape.channels});
  if (columns.numel() == 0) return columns;
  by_device_type(features[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    const LaunchScope scope(columns);
    const int64_t items = columns.numel() / Chunk<T>::kCount;
    gather_kernel<T><<<blocks_for(items), kThreads, 0, scope.stream()>>>(
        inputs.levels, boxes_of(inputs), rows_of(inputs), items, static_cast<T*>(columns.mutable_data_ptr()));
    REFINEDET_CUDA_CHECK(cudaGetLastError());
  });
  return columns;
}

// Adds columns [N, T * F] to grad [pixels of all levels, F], in no fixed order.
void align_conv_scatter(Tensor grad, Tensor columns, std::vector<Tensor> features, std::vector<int64_t> strides,
                        Tensor boxes, Tensor rows, int64_t aspects, int64_t kernel) {
  const AlignConvShape shape = check_align_conv(features, strides, boxes, rows, aspects, kernel);
  check_scatter(shape, grad, columns, features[0], rows.numel());
  const DeviceInputs inputs = device_inputs(shape, features, strides, boxes, rows);
  if (columns.numel() == 0) return;
  by_device_type(features[0].scalar_type(), [&](auto type) {
    using T = decltype(type);
    const LaunchScope scope(grad);
    const int64_t items = columns.numel() / Chunk<T>::kCount;
    scatter_kernel<T><<<blocks_for(items), kThreads, 0, scope.stream()>>>(
        inputs.levels, boxes_of(inputs), rows_of(inputs), static_cast<const T*>(columns.const_data_ptr()), items,
        static_cast<float*>(grad.mutable_data_ptr()));
    REFINEDET_CUDA_CHECK(cudaGetLastError());
  });
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CUDA, m) {
  m.impl("align_conv_columns", TORCH_BOX(&refinedet::align_conv_columns));
  m.impl("align_conv_scatter", TORCH_BOX(&refinedet::align_conv_scatter));
}
