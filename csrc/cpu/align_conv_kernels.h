// Defines REFINEDET_KERNELS, the kernels of one instruction set. Included once by each file that is compiled for one.
#include "cpu/align_conv_backward.h"

namespace refinedet {
namespace {

void forward_any(AlignConvProblem& problem, Storage storage) {
  switch (storage) {
    case Storage::kFloat:
      return forward<float, float>(problem);
    case Storage::kDouble:
      return forward<double, double>(problem);
    case Storage::kBFloat16:
      return forward<float, BFloat16>(problem);
    case Storage::kHalf:
      return forward<float, Half>(problem);
  }
}

void backward_any(AlignConvProblem& problem, Storage storage) {
  switch (storage) {
    case Storage::kFloat:
      return backward<float, float>(problem);
    case Storage::kDouble:
      return backward<double, double>(problem);
    case Storage::kBFloat16:
      return backward<float, BFloat16>(problem);
    case Storage::kHalf:
      return backward<float, Half>(problem);
  }
}

}  // namespace

extern const AlignConvKernels REFINEDET_KERNELS = {forward_any, backward_any};

}  // namespace refinedet
