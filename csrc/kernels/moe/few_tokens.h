#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vllm_b200 {

constexpr int kMaxAssignments = 512;  // num_tokens * top_k
constexpr int kMaxExperts = 1024;     // on this GPU
constexpr int kMaxHiddenSize = 8192;

struct FewTokensMoeParams {
  const void* x;             // bf16 [num_tokens, hidden_size], rows at multiples of 16 bytes
  const void* w13;           // e4m3 [num_experts, 2 * intermediate_size, hidden_size], the gate's rows first
  const float* w13_scale;    // [num_experts, 2 * intermediate_size / 128, hidden_size / 128]
  const void* w2;            // e4m3 [num_experts, hidden_size, intermediate_size]
  const float* w2_scale;     // [num_experts, hidden_size / 128, intermediate_size / 128]
  const float* topk_weights; // [num_tokens, top_k]; null: 1
  const void* topk_ids;      // [num_tokens, top_k], int32 or int64
  const int32_t* expert_map; // topk_ids' experts to those here or -1, [num_global_experts]; null: they are those here
  void* hidden;              // bf16 [num_tokens, top_k, intermediate_size], written and read
  void* out;                 // bf16 [num_tokens, hidden_size]
  int32_t num_tokens, top_k, num_experts, num_global_experts;
  int32_t hidden_size, intermediate_size;  // multiples of 128
  int64_t x_stride, out_stride;            // elements
  bool ids_are_int64;
  bool up_first;  // w13's rows begin with those of the factor that has no activation function
  bool ue8m0;     // activation scales rounded up to powers of two
  bool pdl;       // launch the first kernel with programmatic stream serialization
};

// out = sum over a token's experts of weight * (silu(x w13_gate^T) * (x w13_up^T)) w2^T, with x and the hidden
// activations quantised to e4m3 in groups of 128. Ids outside [0, num_global_experts) add nothing.
// Two launches for every 16 tokens, or fewer where the shared memory is small; a row of the result depends on no other.
cudaError_t few_tokens_moe(const FewTokensMoeParams& params, cudaStream_t stream);

}  // namespace vllm_b200
