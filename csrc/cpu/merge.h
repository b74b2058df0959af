// What the merging kernels of every instruction set offer; merge.cpp chooses one.
#pragma once

#include <cstdint>

namespace refinedet {

struct MergeRule {
  float iou = 0;              // overlap from which boxes meet
  float sigma = 0;            // of Gaussian soft-NMS
  float score_threshold = 0;  // lowered scores below it are dropped
  bool gaussian = false;      // soft-NMS: Gaussian, not linear
  bool soft = false;          // voting: keep the voters, lowered
  bool plus_one = false;      // corners are inclusive pixels: a side is x2 - x1 + 1
  int64_t num_looks = 1;      // weighted box fusion: passes over the image
};

// The boxes of one class in one image.
struct MergeGroup {
  const float* boxes;      // [N, 4] of all groups, xyxy
  const float* scores;     // [N]
  const int64_t* members;  // [count] ascending
  int64_t count;
};

// Where a group's results go; `index` for what keeps boxes, `boxes` for what makes new ones.
struct MergeOutput {
  int64_t* index;
  float* boxes;
  float* scores;
};

// Each returns the number of results, at most `count`; `vote` at most twice that.
struct MergeKernels {
  int64_t (*nms)(const MergeGroup&, const MergeRule&, const MergeOutput&);
  int64_t (*soft_nms)(const MergeGroup&, const MergeRule&, const MergeOutput&);
  int64_t (*vote)(const MergeGroup&, const MergeRule&, const MergeOutput&);
  int64_t (*fuse)(const MergeGroup&, const MergeRule&, const MergeOutput&);
};

extern const MergeKernels kMergeBaseline;
extern const MergeKernels kMergeAvx2;

}  // namespace refinedet
