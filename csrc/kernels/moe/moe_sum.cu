#include "moe_sum.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "../common/launch.cuh"

namespace vllm_b200 {
namespace {

constexpr int kMaxThreads = 128;
constexpr int64_t kMaxGridY = 65535;

template <typename T>
constexpr int kVector = 16 / sizeof(T);

template <typename T>
__device__ __forceinline__ void add(float (&sum)[kVector<T>], uint4 vector) {
  const T* values = reinterpret_cast<const T*>(&vector);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) sum[i] += static_cast<float>(values[i]);
}

__device__ __forceinline__ bool is_left_out(const MoeSumParams& p, int64_t token, int k) {
  if (!p.topk_ids) return false;
  const int64_t at = token * p.id_stride_token + k * p.id_stride_k;
  const int64_t id = p.id_type == IndexType::kInt64 ? static_cast<const int64_t*>(p.topk_ids)[at]
                                                    : static_cast<const int32_t*>(p.topk_ids)[at];
  return id < 0 || (p.expert_map && p.expert_map[id] < 0);
}

// A thread has 16 bytes of the output of a token. kTopK 0: known at run time only.
template <typename T, int kTopK>
__global__ void __launch_bounds__(kMaxThreads) moe_sum_kernel(const __grid_constant__ MoeSumParams p) {
  pdl_trigger();
  const int column = (blockIdx.x * blockDim.x + threadIdx.x) * kVector<T>;
  const int topk = kTopK ? kTopK : p.topk;
  pdl_wait();
  if (column >= p.hidden_size) return;

  for (int64_t token = blockIdx.y; token < p.num_tokens; token += gridDim.y) {
    const T* x = static_cast<const T*>(p.x) + token * p.x_stride_token + column;
    float sum[kVector<T>] = {};
    if constexpr (kTopK > 0) {
      uint4 vector[kTopK];
#pragma unroll
      for (int k = 0; k < kTopK; ++k) {
        // What is left out was never written: it must not be read as a number.
        vector[k] = is_left_out(p, token, k) ? make_uint4(0, 0, 0, 0)
                                             : *reinterpret_cast<const uint4*>(x + k * p.x_stride_k);
      }
#pragma unroll
      for (int k = 0; k < kTopK; ++k) add<T>(sum, vector[k]);
    } else {
      for (int k = 0; k < topk; ++k) {
        if (!is_left_out(p, token, k)) add<T>(sum, *reinterpret_cast<const uint4*>(x + k * p.x_stride_k));
      }
    }
    uint4 packed;
    T* result = reinterpret_cast<T*>(&packed);
#pragma unroll
    for (int j = 0; j < kVector<T>; ++j) result[j] = static_cast<T>(sum[j]);
    *reinterpret_cast<uint4*>(static_cast<T*>(p.out) + token * p.hidden_size + column) = packed;
  }
}

template <typename T, int kTopK>
cudaError_t launch(const MoeSumParams& p, cudaStream_t stream) {
  const int vectors = p.hidden_size / kVector<T>;
  // Few tokens: small blocks on many SMs.
  const int threads = p.num_tokens < 64 ? 32 : kMaxThreads;
  const dim3 grid((vectors + threads - 1) / threads, std::min(p.num_tokens, kMaxGridY));
  return launch_kernel(moe_sum_kernel<T, kTopK>, grid, dim3(threads), 0, stream, p.pdl, p);
}

template <typename T>
cudaError_t choose_topk(const MoeSumParams& p, cudaStream_t stream) {
  switch (p.topk) {
    case 1: return launch<T, 1>(p, stream);
    case 2: return launch<T, 2>(p, stream);
    case 4: return launch<T, 4>(p, stream);
    case 6: return launch<T, 6>(p, stream);
    case 8: return launch<T, 8>(p, stream);
    case 10: return launch<T, 10>(p, stream);
    default: return launch<T, 0>(p, stream);
  }
}

}  // namespace

cudaError_t moe_sum(const MoeSumParams& params, cudaStream_t stream) {
  if (params.num_tokens == 0 || params.hidden_size == 0) return cudaSuccess;
  switch (params.type) {
    case FloatType::kFloat: return choose_topk<float>(params, stream);
    case FloatType::kHalf: return choose_topk<__half>(params, stream);
    case FloatType::kBFloat16: return choose_topk<__nv_bfloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
