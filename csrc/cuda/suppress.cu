// torch.ops.refinedet.suppress on a GPU: greedy NMS of each image of a batch, an image a block. The host never waits,
// and all shapes are known beforehand, so that it can be captured in a CUDA graph.
#include <torch/csrc/stable/library.h>

#include "cuda/launch.h"
#include "suppress.h"
#include "suppress_checks.h"

namespace refinedet {
namespace {

constexpr int kSuppressThreads = 512;

struct SuppressArguments {
  const float *boxes, *scores;
  const int64_t* labels;
  float *kept_boxes, *kept_scores;
  int64_t *kept_labels, *counts;
  int64_t candidates, max_kept;
  float iou, score_threshold;
};

// Candidates come best first. A candidate waits for the decisions about those before it in its tile of
// kSuppressThreads; kept ones are compared with a whole tile at once.
__global__ void __launch_bounds__(kSuppressThreads) suppress_kernel(const __grid_constant__ SuppressArguments a) {
  __shared__ bool gone[kSuppressThreads];
  const float* boxes = a.boxes + blockIdx.x * a.candidates * 4;
  const float* scores = a.scores + blockIdx.x * a.candidates;
  const int64_t* labels = a.labels + blockIdx.x * a.candidates;
  float* kept_boxes = a.kept_boxes + blockIdx.x * a.max_kept * 4;
  int64_t* kept_labels = a.kept_labels + blockIdx.x * a.max_kept;
  int64_t count = 0;
  for (int64_t first = 0; first < a.candidates && count < a.max_kept; first += kSuppressThreads) {
    const int64_t mine = first + threadIdx.x;
    const bool confident = mine < a.candidates && scores[mine] > a.score_threshold;
    const float* box = boxes + (confident ? mine : 0) * 4;
    const int64_t label = confident ? labels[mine] : -1;
    bool out = !confident;
    for (int64_t k = 0; k < count && !out && a.iou < 1; ++k) {
      out = kept_labels[k] == label && box_overlap(kept_boxes + 4 * k, box) > a.iou;
    }
    gone[threadIdx.x] = out;
    __syncthreads();
    for (int i = 0; i < kSuppressThreads && count < a.max_kept; ++i) {
      if (gone[i]) continue;  // the same for all threads: it was written before the last barrier
      const int64_t winner = first + i;
      if (threadIdx.x < 4) kept_boxes[count * 4 + threadIdx.x] = boxes[winner * 4 + threadIdx.x];
      if (threadIdx.x == 4) a.kept_scores[blockIdx.x * a.max_kept + count] = scores[winner];
      if (threadIdx.x == 5) kept_labels[count] = labels[winner];
      ++count;
      if (threadIdx.x > i && !gone[threadIdx.x] && labels[winner] == label &&
          box_overlap(boxes + winner * 4, box) > a.iou) {
        gone[threadIdx.x] = true;
      }
      __syncthreads();
    }
    __syncthreads();  // before the next tile writes `gone`
  }
  if (threadIdx.x == 0) a.counts[blockIdx.x] = count;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> suppress(Tensor boxes, Tensor scores, Tensor labels, double iou,
                                                    double score_threshold, int64_t max_kept) {
  const SuppressTensors t(boxes, scores, labels, max_kept);
  if (t.batch == 0 || t.candidates == 0) return t.results();
  const LaunchScope scope(t.boxes);
  suppress_kernel<<<static_cast<unsigned>(t.batch), kSuppressThreads, 0, scope.stream()>>>(
      {t.from_boxes(), t.from_scores(), t.from_labels(), t.to_boxes(), t.to_scores(), t.to_labels(), t.to_counts(),
       t.candidates, t.max_kept, static_cast<float>(iou), static_cast<float>(score_threshold)});
  REFINEDET_CUDA_CHECK(cudaGetLastError());
  return t.results();
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CUDA, m) { m.impl("suppress", TORCH_BOX(&refinedet::suppress)); }
