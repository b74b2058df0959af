// torch.ops.refinedet.align_conv on a GPU: one launch for all groups. The host never waits, and the launch depends on
// the number of rows alone, so that it can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>

#include "cuda/align_conv_fused.h"
#include "cuda/align_conv_tensors.h"
#include "cuda/launch.h"

namespace refinedet {
namespace {

template <typename T>
__global__ void __launch_bounds__(kFusedThreads, 2)
    fused_kernel(const __grid_constant__ DeviceLevels levels, const __grid_constant__ FusedArguments arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  __shared__ int32_t starts[kMaxGroups + 1];
  const FusedShared<T> shared{memory};
  const int thread = threadIdx.x;
  find_starts(levels, arguments, thread, starts);
  __syncthreads();
  const FusedTile tile = find_tile(arguments, starts, blockIdx.x, blockIdx.y);
  if (tile.group < 0) return;
  if (tile.group == arguments.num_groups) {
    end_tile(levels, arguments, tile, shared, thread);
    return;
  }
  const int num_stages = levels.kernel * levels.kernel * arguments.parts;
  FusedThread state;
  TileSums<T> sums;
  begin_tile(levels, arguments, tile, shared, thread, state);
  fetch_filters(levels, arguments, tile, 0, shared, 0, thread);
  __syncthreads();
  fetch_samples(levels, tile, shared, 0, thread, state);
  store_samples(shared, 0, thread, state);
  wait_for_filters();
  __syncthreads();
  for (int stage = 0; stage < num_stages; ++stage) {
    const int buffer = stage % 2, next = stage + 1;
    if (next < num_stages) {
      fetch_filters(levels, arguments, tile, next, shared, 1 - buffer, thread);
      fetch_samples(levels, tile, shared, next, thread, state);
    }
    sums.multiply(shared, buffer, thread);
    if (next < num_stages) store_samples(shared, 1 - buffer, thread, state);
    wait_for_filters();
    __syncthreads();
  }
  sums.store(shared, thread);
  __syncthreads();
  end_tile(levels, arguments, tile, shared, thread);
}

template <typename T>
void run(const DeviceInputs& inputs, const AlignConvShape& shape, const std::vector<Tensor>& weight,
         const std::vector<Tensor>& bias, const Tensor& output) {
  const LaunchScope scope(output);
  constexpr int64_t kPartChannels = kStageBytes / sizeof(T);
  FusedArguments arguments{};
  arguments.boxes = static_cast<const float*>(inputs.boxes.const_data_ptr());
  arguments.rows = static_cast<const int64_t*>(inputs.rows.const_data_ptr());
  arguments.output = output.mutable_data_ptr();
  arguments.num_rows = output.size(0);
  arguments.outputs = static_cast<int32_t>(output.size(1));
  arguments.num_groups = shape.num_levels * shape.aspects;
  arguments.parts = static_cast<int32_t>((shape.channels + kPartChannels - 1) / kPartChannels);
  for (int l = 0; l < shape.num_levels; ++l) {
    arguments.filters[l] = weight[l].const_data_ptr();
    arguments.bias[l] = bias[l].const_data_ptr();
  }
  const int bytes = FusedShared<T>::size(shape.kernel);
  REFINEDET_CUDA_CHECK(cudaFuncSetAttribute(fused_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  // Every group, and the empty rows, may end with a tile that is not full; blocks beyond the last tile return at once.
  const dim3 grid(static_cast<unsigned>((arguments.num_rows + kTileRows - 1) / kTileRows + arguments.num_groups + 1),
                  static_cast<unsigned>((arguments.outputs + kTileOutputs - 1) / kTileOutputs));
  fused_kernel<T><<<grid, kFusedThreads, bytes, scope.stream()>>>(inputs.levels, arguments);
  REFINEDET_CUDA_CHECK(cudaGetLastError());
}

// weight [aspects, O, F, K, K] with channels innermost in memory, as align_conv of model.ops arranges it.
Tensor align_conv(std::vector<Tensor> features, std::vector<int64_t> strides, Tensor boxes, Tensor rows,
                  std::vector<Tensor> weight, std::vector<Tensor> bias) {
  STD_TORCH_CHECK(
      !weight.empty() && weight[0].dim() == 5 && weight.size() == features.size() && bias.size() == features.size(),
      "align_conv: every level needs a weight [aspects, O, F, K, K] and a bias, received ", features.size(),
      " levels, ", weight.size(), " weights, ", bias.size(), " biases.");
  const int64_t aspects = weight[0].size(0), outputs = weight[0].size(1), kernel = weight[0].size(3);
  const AlignConvShape shape = check_align_conv(features, strides, boxes, rows, aspects, kernel);
  STD_TORCH_CHECK(shape.num_levels * aspects <= kMaxGroups, "align_conv: at most ", kMaxGroups,
                  " pairs of level and aspect are possible on a GPU, received ", shape.num_levels * aspects, ".");
  std::vector<Tensor> offsets;
  for (int l = 0; l < shape.num_levels; ++l) {
    const Tensor& filters = weight[l];
    const bool fits = filters.dim() == 5 && filters.size(0) == aspects && filters.size(1) == outputs &&
                      filters.size(2) == shape.channels && filters.size(3) == kernel && filters.size(4) == kernel &&
                      is_like(filters, features[0]);
    STD_TORCH_CHECK(fits && filters.stride(2) == 1 && filters.stride(4) == shape.channels &&
                        filters.stride(3) == kernel * shape.channels &&
                        filters.stride(1) == kernel * kernel * shape.channels &&
                        filters.stride(0) == outputs * filters.stride(1) &&
                        reinterpret_cast<uintptr_t>(filters.const_data_ptr()) % 16 == 0,
                    "align_conv: the weight of level ", l, " must be [", aspects, ", ", outputs, ", ", shape.channels,
                    ", ", kernel, ", ", kernel, "] like the features, with channels innermost in memory.");
    STD_TORCH_CHECK(bias[l].numel() == aspects * outputs && is_like(bias[l], features[0]),
                    "align_conv: the bias of level ", l, " must be [", aspects, ", ", outputs, "] like the features.");
    offsets.push_back(torch::stable::contiguous(bias[l]));
  }
  const Tensor output = torch::stable::new_empty(features[0], {rows.numel(), outputs});
  if (output.numel() == 0) return output;
  const DeviceInputs inputs = device_inputs(shape, features, strides, boxes, rows);
  by_device_type(features[0].scalar_type(),
                 [&](auto type) { run<decltype(type)>(inputs, shape, weight, offsets, output); });
  return output;
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CUDA, m) { m.impl("align_conv", TORCH_BOX(&refinedet::align_conv)); }
