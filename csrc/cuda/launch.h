// The current stream, the device guard and the checks that every launch goes through.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Weak, because a CPU build of torch has no such symbol and must load this library all the same.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

#define REFINEDET_CUDA_CHECK(expression)                                                            \
  do {                                                                                              \
    const cudaError_t error = (expression);                                                         \
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error), " in " #expression); \
  } while (false)

namespace refinedet {

// Makes the tensor's device current for as long as it lives, and holds the stream to launch on.
class LaunchScope {
 public:
  explicit LaunchScope(const torch::stable::Tensor& tensor) : guard_(tensor.get_device()) {
    STD_TORCH_CHECK(tensor.is_cuda(), "A CUDA kernel was called with tensors of another device.");
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "This torch is built without CUDA.");
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream) == 0,
                    "torch gave no current CUDA stream.");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

}  // namespace refinedet
