// The overlap that decides whether one detection suppresses another, on both devices.
#pragma once

#include "align_conv_geometry.h"

namespace refinedet {

// IoU as torchvision computes it; of two boxes without area NaN, which exceeds no threshold.
REFINEDET_BOTH float box_overlap(const float* a, const float* b) {
  const float left = a[0] > b[0] ? a[0] : b[0], top = a[1] > b[1] ? a[1] : b[1];
  const float right = a[2] < b[2] ? a[2] : b[2], bottom = a[3] < b[3] ? a[3] : b[3];
  const float width = right > left ? right - left : 0.0f, height = bottom > top ? bottom - top : 0.0f;
  const float shared = width * height;
  const float area_a = (a[2] - a[0]) * (a[3] - a[1]), area_b = (b[2] - b[0]) * (b[3] - b[1]);
  return shared / (area_a + area_b - shared);
}

}  // namespace refinedet
