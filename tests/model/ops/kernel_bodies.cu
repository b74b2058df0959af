// The bodies of the GPU kernels of AlignConv, run on the host thread by thread: test_align_conv_kernels.py compiles this
// with nvcc and compares it with the CPU kernels. Features are [B, H, W, F], contiguous.
#include <vector>

#include "cuda/align_conv_columns.h"
#include "cuda/align_conv_fused.h"

using namespace refinedet;

struct Problem {
  int num_levels, aspects, kernel, channels, outputs;
  int64_t batch, rows;
  const int *heights, *widths, *strides;
  const void** cells;
  const float* boxes;
  const int64_t* rows_in_order;
};

namespace {

DeviceLevels make_levels(const Problem& problem) {
  DeviceLevels levels{};
  levels.num_levels = problem.num_levels;
  levels.aspects = problem.aspects;
  levels.kernel = problem.kernel;
  levels.channels = problem.channels;
  levels.batch = problem.batch;
  int64_t pixels = 0;
  for (int l = 0; l < problem.num_levels; ++l) {
    const int height = problem.heights[l], width = problem.widths[l];
    levels.level[l] = {problem.cells[l],
                       int64_t(height) * width * problem.channels,
                       int64_t(width) * problem.channels,
                       problem.channels,
                       pixels,
                       pixels * problem.aspects,
                       height * width,
                       height,
                       width,
                       1.0f / static_cast<float>(problem.strides[l])};
    pixels += problem.batch * height * width;
  }
  return levels;
}

template <typename T>
void fused(const Problem& problem, const void** weight, const void** bias, void* output) {
  const DeviceLevels levels = make_levels(problem);
  const int taps = problem.kernel * problem.kernel, part_channels = kStageBytes / sizeof(T);
  FusedArguments arguments{};
  for (int l = 0; l < problem.num_levels; ++l) {
    arguments.filters[l] = weight[l];
    arguments.bias[l] = bias[l];
  }
  arguments.boxes = problem.boxes;
  arguments.rows = problem.rows_in_order;
  arguments.num_rows = problem.rows;
  arguments.output = output;
  arguments.outputs = problem.outputs;
  arguments.num_groups = problem.num_levels * problem.aspects;
  arguments.parts = (problem.channels + part_channels - 1) / part_channels;

  std::vector<uint4> memory(FusedShared<T>::size(problem.kernel) / 16 + 1);
  const FusedShared<T> shared{reinterpret_cast<unsigned char*>(memory.data())};
  int32_t starts[kMaxGroups + 1];
  const int64_t blocks = (problem.rows + kTileRows - 1) / kTileRows + arguments.num_groups + 1;
  const auto every_thread = [](const auto& body) {
    for (int thread = 0; thread < kFusedThreads; ++thread) body(thread);
  };
  every_thread([&](int t) { find_starts(levels, arguments, t, starts); });
  for (int64_t block = 0; block < blocks; ++block) {
    for (int part = 0; part * kTileOutputs < problem.outputs; ++part) {
      const FusedTile tile = find_tile(arguments, starts, static_cast<int32_t>(block), part);
      if (tile.group < 0) continue;
      if (tile.group == arguments.num_groups) {
        every_thread([&](int t) { end_tile(levels, arguments, tile, shared, t); });
        continue;
      }
      std::vector<FusedThread> state(kFusedThreads);
      std::vector<TileSums<T>> sums(kFusedThreads);
      every_thread([&](int t) { begin_tile(levels, arguments, tile, shared, t, state[t]); });
      for (int stage = 0; stage < taps * arguments.parts; ++stage) {
        every_thread([&](int t) {
          fetch_filters(levels, arguments, tile, stage, shared, stage % 2, t);
          fetch_samples(levels, tile, shared, stage, t, state[t]);
          store_samples(shared, stage % 2, t, state[t]);
        });
        every_thread([&](int t) { sums[t].multiply(shared, stage % 2, t); });
      }
      every_thread([&](int t) { sums[t].store(shared, t); });
      every_thread([&](int t) { end_tile(levels, arguments, tile, shared, t); });
    }
  }
}

template <typename T>
void columns(const Problem& problem, void* to) {
  const DeviceLevels levels = make_levels(problem);
  const int64_t items = problem.rows * problem.kernel * problem.kernel * (problem.channels / Chunk<T>::kCount);
  for (int64_t item = 0; item < items; ++item) {
    gather_columns<T>(levels, problem.boxes, problem.rows_in_order, item, static_cast<T*>(to));
  }
}

template <typename T>
void scatter(const Problem& problem, const void* from, float* grad) {
  const DeviceLevels levels = make_levels(problem);
  const int64_t items = problem.rows * problem.kernel * problem.kernel * (problem.channels / Chunk<T>::kCount);
  for (int64_t item = 0; item < items; ++item) {
    scatter_columns<T>(levels, problem.boxes, problem.rows_in_order, static_cast<const T*>(from), item, grad);
  }
}

}  // namespace

// dtype: 0 fp32, 1 bf16, 2 fp16.
extern "C" void run_fused(const Problem* problem, int dtype, const void** weight, const void** bias, void* output) {
  if (dtype == 0) fused<float>(*problem, weight, bias, output);
  if (dtype == 1) fused<__nv_bfloat16>(*problem, weight, bias, output);
  if (dtype == 2) fused<__half>(*problem, weight, bias, output);
}

extern "C" void run_columns(const Problem* problem, int dtype, void* to) {
  if (dtype == 0) columns<float>(*problem, to);
  if (dtype == 1) columns<__nv_bfloat16>(*problem, to);
  if (dtype == 2) columns<__half>(*problem, to);
}

extern "C" void run_scatter(const Problem* problem, int dtype, const void* from, float* grad) {
  if (dtype == 0) scatter<float>(*problem, from, grad);
  if (dtype == 1) scatter<__nv_bfloat16>(*problem, from, grad);
  if (dtype == 2) scatter<__half>(*problem, from, grad);
}
