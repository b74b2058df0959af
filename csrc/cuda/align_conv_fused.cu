// torch.ops.refinedet.align_conv on a GPU: order the rows and pack the filters, then one launch for all groups. The
// host never waits, and the number of launches is fixed, so that it can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>

#include "cuda/align_conv_fused.h"
#include "cuda/align_conv_order.h"
#include "cuda/align_conv_tensors.h"
#include "cuda/launch.h"

namespace refinedet {
namespace {

struct PackArguments {
  const void* weight[kMaxLevels];
  void* packed;
  int32_t outputs, taps, output_tiles, padded_channels;
  int64_t level_numbers;  // packed numbers of one level
};

// The first blocks count rows by group; the others pack filters.
template <typename T>
__global__ void prepare_kernel(const __grid_constant__ DeviceLevels levels, const __grid_constant__ PackArguments pack,
                               const int64_t* index, int64_t num_rows, int64_t count_blocks, int32_t num_groups,
                               int32_t* counts) {
  __shared__ int32_t found[kMaxGroups];
  if (blockIdx.x < count_blocks) {
    if (threadIdx.x < kMaxGroups) found[threadIdx.x] = 0;
    __syncthreads();
    const int32_t group = group_of(levels, index, int64_t(blockIdx.x) * kOrderRows + threadIdx.x, num_rows);
    if (group >= 0) atomicAdd(&found[group], 1);
    __syncthreads();
    if (threadIdx.x < num_groups) counts[int64_t(blockIdx.x) * num_groups + threadIdx.x] = found[threadIdx.x];
    return;
  }
  const int64_t step = (int64_t(gridDim.x) - count_blocks) * blockDim.x;
  for (int64_t item = (blockIdx.x - count_blocks) * blockDim.x + threadIdx.x;
       item < levels.num_levels * pack.level_numbers; item += step) {
    const int32_t level = static_cast<int32_t>(item / pack.level_numbers);
    pack_filter(static_cast<const T*>(pack.weight[level]), level, levels.aspects, pack.outputs, levels.channels,
                pack.taps, pack.output_tiles, pack.padded_channels, item - level * pack.level_numbers,
                static_cast<T*>(pack.packed));
  }
}

__global__ void scan_kernel(int32_t* counts, int64_t num_blocks, int32_t num_groups, int32_t* group_start) {
  __shared__ int32_t totals[kMaxGroups];
  if (threadIdx.x < num_groups) totals[threadIdx.x] = scan_counts(counts, num_blocks, num_groups, threadIdx.x);
  __syncthreads();
  if (threadIdx.x != 0) return;
  int32_t start = 0;
  for (int32_t group = 0; group < num_groups; ++group) {
    group_start[group] = start;
    start += totals[group];
  }
  group_start[num_groups] = start;
}

// Empty rows, which no tile will compute, get their zeros here.
template <typename T>
__global__ void order_kernel(const __grid_constant__ DeviceLevels levels, const int64_t* index, int64_t num_rows,
                             int32_t num_groups, const int32_t* before, const int32_t* group_start, int32_t outputs,
                             int32_t* order, T* output) {
  __shared__ int32_t groups[kOrderRows];
  const int64_t row = int64_t(blockIdx.x) * kOrderRows + threadIdx.x;
  groups[threadIdx.x] = group_of(levels, index, row, num_rows);
  __syncthreads();
  if (row >= num_rows) return;
  if (groups[threadIdx.x] < 0) {
    for (int32_t o = 0; o < outputs; ++o) output[row * outputs + o] = T(0.0f);
    return;
  }
  order[place_in_order(groups, before + int64_t(blockIdx.x) * num_groups, group_start, threadIdx.x)] =
      static_cast<int32_t>(row);
}

template <typename T>
__global__ void __launch_bounds__(kFusedThreads, 2)
    fused_kernel(const __grid_constant__ DeviceLevels levels, const __grid_constant__ FusedArguments arguments) {
  extern __shared__ __align__(16) unsigned char memory[];
  const FusedShared<T> shared{memory};
  const FusedTile tile = find_tile(arguments, blockIdx.x, blockIdx.y);
  if (tile.group < 0) return;
  const int thread = threadIdx.x, taps = levels.kernel * levels.kernel;
  const int num_stages = taps * arguments.stages_per_tap;
  FusedThread state;
  TileSums<T> sums;
  begin_tile(levels, arguments, tile, shared, thread, state);
  fetch_filters(arguments, tile, taps, 0, shared, 0, thread);
  __syncthreads();
  fetch_samples(levels, tile, arguments.stages_per_tap, shared, 0, thread, state);
  store_samples(shared, 0, thread, state);
  wait_for_filters();
  __syncthreads();
  for (int stage = 0; stage < num_stages; ++stage) {
    const int buffer = stage % 2, next = stage + 1;
    if (next < num_stages) {
      fetch_filters(arguments, tile, taps, next, shared, 1 - buffer, thread);
      fetch_samples(levels, tile, arguments.stages_per_tap, shared, next, thread, state);
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
  const int64_t num_rows = output.size(0);
  const int32_t num_groups = shape.num_levels * shape.aspects, taps = shape.kernel * shape.kernel;
  const int64_t count_blocks = (num_rows + kOrderRows - 1) / kOrderRows;
  constexpr int32_t kStageChannels = kStageBytes / sizeof(T);
  const int32_t stages = static_cast<int32_t>((shape.channels + kStageChannels - 1) / kStageChannels);
  const int32_t output_tiles = static_cast<int32_t>((shape.outputs + kTileOutputs - 1) / kTileOutputs);

  PackArguments pack{};
  pack.outputs = static_cast<int32_t>(shape.outputs);
  pack.taps = taps;
  pack.output_tiles = output_tiles;
  pack.padded_channels = stages * kStageChannels;
  pack.level_numbers = int64_t(shape.aspects) * taps * output_tiles * kTileOutputs * pack.padded_channels;
  FusedArguments arguments{};
  std::vector<Tensor> kept;  // contiguous filters and biases
  for (int l = 0; l < shape.num_levels; ++l) {
    kept.push_back(torch::stable::contiguous(weight[l]));
    pack.weight[l] = kept.back().const_data_ptr();
    kept.push_back(torch::stable::contiguous(bias[l]));
    arguments.bias[l] = kept.back().const_data_ptr();
  }
  const Tensor packed = torch::stable::new_empty(output, {shape.num_levels * pack.level_numbers});
  pack.packed = packed.mutable_data_ptr();
  // [order of the rows | counts of the blocks | starts of the groups]
  const Tensor numbers =
      torch::stable::new_empty(inputs.index, {num_rows + count_blocks * num_groups + num_groups + 1}, ScalarType::Int);
  int32_t* order = static_cast<int32_t*>(numbers.mutable_data_ptr());
  int32_t* counts = order + num_rows;
  int32_t* group_start = counts + count_blocks * num_groups;
  const int64_t* index = static_cast<const int64_t*>(inputs.index.const_data_ptr());
  T* to = static_cast<T*>(output.mutable_data_ptr());

  const unsigned pack_blocks = 1024;
  prepare_kernel<T><<<static_cast<unsigned>(count_blocks) + pack_blocks, kOrderRows, 0, scope.stream()>>>(
      inputs.levels, pack, index, num_rows, count_blocks, num_groups, counts);
  REFINEDET_CUDA_CHECK(cudaGetLastError());
  scan_kernel<<<1, kMaxGroups, 0, scope.stream()>>>(counts, count_blocks, num_groups, group_start);
  REFINEDET_CUDA_CHECK(cudaGetLastError());
  order_kernel<T><<<static_cast<unsigned>(count_blocks), kOrderRows, 0, scope.stream()>>>(
      inputs.levels, index, num_rows, num_groups, counts, group_start, pack.outputs, order, to);
  REFINEDET_CUDA_CHECK(cudaGetLastError());

  arguments.boxes = static_cast<const float*>(inputs.boxes.const_data_ptr());
  arguments.index = index;
  arguments.order = order;
  arguments.group_start = group_start;
  arguments.filters = pack.packed;
  arguments.output = to;
  arguments.outputs = pack.outputs;
  arguments.output_tiles = output_tiles;
  arguments.num_groups = num_groups;
  arguments.stages_per_tap = stages;
  const int bytes = FusedShared<T>::size(shape.kernel);
  REFINEDET_CUDA_CHECK(cudaFuncSetAttribute(fused_kernel<T>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  // Every group may end with a tile that is not full; blocks beyond the last tile return at once.
  const dim3 grid(static_cast<unsigned>((num_rows + kTileRows - 1) / kTileRows + num_groups),
                  static_cast<unsigned>(output_tiles));
  fused_kernel<T><<<grid, kFusedThreads, bytes, scope.stream()>>>(inputs.levels, arguments);
  REFINEDET_CUDA_CHECK(cudaGetLastError());
}

Tensor align_conv(std::vector<Tensor> features, std::vector<int64_t> strides, Tensor boxes, Tensor index,
                  std::vector<Tensor> weight, std::vector<Tensor> bias) {
  const AlignConvShape shape = check_align_conv(features, strides, boxes, index, weight, bias);
  STD_TORCH_CHECK(shape.num_levels * shape.aspects <= kMaxGroups, "align_conv: at most ", kMaxGroups,
                  " pairs of level and aspect are possible on a GPU, received ", shape.num_levels * shape.aspects, ".");
  const Tensor output = torch::stable::new_empty(features[0], {index.numel(), shape.outputs});
  if (index.numel() == 0) return output;
  const DeviceInputs inputs = device_inputs(shape, features, strides, boxes, index);
  switch (features[0].scalar_type()) {
    case ScalarType::Float:
      run<float>(inputs, shape, weight, bias, output);
      break;
    case ScalarType::BFloat16:
      run<__nv_bfloat16>(inputs, shape, weight, bias, output);
      break;
    case ScalarType::Half:
      run<__half>(inputs, shape, weight, bias, output);
      break;
    default:
      STD_TORCH_CHECK(false, "align_conv: features must be float32, bfloat16 or float16 on a GPU.");
  }
  return output;
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CUDA, m) { m.impl("align_conv", TORCH_BOX(&refinedet::align_conv)); }
