// Every operator of torch.ops.refinedet is declared here, and nowhere else.
//
// The kernels register themselves: cpu/*.cpp with STABLE_TORCH_LIBRARY_IMPL(refinedet, CPU, m), cuda/*.cu with
// STABLE_TORCH_LIBRARY_IMPL(refinedet, CUDA, m). What has no kernel of its own on a device is put together from those
// by model/ops. Shapes, units and errors are documented by the Python function that calls the operator.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(refinedet, m) {
  // model/ops/align_conv.py
  m.def(
      "align_conv(Tensor[] features, int[] strides, Tensor boxes, Tensor rows, Tensor[] weight, Tensor[] bias) "
      "-> Tensor");
  // Gradients of the features (where asked for), then of the weights and of the biases (where asked for), level by
  // level.
  m.def(
      "align_conv_backward(Tensor grad, Tensor[] features, int[] strides, Tensor boxes, Tensor rows, Tensor[] weight, "
      "bool features_grad, bool filters_grad, bool deterministic) -> Tensor[]");
  // model/ops/align_conv_products.py. Columns are [N, T * F]; `grad` holds the cells of all levels, [pixels, F].
  m.def(
      "align_conv_columns(Tensor[] features, int[] strides, Tensor boxes, Tensor rows, int aspects, int kernel) "
      "-> Tensor");
  m.def(
      "align_conv_scatter(Tensor(a!) grad, Tensor columns, Tensor[] features, int[] strides, Tensor boxes, "
      "Tensor rows, int aspects, int kernel) -> ()");

  // model/ops/suppress.py
  m.def(
      "suppress(Tensor boxes, Tensor scores, Tensor labels, float iou, float score_threshold, int max_kept) "
      "-> (Tensor, Tensor, Tensor, Tensor)");

  // model/ops/merge.py
  m.def("nms(Tensor boxes, Tensor scores, Tensor groups, float iou, bool plus_one) -> Tensor");
  m.def(
      "soft_nms(Tensor boxes, Tensor scores, Tensor groups, float iou, float sigma, float score_threshold, "
      "bool gaussian, bool plus_one) -> (Tensor, Tensor)");
  m.def(
      "box_vote(Tensor boxes, Tensor scores, Tensor groups, float iou, float score_threshold, bool soft, "
      "bool plus_one) -> (Tensor, Tensor, Tensor)");
  m.def(
      "weighted_box_fusion(Tensor boxes, Tensor scores, Tensor groups, int num_views, float iou, "
      "float score_threshold, bool plus_one) -> (Tensor, Tensor, Tensor)");
}

// "CUDA compiler:architectures" (empty without CUDA), the C++ compiler, the oldest torch it loads on, and the version
// of the operators: raise it, and VERSION of model/ops/library.py, with every change of what they take or give.
extern "C" __attribute__((visibility("default"))) const char* refinedet_build_info() {
  return REFINEDET_BUILT_CUDA "|" REFINEDET_COMPILER "|2.11|2";
}
