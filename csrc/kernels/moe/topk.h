#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vllm_b200 {

constexpr int kMaxRoutedExperts = 512;
constexpr int kMaxTopK = 32;

enum class FloatType : int32_t { kFloat, kHalf, kBFloat16 };
enum class IndexType : int32_t { kInt32, kInt64 };  // uint32 has the bits of int32

// How vLLM's ops make scores of logits. Both sigmoids are the same function;
// they differ in the last bits. The first two are those of topk_softmax and
// topk_sigmoid, where scores that are NaN or Inf count as 0; the others those of
// grouped_topk, where a NaN is the largest choice there is, or without groups the
// smallest.
enum class Scoring : int32_t {
  kSoftmax,
  kSigmoid,      // 1 / (1 + exp(-x))
  kTanhSigmoid,  // tanh(x / 2) / 2 + 1 / 2
  kNone,
};

template <Scoring kScoring>
constexpr bool kIsGrouped = kScoring >= Scoring::kTanhSigmoid;

// What becomes of one row of logits. See vllm_b200_plugin/ops/topk.py.
struct SelectParams {
  const void* bias;  // [num_experts] of bias_type, or null
  FloatType bias_type;
  Scoring scoring;
  int32_t num_experts;
  int32_t topk;
  int32_t num_groups;   // 1 for none
  int32_t group_quads;  // a quarter of the experts in a group: 1, 2, 4 or 8
  int32_t topk_group;
  bool renormalize;
  double scale;
};

// Selections that a block can make for one token (select_block.cuh), and with how many warps.
constexpr int kListSize = 8, kMaxLists = 16;

inline int block_select_warps(const SelectParams& p) {
  return p.num_groups > 1 ? p.num_groups : (p.num_experts + 31) / 32;
}

inline bool block_selects(const SelectParams& p) {
  return p.scoring != Scoring::kSoftmax && p.topk <= kListSize && block_select_warps(p) <= kMaxLists;
}

// Where the result of a row goes, all [num_tokens, topk].
struct SelectOutputs {
  float* weights;
  void* ids;
  IndexType id_type;
  int32_t* source_rows;    // or null: k * num_tokens + token
  const bool* is_padding;  // or null: [num_tokens], rows to get id -1
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
