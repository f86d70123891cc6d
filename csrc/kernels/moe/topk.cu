#include "topk.h"

#include <algorithm>

#include "../common/launch.cuh"
#include "select.cuh"

// One warp a token: decode wants one round trip to memory and no barrier.

namespace vllm_b200 {
namespace {

constexpr int kMaxWarps = 4;

// Four consecutive logits as fp32; from one vector where rows start at multiples of it.
template <typename T>
__device__ __forceinline__ void load_quad(const T* source, bool aligned, int count, float (&x)[4]) {
  if (aligned && count == 4) {
    if constexpr (sizeof(T) == 4) {
      const float4 v = *reinterpret_cast<const float4*>(source);
      x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(source);
      const T* elements = reinterpret_cast<const T*>(&v);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = static_cast<float>(elements[i]);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = i < count ? static_cast<float>(source[i]) : 0.0f;
}

template <typename T, int kQuads>
__global__ void __launch_bounds__(32 * kMaxWarps) topk_kernel(const __grid_constant__ TopKParams p) {
  pdl_trigger();
  const int lane = threadIdx.x % 32, num_experts = p.select.num_experts;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const T* row = static_cast<const T*>(p.logits) + token * p.stride;
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % (4 * sizeof(T)) == 0 && p.stride % 4 == 0;
  float bias[4 * kQuads];
  load_bias<kQuads>(p.select, lane, bias);

  pdl_wait();
  if (token >= p.out.num_tokens) return;
  float x[4 * kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int first = expert_of(lane, 4 * q);
    float quad[4];
    load_quad(row + first, aligned, max(0, min(4, num_experts - first)), quad);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * q + i] = quad[i];
  }
  select_row<kQuads>(p.select, p.out, token, bias, x);
}

template <typename T, int kQuads>
cudaError_t launch(const TopKParams& p, cudaStream_t stream) {
  const int64_t tokens = p.out.num_tokens;
  const int warps = tokens <= 512 ? 1 : kMaxWarps;
  return launch_kernel(topk_kernel<T, kQuads>, dim3((tokens + warps - 1) / warps), dim3(32 * warps), 0, stream, p.pdl,
                       p);
}

template <typename T>
cudaError_t choose_quads(const TopKParams& p, cudaStream_t stream) {
  switch ((p.select.num_experts + 127) / 128) {
    case 1: return launch<T, 1>(p, stream);
    case 2: return launch<T, 2>(p, stream);
    case 3: return launch<T, 3>(p, stream);
    case 4: return launch<T, 4>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t topk(const TopKParams& params, cudaStream_t stream) {
  if (params.out.num_tokens == 0 || params.select.topk == 0) return cudaSuccess;
  switch (params.logits_type) {
    case FloatType::kFloat: return choose_quads<float>(params, stream);
    case FloatType::kHalf: return choose_quads<__half>(params, stream);
    case FloatType::kBFloat16: return choose_quads<__nv_bfloat16>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
