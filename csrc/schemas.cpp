// Every operator of torch.ops.refinedet is declared here, and nowhere else.
//
// The kernels register themselves: cpu/*.cpp with STABLE_TORCH_LIBRARY_IMPL(refinedet, CPU, m), cuda/*.cu with
// STABLE_TORCH_LIBRARY_IMPL(refinedet, CUDA, m). Shapes, units and errors are documented by the Python function of
// model/ops that calls the operator.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(refinedet, m) {
  // model/ops/align_conv.py
  m.def(
      "align_conv(Tensor[] features, int[] strides, Tensor boxes, Tensor index, Tensor[] weight, Tensor[] bias) "
      "-> Tensor");
  // Gradients of the features (where asked for), then of the weights and of the biases (where asked for), level by level.
  m.def(
      "align_conv_backward(Tensor grad, Tensor[] features, int[] strides, Tensor boxes, Tensor index, Tensor[] weight, "
      "bool features_grad, bool filters_grad, bool deterministic) -> Tensor[]");

  // model/ops/merge.py
}

// "CUDA compiler;architectures" (empty without CUDA), the C++ compiler, and the oldest torch it loads on.
extern "C" __attribute__((visibility("default"))) const char* refinedet_build_info() {
  return REFINEDET_BUILT_CUDA "|" REFINEDET_COMPILER "|2.11";
}
