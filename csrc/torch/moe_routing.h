#pragma once

#include <optional>

#include "common.h"

namespace vllm_b200 {

// The ops of the same names on CUDA tensors; see vllm_b200_plugin/ops/topk.py,
// router.py, moe_align.py and moe_sum.py. They throw for arguments that they
// cannot address.

void topk_op(const Tensor& logits, Tensor weights, Tensor ids, std::optional<Tensor> source_rows, int64_t topk,
             int64_t scoring, bool renormalize, double scale, int64_t num_groups, int64_t topk_group,
             std::optional<Tensor> bias, std::optional<Tensor> is_padding, bool pdl);

void moe_align_op(const Tensor& topk_ids, int64_t num_experts, int64_t block_size, Tensor sorted_ids,
                  Tensor block_experts, Tensor num_sorted, std::optional<Tensor> expert_map,
                  std::optional<Tensor> scatter_ids, bool pdl);

void batched_moe_align_op(int64_t max_tokens, int64_t block_size, const Tensor& num_tokens, Tensor sorted_ids,
                          Tensor block_experts, Tensor num_sorted, bool pdl);

void moe_sum_op(const Tensor& x, Tensor out, std::optional<Tensor> topk_ids, std::optional<Tensor> expert_map, bool pdl);

}  // namespace vllm_b200
