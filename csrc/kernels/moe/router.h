#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "topk.h"

namespace vllm_b200 {

constexpr int kMaxGateTokens = 32;

// logits = x weight^T, bf16 in, fp32 accumulation. See vllm_b200_plugin/ops/router.py.
struct GateParams {
  const void* x;       // [num_tokens, hidden_size] bf16, rows at multiples of 16 bytes
  const void* weight;  // [num_experts, hidden_size] bf16, likewise
  void* logits;        // [num_tokens, num_experts], contiguous
  FloatType logits_type;
  int32_t num_tokens;   // up to kMaxGateTokens
  int32_t num_experts;  // a multiple of 8, up to kMaxRoutedExperts
  int32_t hidden_size;  // a multiple of 8
  int64_t x_stride, weight_stride;
  bool pdl;
};

cudaError_t gate(const GateParams& params, cudaStream_t stream);

// The gate and the selection in one launch of one cluster, for num_experts between
// the two limits. The selection sees logits as they are stored.
constexpr int kMinFusedExperts = 32, kMaxFusedExperts = 256;
cudaError_t router(const GateParams& gate, const SelectParams& select, const SelectOutputs& out, cudaStream_t stream);

// The gate and the selection in two launches, where block_selects(select). The gate sums up slices of
// hidden_size, the selection adds them up. sums: room for kMaxGateSlices * num_tokens * num_experts.
constexpr int kMaxGateSlices = 16;
cudaError_t split_router(const GateParams& gate, const SelectParams& select, const SelectOutputs& out, float* sums,
                         cudaStream_t stream);

}  // namespace vllm_b200
