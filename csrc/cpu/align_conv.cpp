// torch.ops.refinedet.align_conv and its backward on the CPU: checks, memory, threads. The arithmetic is in
// align_conv_forward.h and align_conv_backward.h.
#include "cpu/align_conv.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <vector>

#include "align_conv_checks.h"
#include "cpu/capability.h"

namespace refinedet {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many multiplications a second thread costs more than it brings.
constexpr int64_t kWorkPerThread = 1 << 20;

// Memory of one call, freed at its end.
class Arena {
 public:
  static void* allocate(void* arena, int64_t bytes) {
    void* memory = std::aligned_alloc(64, (std::max<int64_t>(bytes, 1) + 63) / 64 * 64);
    STD_TORCH_CHECK(memory != nullptr, "align_conv: cannot allocate ", bytes, " bytes.");
    static_cast<Arena*>(arena)->blocks_.emplace_back(memory, std::free);
    return memory;
  }

 private:
  std::vector<std::unique_ptr<void, void (*)(void*)>> blocks_;
};

void run_workers(int num_workers, void (*task)(int, void*), void* context) {
  if (num_workers == 1) return task(0, context);
  torch::stable::parallel_for(0, num_workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) task(static_cast<int>(worker), context);
  });
}

const AlignConvKernels& kernels() {
#ifdef REFINEDET_X86_TARGETS
  switch (cpu_capability()) {
    case Capability::kAvx512:
      return kAlignConvAvx512;
    case Capability::kAvx2:
      return kAlignConvAvx2;
    case Capability::kBaseline:
      break;
  }
#endif
  return kAlignConvBaseline;
}

Storage storage_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    case ScalarType::Half:
      return Storage::kHalf;
    default:
      return Storage::kFloat;
  }
}

// Rows of one strip of this many rows of cells are worked on column by column: a block of 96 rows then reads a patch of
// the map that stays in the second-level cache, instead of whole lines of it.
constexpr int64_t kStripRows = 8;

struct Groups {
  std::vector<AlignConvRow> rows;
  std::vector<int64_t> start;
};

// A counting sort of the rows by (level, aspect, image, strip, x); rows that share these keep their order.
template <typename Keep>
Groups group_rows(const AlignConvShape& shape, const Tensor& index, const Keep& keep) {
  const int64_t* values = static_cast<const int64_t*>(index.const_data_ptr());
  const int64_t num_rows = index.numel(), num_groups = shape.num_levels * shape.aspects;
  std::vector<int64_t> first_key(num_groups + 1, 0);
  for (int64_t g = 0; g < num_groups; ++g) {
    const int64_t level = g / shape.aspects, strips = (shape.height[level] + kStripRows - 1) / kStripRows;
    first_key[g + 1] = first_key[g] + shape.batch * strips * shape.width[level];
  }
  std::vector<int64_t> start(first_key[num_groups] + 1, 0);
  std::vector<int64_t> keys(num_rows, -1);
  std::vector<int32_t> images(num_rows);
  int64_t image_begin = 0, image = 0;  // of the image that the rows are in
  for (int64_t row = 0; row < num_rows; ++row) {
    const int64_t value = values[row];
    STD_TORCH_CHECK(value < shape.batch * shape.anchors,
                    "align_conv: index must lie below images * anchors = ", shape.batch * shape.anchors, ", received ",
                    value, " at row ", row, ".");
    if (value < 0 || !keep(row)) continue;
    if (value < image_begin || value >= image_begin + shape.anchors) {
      image = value / shape.anchors;
      image_begin = image * shape.anchors;
    }
    int level = 0;
    while (level + 1 < shape.num_levels && value - image_begin >= shape.level_begin[level + 1]) ++level;
    // Within a level the numbers fit 32 bits, whose divisions are several times faster.
    const uint32_t anchor = static_cast<uint32_t>(value - image_begin - shape.level_begin[level]);
    const uint32_t width = shape.width[level], cell = anchor / shape.aspects, aspect = anchor % shape.aspects;
    const uint32_t y = cell / width, x = cell % width;
    const int64_t strips = (shape.height[level] + kStripRows - 1) / kStripRows;
    keys[row] = first_key[level * shape.aspects + aspect] + (image * strips + y / kStripRows) * width + x;
    images[row] = static_cast<int32_t>(image);
    ++start[keys[row] + 1];
  }
  for (size_t key = 1; key < start.size(); ++key) start[key] += start[key - 1];
  Groups groups;
  for (const int64_t key : first_key) groups.start.push_back(start[key]);
  groups.rows.resize(start.back());
  for (int64_t row = 0; row < num_rows; ++row) {
    if (keys[row] >= 0) groups.rows[start[keys[row]]++] = {static_cast<int32_t>(row), images[row]};
  }
  return groups;
}

