// Gather and scatter of columns on a GPU: what the backward of AlignConv does around its matrix products, which stay in
// ATen (model/ops/align_conv_cuda.py).
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/align_conv_columns.h"
#include "cuda/align_conv_tensors.h"
#include "cuda/launch.h"

namespace refinedet {
namespace {

constexpr int kThreads = 256;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_kernel(const __grid_constant__ DeviceLevels levels, const float* boxes, const int64_t* index,
                  int64_t num_items, T* columns) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item < num_items) gather_columns<T>(levels, boxes, index, item, columns);
}

__global__ void __launch_bounds__(kThreads)
    scatter_kernel(const __grid_constant__ DeviceLevels levels, const float* boxes, const int64_t* index,
                   const float* columns, int64_t num_items, float* grad) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item < num_items) scatter_columns(levels, boxes, index, columns, item, grad);
}

__global__ void __launch_bounds__(kThreads)
    targets_kernel(const __grid_constant__ DeviceLevels levels, const float* boxes, const int64_t* index,
                   int64_t num_pairs, int64_t* pixels, float* weights) {
  const int64_t pair = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (pair < num_pairs) write_targets(levels, boxes, index, pair, pixels, weights);
}

__global__ void __launch_bounds__(kThreads)
    sum_kernel(const int64_t* pixels, const int64_t* order, const float* weights, const float* columns,
               int64_t num_entries, int32_t channels, int64_t num_items, float* grad) {
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item < num_items) sum_targets(pixels, order, weights, columns, num_entries, channels, item, grad);
}

unsigned blocks_for(int64_t items) {
  const int64_t blocks = (items + kThreads - 1) / kThreads;
  STD_TORCH_CHECK(blocks <= 0x7fffffff, "align_conv: ", items, " numbers are too many for one launch.");
  return static_cast<unsigned>(blocks);
}

// Levels, boxes and index without filters: these kernels do not know the outputs.
DeviceInputs inputs_of(const std::vector<Tensor>& features, const std::vector<int64_t>& strides, const Tensor& boxes,
                       const Tensor& index, int64_t aspects, int64_t kernel) {
  const Tensor weight = torch::stable::new_empty(features[0], {aspects, 1, features[0].size(1), kernel, kernel});
  const std::vector<Tensor> weights(features.size(), weight);
  return device_inputs(check_align_conv(features, strides, boxes, index, weights, {}), features, strides, boxes, index);
}

template <typename T>
void gather(const DeviceInputs& inputs, const Tensor& columns) {
  const LaunchScope scope(columns);
  const int64_t items = columns.numel() / Chunk<T>::kCount;
  gather_kernel<T><<<blocks_for(items), kThreads, 0, scope.stream()>>>(
      inputs.levels, static_cast<const float*>(inputs.boxes.const_data_ptr()),
      static_cast<const int64_t*>(inputs.index.const_data_ptr()), items, static_cast<T*>(columns.mutable_data_ptr()));
  REFINEDET_CUDA_CHECK(cudaGetLastError());
}

// [N, T * F], taps outside, channels inside.
Tensor align_conv_columns(std::vector<Tensor> features, std::vector<int64_t> strides, Tensor boxes, Tensor index,
                          int64_t aspects, int64_t kernel) {
  const DeviceInputs inputs = inputs_of(features, strides, boxes, index, aspects, kernel);
  const Tensor columns = torch::stable::new_empty(features[0], {index.numel(), kernel * kernel * features[0].size(1)});
  if (columns.numel() == 0) return columns;
  switch (features[0].scalar_type()) {
    case ScalarType::Float:
      gather<float>(inputs, columns);
      break;
    case ScalarType::BFloat16:
      gather<__nv_bfloat16>(inputs, columns);
      break;
    case ScalarType::Half:
      gather<__half>(inputs, columns);
      break;
    default:
      STD_TORCH_CHECK(false, "align_conv: features must be float32, bfloat16 or float16 on a GPU.");
  }
  return columns;
}

void check_floats(const Tensor& tensor, int64_t numbers, const char* name) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.scalar_type() == ScalarType::Float && tensor.is_contiguous() &&
                      tensor.numel() == numbers,
                  "align_conv: ", name, " must be ", numbers, " contiguous float32 numbers on the GPU, received ",
                  tensor.numel(), ".");
}

