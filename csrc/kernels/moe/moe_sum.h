#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "topk.h"

namespace vllm_b200 {

// See vllm_b200_plugin/ops/moe_sum.py. Strides in elements.
struct MoeSumParams {
  const void* x;  // [num_tokens, topk, hidden_size], hidden_size contiguous
  void* out;      // [num_tokens, hidden_size], contiguous
  FloatType type;
  int64_t num_tokens;
  int32_t topk;
  int32_t hidden_size;
  int64_t x_stride_token, x_stride_k;
  const void* topk_ids;       // [num_tokens, topk], or null: all experts count
  const int32_t* expert_map;  // or null
  IndexType id_type;
  int64_t id_stride_token, id_stride_k;
  bool pdl;
};

// out = sum of x over topk, in fp32, without those whose expert is negative (after the map).
// x, out and their rows must be 16-byte aligned, hidden_size a multiple of 16 bytes.
cudaError_t moe_sum(const MoeSumParams& params, cudaStream_t stream);

}  // namespace vllm_b200
