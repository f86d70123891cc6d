#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Weak, because CPU torch lacks it and the library has to load there too. The
// headers declare it only for a CUDA build of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace vllm_b200 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline cudaStream_t current_stream(int32_t device_index) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_index, &stream) == 0, "no CUDA stream for device ",
                  device_index);
  return static_cast<cudaStream_t>(stream);
}

// Elements from the tensor's first one to the end of its storage.
inline int64_t elements_to_storage_end(const Tensor& tensor) {
  int64_t bytes = 0;
  STD_TORCH_CHECK(aoti_torch_get_storage_size(tensor.get(), &bytes) == 0, "tensor has no storage");
  return bytes / static_cast<int64_t>(tensor.element_size()) - tensor.storage_offset();
}

inline void check_launch(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

}  // namespace vllm_b200
