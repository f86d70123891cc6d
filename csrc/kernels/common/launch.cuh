#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vllm_b200 {

// With pdl, the grid may become resident while its predecessor drains, so the
// kernel must call pdl_wait() before it touches anything an earlier kernel may
// read or write, in every block. That hides the launch behind a predecessor
// that calls pdl_trigger() early; behind one that does not, it costs some
// 0.2 us in a graph (measured on an H200).
template <typename... Params, typename... Args>
cudaError_t launch_kernel(void (*kernel)(Params...), dim3 grid, dim3 block, size_t smem_bytes, cudaStream_t stream,
                          bool pdl, Args... args) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = pdl ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// Of the current device.
inline cudaError_t count_sms(int& sms) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) : error;
}

#ifdef __CUDACC__
__device__ __forceinline__ void pdl_wait() { cudaGridDependencySynchronize(); }

// Reads a launch's parameters, of which every line of the constant cache misses once: before the wait, behind the
// predecessor.
template <typename Params>
__device__ __forceinline__ void touch(const Params& params) {
  const auto* words = reinterpret_cast<const uint32_t*>(&params);
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(Params)) / 4; i += 16) asm volatile("" ::"r"(words[i]));
  asm volatile("" ::"r"(words[sizeof(Params) / 4 - 1]));
}

// Safe at any point of a kernel whose successors wait: it only lets them become resident.
__device__ __forceinline__ void pdl_trigger() { cudaTriggerProgrammaticLaunchCompletion(); }
#endif

}  // namespace vllm_b200
