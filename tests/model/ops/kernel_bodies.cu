// The bodies of the GPU kernels of AlignConv, run on the host thread by thread: test_align_conv_kernels.py compiles this
// with nvcc and compares it with the CPU kernels. Features are [B, H, W, F], contiguous.
#include <vector>

#include "cuda/align_conv_columns.h"
#include "cuda/align_conv_fused.h"
#include "cuda/align_conv_order.h"

using namespace refinedet;

struct Problem {
  int num_levels, aspects, kernel, channels, outputs;
  int64_t batch, rows;
  const int *heights, *widths, *strides;
  const void** cells;
  const float* boxes;
  const int64_t* index;
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
                       height,
                       width,
                       1.0f / static_cast<float>(problem.strides[l]),
                       static_cast<int32_t>(levels.anchors)};
    pixels += problem.batch * height * width;
    levels.anchors += int64_t(height) * width * problem.aspects;
  }
  return levels;
}

// What prepare_kernel, scan_kernel and order_kernel do.
void order_rows(const DeviceLevels& levels, const Problem& problem, std::vector<int32_t>& order,
                std::vector<int32_t>& group_start) {
  const int num_groups = levels.num_levels * levels.aspects;
  const int64_t blocks = (problem.rows + kOrderRows - 1) / kOrderRows;
  std::vector<int32_t> counts(blocks * num_groups), groups(blocks * kOrderRows);
  for (int64_t row = 0; row < blocks * kOrderRows; ++row) {
    groups[row] = group_of(levels, problem.index, row, problem.rows);
    if (groups[row] >= 0) ++counts[row / kOrderRows * num_groups + groups[row]];
  }
  group_start.assign(num_groups + 1, 0);
  for (int group = 0; group < num_groups; ++group) {
    group_start[group + 1] = group_start[group] + scan_counts(counts.data(), blocks, num_groups, group);
  }
  order.assign(problem.rows, -1);
  for (int64_t row = 0; row < problem.rows; ++row) {
    if (groups[row] < 0) continue;
    const int64_t block = row / kOrderRows;
    order[place_in_order(groups.data() + block * kOrderRows, counts.data() + block * num_groups, group_start.data(),
                         static_cast<int>(row % kOrderRows))] = static_cast<int32_t>(row);
  }
}

template <typename T>
void fused(const Problem& problem, const void** weight, const void** bias, void* output) {
  const DeviceLevels levels = make_levels(problem);
  std::vector<int32_t> order, group_start;
  order_rows(levels, problem, order, group_start);
  const int taps = problem.kernel * problem.kernel, stage_channels = kStageBytes / sizeof(T);
  const int stages = (problem.channels + stage_channels - 1) / stage_channels;
  const int tiles = (problem.outputs + kTileOutputs - 1) / kTileOutputs;
  const int64_t level_numbers = int64_t(problem.aspects) * taps * tiles * kTileOutputs * stages * stage_channels;
  std::vector<T> packed(problem.num_levels * level_numbers);
  FusedArguments arguments{};
  for (int l = 0; l < problem.num_levels; ++l) {
    arguments.bias[l] = bias[l];
    for (int64_t item = 0; item < level_numbers; ++item) {
      pack_filter(static_cast<const T*>(weight[l]), l, problem.aspects, problem.outputs, problem.channels, taps, tiles,
                  stages * stage_channels, item, packed.data());
    }
  }
  arguments.boxes = problem.boxes;
  arguments.index = problem.index;
  arguments.order = order.data();
  arguments.group_start = group_start.data();
  arguments.filters = packed.data();
  arguments.output = output;
  arguments.outputs = problem.outputs;
  arguments.output_tiles = tiles;
  arguments.num_groups = problem.num_levels * problem.aspects;
  arguments.stages_per_tap = stages;

  std::vector<uint4> memory(FusedShared<T>::size(problem.kernel) / 16 + 1);
  const FusedShared<T> shared{reinterpret_cast<unsigned char*>(memory.data())};
  const int64_t blocks = (problem.rows + kTileRows - 1) / kTileRows + arguments.num_groups;
  const auto every_thread = [](const auto& body) {
    for (int thread = 0; thread < kFusedThreads; ++thread) body(thread);
  };
  for (int64_t block = 0; block < blocks; ++block) {
    for (int output_tile = 0; output_tile < tiles; ++output_tile) {
      const FusedTile tile = find_tile(arguments, static_cast<int32_t>(block), output_tile);
      if (tile.group < 0) continue;
      std::vector<FusedThread> state(kFusedThreads);
      std::vector<TileSums<T>> sums(kFusedThreads);
      every_thread([&](int t) { begin_tile(levels, arguments, tile, shared, t, state[t]); });
      for (int stage = 0; stage < taps * stages; ++stage) {
        every_thread([&](int t) {
          fetch_filters(arguments, tile, taps, stage, shared, stage % 2, t);
          fetch_samples(levels, tile, stages, shared, stage, t, state[t]);
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
    gather_columns<T>(levels, problem.boxes, problem.index, item, static_cast<T*>(to));
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

extern "C" void run_scatter(const Problem* problem, const float* from, float* grad) {
  const DeviceLevels levels = make_levels(*problem);
  const int64_t items = problem->rows * problem->kernel * problem->kernel * (problem->channels / 4);
  for (int64_t item = 0; item < items; ++item) {
    scatter_columns(levels, problem->boxes, problem->index, from, item, grad);
  }
}

extern "C" void run_targets(const Problem* problem, int64_t* pixels, float* weights) {
  const DeviceLevels levels = make_levels(*problem);
  for (int64_t pair = 0; pair < problem->rows * problem->kernel * problem->kernel; ++pair) {
    write_targets(levels, problem->boxes, problem->index, pair, pixels, weights);
  }
}

extern "C" void run_sums(const int64_t* pixels, const int64_t* order, const float* weights, const float* from,
                         int64_t entries, int channels, float* grad) {
  for (int64_t item = 0; item < entries * (channels / 4); ++item) {
    sum_targets(pixels, order, weights, from, entries, channels, item, grad);
  }
}
