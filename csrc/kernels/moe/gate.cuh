#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "router.h"

// A small-M product for one block: kTiles * 8 experts, a slice of K. The warps
// divide the slice; mma m16n8k16 with tokens as rows and experts as columns.
// Which k a lane supplies is free as long as both operands agree, so that every
// lane reads 16 consecutive bytes of its rows.

namespace vllm_b200 {

constexpr int kStepK = 32;  // of a warp: four lanes with 8 elements each

// A load that stays before the wait that follows it: ptxas moves a read-only one behind it, a relaxed one not.
__device__ __forceinline__ void load_ahead(uint4& vector, const void* source) {
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w)
               : "l"(source));
}

// The weights of a warp's part of K, in registers: what may be read before the wait.
template <int kTiles, int kSteps>
struct GateWeights {
  uint4 data[kSteps][kTiles];

  __device__ __forceinline__ void load(const GateParams& p, int first_expert, int first_k, int end_k) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const int k = first_k + s * kStepK + lane % 4 * 8;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int expert = first_expert + t * 8 + lane / 4;
        data[s][t] = make_uint4(0, 0, 0, 0);
        if (k < end_k && expert < p.num_experts) {
          load_ahead(data[s][t], static_cast<const __nv_bfloat16*>(p.weight) + expert * p.weight_stride + k);
        }
      }
    }
  }
};

__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Adds this warp's part of K. sum[m][t]: tokens 16 * m + lane / 4 (and + 8), experts 8 * t + lane % 4 * 2 (and + 1).
template <int kTiles, int kSteps, int kTokenTiles>
__device__ __forceinline__ void gate_product(const GateParams& p, const GateWeights<kTiles, kSteps>& weights,
                                             int first_k, int end_k, float (&sum)[kTokenTiles][kTiles][4]) {
  const int lane = threadIdx.x % 32;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(p.x);
  uint4 tokens[kSteps][kTokenTiles][2];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int k = first_k + s * kStepK + lane % 4 * 8;
#pragma unroll
    for (int m = 0; m < 2 * kTokenTiles; ++m) {
      const int token = 8 * m + lane / 4;
      uint4& vector = tokens[s][m / 2][m % 2];
      vector = make_uint4(0, 0, 0, 0);
      if (k < end_k && token < p.num_tokens) vector = *reinterpret_cast<const uint4*>(x + token * p.x_stride + k);
    }
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
#pragma unroll
    for (int m = 0; m < kTokenTiles; ++m) {
      const uint4 a = tokens[s][m][0], b = tokens[s][m][1];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const uint4 w = weights.data[s][t];
        mma_bf16(sum[m][t], a.x, b.x, a.y, b.y, w.x, w.y);
        mma_bf16(sum[m][t], a.z, b.z, a.w, b.w, w.z, w.w);
      }
    }
  }
}

// The sums of a block's warps: partial [kWarps][16 * kTokenTiles][8 * kTiles] in shared memory. Behind it a barrier.
template <int kTiles, int kTokenTiles>
__device__ __forceinline__ void store_partial(float* partial, const float (&sum)[kTokenTiles][kTiles][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  constexpr int kColumns = 8 * kTiles;
  float* mine = partial + warp * 16 * kTokenTiles * kColumns;
#pragma unroll
  for (int m = 0; m < kTokenTiles; ++m) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float* at = mine + (16 * m + lane / 4) * kColumns + 8 * t + lane % 4 * 2;
      *reinterpret_cast<float2*>(at) = make_float2(sum[m][t][0], sum[m][t][1]);
      *reinterpret_cast<float2*>(at + 8 * kColumns) = make_float2(sum[m][t][2], sum[m][t][3]);
    }
  }
}

template <int kWarps>
__device__ __forceinline__ float sum_partials(const float* partial, int index, int outputs) {
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) sum += partial[w * outputs + index];
  return sum;
}

// Stores a logit and returns it as stored.
__device__ __forceinline__ float store_logit(const GateParams& p, int token, int expert, float value) {
  const int64_t at = static_cast<int64_t>(token) * p.num_experts + expert;
  if (p.logits_type == FloatType::kFloat) {
    static_cast<float*>(p.logits)[at] = value;
    return value;
  }
  const __nv_bfloat16 rounded = __float2bfloat16_rn(value);
  static_cast<__nv_bfloat16*>(p.logits)[at] = rounded;
  return __bfloat162float(rounded);
}

}  // namespace vllm_b200
