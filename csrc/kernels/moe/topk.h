#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vllm_b200 {

constexpr int kMaxRoutedExperts = 512;
constexpr int kMaxTopK = 32;

enum class FloatType : int32_t { kFloat, kHalf, kBFloat16 };
enum class IndexType : int32_t { kInt32, kInt64 };  // uint32 has the bits of int32

// How vLLM's ops make scores of logits. Both sigmoids are the same function;
// they differ in the last bits.
enum class Scoring : int32_t {
  kSoftmax,
  kSigmoid,      // 1 / (1 + exp(-x)), as in topk_sigmoid
  kTanhSigmoid,  // tanh(x / 2) / 2 + 1 / 2, as in grouped_topk
  kNone,
};

// What becomes of one row of logits. See vllm_b200_plugin/ops/topk.py.
struct SelectParams {
  const void* bias;  // [num_experts] of bias_type, or null
  FloatType bias_type;
  Scoring scoring;
  // Grouped selection, as in grouped_topk: every score counts as it is, NaN as
  // the largest. Without: as in topk_softmax, NaN and Inf count as 0.
  bool grouped;
  int32_t num_experts;
  int32_t topk;
  int32_t num_groups;   // of 4, 8, 16 or 32 experts; 1 for no groups
  int32_t topk_group;
  bool renormalize;
  double scale;
};

// Where the result of a row goes, all [num_tokens, topk].
struct SelectOutputs {
  float* weights;
  void* ids;
  IndexType id_type;
  int32_t* source_rows;    // or null: k * num_tokens + token
  const bool* is_padding;  // or null: [num_tokens], rows to get id -1 and weight 0
  int64_t num_tokens;
};

struct TopKParams {
  const void* logits;  // [num_tokens, num_experts]
  FloatType logits_type;
  int64_t stride;  // elements from one row to the next
  SelectParams select;
  SelectOutputs out;
  bool pdl;
};

// The topk best experts of every token, in descending order, ties to the lower expert.
cudaError_t topk(const TopKParams& params, cudaStream_t stream);

}  // namespace vllm_b200