// Everything that the problem points to, kept alive.
struct Inputs {
  std::vector<Tensor> features, weight, bias;
  Tensor boxes, index;
  AlignConvShape shape;
};

Inputs prepare(const std::vector<Tensor>& features, const std::vector<int64_t>& strides, const Tensor& boxes,
               const Tensor& index, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias) {
  Inputs inputs{{},
                {},
                {},
                torch::stable::contiguous(boxes),
                torch::stable::contiguous(index),
                check_align_conv(features, strides, boxes, index, weight, bias)};
  inputs.features = features;
  for (const Tensor& filters : weight) inputs.weight.push_back(torch::stable::contiguous(filters));
  for (const Tensor& offset : bias) inputs.bias.push_back(torch::stable::contiguous(offset));
  return inputs;
}

AlignConvProblem describe(const Inputs& inputs, const std::vector<int64_t>& strides, const Groups& groups,
                          Arena& arena) {
  const AlignConvShape& shape = inputs.shape;
  AlignConvProblem problem{};
  problem.num_levels = shape.num_levels;
  problem.aspects = shape.aspects;
  problem.kernel = shape.kernel;
  problem.batch = shape.batch;
  problem.channels = shape.channels;
  problem.outputs = shape.outputs;
  for (int l = 0; l < shape.num_levels; ++l) {
    const Tensor& feature = inputs.features[l];
    AlignConvLevel& level = problem.levels[l];
    level.cells = feature.const_data_ptr();
    level.image_step = feature.stride(0);
    level.channel_step = shape.channels == 1 ? 1 : feature.stride(1);
    level.row_step = feature.stride(2);
    level.column_step = feature.stride(3);
    level.height = shape.height[l];
    level.width = shape.width[l];
    if (level.channel_step != 1) {
      level.copy = Arena::allocate(&arena, feature.numel() * static_cast<int64_t>(feature.element_size()));
    }
    level.inverse_stride = 1.0 / static_cast<double>(strides[l]);
    level.weight = inputs.weight[l].const_data_ptr();
    level.bias = inputs.bias.empty() ? nullptr : inputs.bias[l].const_data_ptr();
  }
  problem.boxes = inputs.boxes.const_data_ptr();
  problem.boxes_double = inputs.boxes.scalar_type() == ScalarType::Double;
  problem.rows = groups.rows.data();
  problem.group_start = groups.start.data();
  const int64_t work =
      static_cast<int64_t>(groups.rows.size()) * shape.channels * shape.outputs * shape.kernel * shape.kernel;
  problem.num_workers =
      static_cast<int>(std::clamp<int64_t>(work / kWorkPerThread, 1, torch::stable::get_num_threads()));
  problem.parallel = run_workers;
  problem.allocate = Arena::allocate;
  problem.arena = &arena;
  return problem;
}

Tensor align_conv(std::vector<Tensor> features, std::vector<int64_t> strides, Tensor boxes, Tensor index,
                  std::vector<Tensor> weight, std::vector<Tensor> bias) {
  const Inputs inputs = prepare(features, strides, boxes, index, weight, bias);
  const Groups groups = group_rows(inputs.shape, inputs.index, [](int64_t) { return true; });
  Arena arena;
  AlignConvProblem problem = describe(inputs, strides, groups, arena);
  const std::vector<int64_t> size{index.numel(), inputs.shape.outputs};
  const bool full = static_cast<int64_t>(groups.rows.size()) == index.numel();  // else empty rows stay zero
  Tensor output = full ? torch::stable::new_empty(features[0], size) : torch::stable::new_zeros(features[0], size);
  problem.output = output.mutable_data_ptr();
  kernels().forward(problem, storage_of(features[0].scalar_type()));
  return output;
}

