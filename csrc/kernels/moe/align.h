#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vllm_b200 {

constexpr int kMaxAlignedExperts = 512;

// See vllm_b200_plugin/ops/moe_align.py.
struct MoeAlignParams {
  const void* topk_ids;       // [num_ids]
  const int32_t* expert_map;  // [num_experts], or null
  int32_t* sorted_ids;        // [max_sorted]
  int32_t* block_experts;     // [max_blocks]
  int32_t* num_sorted;        // [1]
  int32_t* scatter_ids;       // [num_ids], or null
  int64_t num_ids;
  int64_t max_sorted;
  int64_t max_blocks;
  int32_t num_experts;
  int32_t block_size;
  bool wide_ids;  // int64 instead of int32
  bool pdl;
};

// Positions of the ids, sorted by expert, every expert's padded to whole blocks.
cudaError_t moe_align(const MoeAlignParams& params, cudaStream_t stream);

struct BatchedMoeAlignParams {
  const int32_t* num_tokens;  // [num_batches], valid ones of each batch
  int32_t* sorted_ids;        // [num_batches * blocks_per_batch * block_size]
  int32_t* block_experts;     // [num_batches * blocks_per_batch]
  int32_t* num_sorted;        // [1]
  int32_t num_batches;
  int32_t max_tokens;  // of a batch
  int32_t blocks_per_batch;
  int32_t block_size;
  bool pdl;
};

// The same where the tokens of every expert lie in a batch of their own.
cudaError_t batched_moe_align(const BatchedMoeAlignParams& params, cudaStream_t stream);

}  // namespace vllm_b200
