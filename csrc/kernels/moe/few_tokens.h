#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../quant/token_quant.h"

namespace vllm_b200 {

constexpr int kMaxAssignments = 512;  // num_tokens * top_k
constexpr int kMaxExperts = 1024;     // on this GPU
constexpr int kMaxHiddenSize = 8192;
constexpr int kNvFp4TileBytes = 1152;  // of 16 rows by 128 columns, see few_tokens_nvfp4.cuh

// What the weights are and how the activations are quantised for their products.
enum class ExpertFormat {
  kBf16,          // bf16 weights; activations as they are
  kFp8Block,      // e4m3 with scales of 128x128 blocks; activations in groups of 128
  kFp8BlockPow2,  // the same with activation scales rounded up to powers of two
  kFp8Token,      // e4m3 with a scale for each row or expert; activations by token
  kFp8Tensor,     // the same; one scale for all activations: the given one, or that of the largest of them
  kInt8Token,     // as kFp8Token in int8
  kNvFp4,         // NVFP4 in tiles of few_tokens_nvfp4.cuh and a global scale for each expert; activations as they are
};

struct FewTokensMoeParams {
  const void* x;             // bf16 [num_tokens, hidden_size], rows at multiples of 16 bytes
  const void* w13;           // [num_experts, 2 * intermediate_size, hidden_size], the gate's rows first
                             // kNvFp4: [num_experts, intermediate_size / 8, hidden_size / 128, kNvFp4TileBytes]
  const float* w13_scale;    // blocks: [num_experts, 2 * intermediate_size / 128, hidden_size / 128]
                             // rows: [num_experts, 2 * intermediate_size], experts and kNvFp4: [num_experts]
  const void* w2;            // [num_experts, hidden_size, intermediate_size]
                             // kNvFp4: [num_experts, hidden_size / 16, intermediate_size / 128, kNvFp4TileBytes]
  const float* w2_scale;     // blocks: [num_experts, hidden_size / 128, intermediate_size / 128]
                             // rows: [num_experts, hidden_size], experts and kNvFp4: [num_experts]
  const void* w13_bias;      // bf16 [num_experts, 2 * intermediate_size], rows as those of w13; null: none
  const void* w2_bias;       // bf16 [num_experts, hidden_size]; null: none
  const float* x_scale;      // kFp8Tensor: of x; null: that of the largest
  const float* hidden_scale; // kFp8Tensor: of the hidden activations; null: that of the largest
  const float* topk_weights; // [num_tokens, top_k]; null: 1
  const void* topk_ids;      // [num_tokens, top_k], int32 or int64
  const int32_t* expert_map; // topk_ids' experts to those here or -1, [num_global_experts]; null: they are those here
  void* hidden;              // bf16 [num_tokens, top_k, intermediate_size], written and read
  void* maxima;              // scales of tokens or tensors: bf16 [num_tokens, top_k, intermediate_size / 8], likewise
  void* out;                 // bf16 [num_tokens, hidden_size]
  int32_t num_tokens, top_k, num_experts, num_global_experts;
  int32_t hidden_size, intermediate_size;  // multiples of 128, with kBf16 of 64
  int64_t x_stride, out_stride;            // elements
  bool ids_are_int64;
  bool up_first;  // w13's rows begin with those of the factor that has no activation function; not with kNvFp4,
                  // which takes no biases and kSilu, either
  bool row_scales;  // scales of tokens or tensors: those of w13 and w2 are for each row, not for each expert
  ExpertFormat format;
  Activation activation;  // not kNone; of the two halves of the first product, each rounded to bf16
  ActivationParams activation_params;
  bool interleaved;  // w13's rows take turns: one of the gate's, one of the other factor's
  int32_t ahead;  // few_tokens_moe() sets it
  bool pdl;       // launch the first kernel with programmatic stream serialization
};

// out = sum over a token's experts of weight * (activation(x w13^T + w13_bias) w2^T + w2_bias), with x and the hidden
// activations quantised as the format says. Ids outside [0, num_global_experts) add nothing.
// Two launches for every 16 tokens, or fewer where the shared memory is small; a row of the result depends on no other,
// but for kFp8Tensor with scales of the largest, which takes no more tokens than one pair of launches.
cudaError_t few_tokens_moe(const FewTokensMoeParams& params, cudaStream_t stream);

}  // namespace vllm_b200
