// What the CPU kernels of AlignConv work on: plain pointers, so that they can be compiled once per instruction set.
//
// Legend: B images, F channels, H W cells of a level, N rows (anchors that are computed), K kernel side, T = K * K
// taps, O outputs. A group is one aspect of one level: the rows that share filters.
#pragma once

#include <cstdint>

#include "align_conv_geometry.h"

namespace refinedet {

enum class Storage { kFloat, kDouble, kBFloat16, kHalf };

struct AlignConvLevel {
  // The features; steps in elements. Where channel_step is not 1 the kernels copy them to `copy` and read that.
  const void* cells;
  int64_t image_step, channel_step, row_step, column_step;
  void* copy;  // [B, H, W, F], contiguous; null where it is not needed
  int32_t height, width;
  double inverse_stride;
  const void* weight;  // [aspects, O, F, T], contiguous
  const void* bias;    // [aspects, O], contiguous
  // Gradients; null where not asked for.
  void* cells_grad;   // [B, H, W, F], contiguous, in the accumulation type, zeroed
  void* weight_grad;  // [aspects, O, F, T], contiguous
  void* bias_grad;    // [aspects, O], contiguous
};

struct AlignConvRow {
  int32_t row;  // of boxes and output
  int32_t image;
};

struct AlignConvProblem {
  int num_levels, aspects, kernel;
  int64_t batch, channels, outputs;
  AlignConvLevel levels[kMaxLevels];
  const void* boxes;  // [N, 4], float or double
  bool boxes_double;
  // Rows sorted by (level, aspect, image, place); group g holds rows[group_start[g] .. group_start[g + 1]).
  const AlignConvRow* rows;
  const int64_t* group_start;  // [num_levels * aspects + 1]
  void* output;                // [N, O]
  const void* output_grad;     // [N, O]
  // Runs task(worker, context) for every worker in [0, num_workers), each on a thread of its own where there is one.
  void (*parallel)(int num_workers, void (*task)(int worker, void* context), void* context);
  int num_workers;
  // 64-byte aligned memory; freed by the caller.
  void* (*allocate)(void* arena, int64_t bytes);
  void* arena;
};

// Each instruction set has one of these; the gradients asked for are those whose pointers are set.
struct AlignConvKernels {
  void (*forward)(AlignConvProblem&, Storage);
  void (*backward)(AlignConvProblem&, Storage);
};

extern const AlignConvKernels kAlignConvBaseline;
extern const AlignConvKernels kAlignConvAvx2;
extern const AlignConvKernels kAlignConvAvx512;

}  // namespace refinedet