// Adds columns [N, T * F] to grad [pixels of all levels, F].
void align_conv_scatter(Tensor grad, Tensor columns, std::vector<Tensor> features, std::vector<int64_t> strides,
                        Tensor boxes, Tensor index, int64_t aspects, int64_t kernel) {
  const DeviceInputs inputs = inputs_of(features, strides, boxes, index, aspects, kernel);
  check_floats(grad, inputs.pixels * inputs.levels.channels, "grad");
  check_floats(columns, index.numel() * kernel * kernel * inputs.levels.channels, "columns");
  if (columns.numel() == 0) return;
  const LaunchScope scope(grad);
  const int64_t items = columns.numel() / 4;
  scatter_kernel<<<blocks_for(items), kThreads, 0, scope.stream()>>>(
      inputs.levels, static_cast<const float*>(inputs.boxes.const_data_ptr()),
      static_cast<const int64_t*>(inputs.index.const_data_ptr()), static_cast<const float*>(columns.const_data_ptr()),
      items, static_cast<float*>(grad.mutable_data_ptr()));
  REFINEDET_CUDA_CHECK(cudaGetLastError());
}

// (pixels [N * T * 4] int64, weights [N * T * 4]) that the columns go to.
std::tuple<Tensor, Tensor> align_conv_targets(std::vector<Tensor> features, std::vector<int64_t> strides, Tensor boxes,
                                              Tensor index, int64_t aspects, int64_t kernel) {
  const DeviceInputs inputs = inputs_of(features, strides, boxes, index, aspects, kernel);
  const int64_t pairs = index.numel() * kernel * kernel;
  const Tensor pixels = torch::stable::new_empty(inputs.index, {pairs * 4});
  const Tensor weights = torch::stable::new_empty(inputs.boxes, {pairs * 4});
  if (pairs > 0) {
    const LaunchScope scope(pixels);
    targets_kernel<<<blocks_for(pairs), kThreads, 0, scope.stream()>>>(
        inputs.levels, static_cast<const float*>(inputs.boxes.const_data_ptr()),
        static_cast<const int64_t*>(inputs.index.const_data_ptr()), pairs,
        static_cast<int64_t*>(pixels.mutable_data_ptr()), static_cast<float*>(weights.mutable_data_ptr()));
    REFINEDET_CUDA_CHECK(cudaGetLastError());
  }
  return {pixels, weights};
}

// Adds columns to grad [pixels, F] in the order given: pixels ascending, `order` their places in `weights`.
void align_conv_scatter_sorted(Tensor grad, Tensor columns, Tensor pixels, Tensor order, Tensor weights) {
  const int64_t entries = pixels.numel(), channels = grad.size(1);
  check_floats(grad, grad.numel(), "grad");
  check_floats(weights, entries, "weights");
  check_floats(columns, entries / 4 * channels, "columns");
  for (const Tensor* tensor : {&pixels, &order}) {
    STD_TORCH_CHECK(tensor->is_cuda() && tensor->scalar_type() == ScalarType::Long && tensor->is_contiguous() &&
                        tensor->numel() == entries,
                    "align_conv: pixels and order must be ", entries, " contiguous int64 numbers on the GPU.");
  }
  if (entries == 0) return;
  const LaunchScope scope(grad);
  const int64_t items = entries * (channels / 4);
  sum_kernel<<<blocks_for(items), kThreads, 0, scope.stream()>>>(
      static_cast<const int64_t*>(pixels.const_data_ptr()), static_cast<const int64_t*>(order.const_data_ptr()),
      static_cast<const float*>(weights.const_data_ptr()), static_cast<const float*>(columns.const_data_ptr()), entries,
      static_cast<int32_t>(channels), items, static_cast<float*>(grad.mutable_data_ptr()));
  REFINEDET_CUDA_CHECK(cudaGetLastError());
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CUDA, m) {
  m.impl("align_conv_columns", TORCH_BOX(&refinedet::align_conv_columns));
  m.impl("align_conv_scatter", TORCH_BOX(&refinedet::align_conv_scatter));
  m.impl("align_conv_targets", TORCH_BOX(&refinedet::align_conv_targets));
  m.impl("align_conv_scatter_sorted", TORCH_BOX(&refinedet::align_conv_scatter_sorted));
}