template <typename Word>
bool any_set(const void* data, int64_t row, int64_t count) {
  // Everything but the sign counts, so that -0 is zero; NaN is not.
  const Word* words = static_cast<const Word*>(data) + row * count;
  Word bits = 0;
  for (int64_t i = 0; i < count; ++i) bits |= words[i];
  return (bits & (static_cast<Word>(~Word(0)) >> 1)) != 0;
}

std::vector<Tensor> align_conv_backward(Tensor grad, std::vector<Tensor> features, std::vector<int64_t> strides,
                                        Tensor boxes, Tensor index, std::vector<Tensor> weight, bool features_grad,
                                        bool filters_grad, bool /*deterministic: the CPU kernels always are*/) {
  const Inputs inputs = prepare(features, strides, boxes, index, weight, {});
  const AlignConvShape& shape = inputs.shape;
  check_gradient(grad, features[0], index.numel(), shape.outputs);
  const Tensor grads = torch::stable::contiguous(grad);
  const void* data = grads.const_data_ptr();
  const int64_t bytes = static_cast<int64_t>(grads.element_size());
  // Mining leaves most rows without a gradient; they cost nothing.
  const Groups groups = group_rows(shape, inputs.index, [&](int64_t row) {
    return bytes == 8   ? any_set<uint64_t>(data, row, shape.outputs)
           : bytes == 4 ? any_set<uint32_t>(data, row, shape.outputs)
                        : any_set<uint16_t>(data, row, shape.outputs);
  });
  Arena arena;
  AlignConvProblem problem = describe(inputs, strides, groups, arena);
  problem.output_grad = data;
  const ScalarType type = features[0].scalar_type();
  const ScalarType sum_type = type == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  std::vector<Tensor> cells_grads, weight_grads, bias_grads;
  for (int l = 0; l < shape.num_levels; ++l) {
    if (features_grad) {
      cells_grads.push_back(torch::stable::new_zeros(
          features[l], {shape.batch, shape.height[l], shape.width[l], shape.channels}, sum_type));
      problem.levels[l].cells_grad = cells_grads[l].mutable_data_ptr();
    }
    if (filters_grad) {
      weight_grads.push_back(torch::stable::new_empty(
          weight[l], {shape.aspects, shape.outputs, shape.channels, shape.kernel, shape.kernel}));
      bias_grads.push_back(torch::stable::new_empty(weight[l], {shape.aspects, shape.outputs}));
      problem.levels[l].weight_grad = weight_grads[l].mutable_data_ptr();
      problem.levels[l].bias_grad = bias_grads[l].mutable_data_ptr();
    }
  }
  if (features_grad || filters_grad) kernels().backward(problem, storage_of(type));
  std::vector<Tensor> result;
  for (const Tensor& cells_grad : cells_grads) {
    const Tensor typed = sum_type == type ? cells_grad : torch::stable::to(cells_grad, type);
    // [B, H, W, F] -> [B, F, H, W], in channels-last memory.
    result.push_back(torch::stable::transpose(torch::stable::transpose(typed, 1, 3), 2, 3));
  }
  result.insert(result.end(), weight_grads.begin(), weight_grads.end());
  result.insert(result.end(), bias_grads.begin(), bias_grads.end());
  return result;
}

}  // namespace
}  // namespace refinedet

STABLE_TORCH_LIBRARY_IMPL(refinedet, CPU, m) {
  m.impl("align_conv", TORCH_BOX(&refinedet::align_conv));
  m.impl("align_conv_backward", TORCH_BOX(&refinedet::align_conv_backward));
}
