// Stands in for vLLM's routing and bookkeeping ops of MoE layers. In C++, so that
// eager calls, as in a prefill, cost no more of the host's time than vLLM's own.

#include <algorithm>
#include <string>
#include <tuple>

#include "../kernels/moe/align.h"
#include "../kernels/moe/topk.h"
#include "dispatcher.h"
#include "moe_routing.h"
#include "overrides.h"

namespace vllm_b200 {
namespace {

using torch::stable::detail::to;
using OptionalTensor = std::optional<Tensor>;

// Where ours was faster than vLLM's on an H200, called as vLLM calls its ops. The
// grouped selection: 1.2 times with 1024 tokens, slower with few. The alignment:
// 1.2 times with 8 and 128 ids of more than 64 experts (for fewer experts vLLM
// has another kernel), slower with 2048, 1.9 times with 32768. The sum: 1.1 times
// with 16 tokens, no faster with 1 and with 64.
constexpr int64_t kGroupedFromTokens = 1024;
constexpr int64_t kAlignUpToIds = 256, kAlignFromIds = 32768, kAlignFewIdsFromExperts = 65;

bool is_float(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  return type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16;
}

bool is_int32(const OptionalTensor& x) { return !x || (x->scalar_type() == ScalarType::Int && x->is_contiguous()); }

bool selection_fits(int64_t num_experts, int64_t topk) {
  return num_experts >= 1 && num_experts <= kMaxRoutedExperts && topk >= 1 && topk <= std::min<int64_t>(kMaxTopK, num_experts);
}

// vllm_b200::topk, without the dispatcher where that would only cost time.
void select(const Tensor& logits, const Tensor& weights, const Tensor& ids, const OptionalTensor& rows, int64_t topk,
            Scoring scoring, bool renormalize, double scale, int64_t num_groups, int64_t topk_group,
            const OptionalTensor& bias, const OptionalTensor& is_padding) {
  const int64_t scoring_value = static_cast<int64_t>(scoring);
  const bool pdl = false;  // the gate before it is mostly cuBLAS's, which does not let a successor start early
  if (logits.is_cuda()) {
    topk_op(logits, weights, ids, rows, topk, scoring_value, renormalize, scale, num_groups, topk_group, bias,
            is_padding, pdl);
  } else {
    call_dispatcher("vllm_b200::topk", logits, weights, ids, rows, topk, scoring_value, renormalize, scale,
                    num_groups, topk_group, bias, is_padding, pdl);
  }
}

// topk_softmax and topk_sigmoid; false, with nothing written, for arguments that our op does not take.
bool plain(const Tensor& weights, const Tensor& ids, const Tensor& rows, const Tensor& logits, Scoring scoring,
           bool renormalize, double scale, const OptionalTensor& bias, const OptionalTensor& is_padding) {
  if (logits.dim() != 2 || !is_float(logits) || !logits.is_contiguous() || weights.dim() != 2) return false;
  const int64_t num_tokens = logits.size(0), topk = weights.size(1), count = num_tokens * topk;
  const ScalarType id_type = ids.scalar_type();
  const bool outputs =
      weights.scalar_type() == ScalarType::Float && weights.is_contiguous() && weights.numel() == count &&
      (id_type == ScalarType::Int || id_type == ScalarType::UInt32 || id_type == ScalarType::Long) &&
      ids.is_contiguous() && ids.numel() == count && is_int32(rows) && rows.numel() == count;
  const bool padding = !is_padding || (is_padding->scalar_type() == ScalarType::Bool && is_padding->is_contiguous() &&
                                       is_padding->numel() == num_tokens);
  const bool bias_fits = !bias || (bias->scalar_type() == ScalarType::Float && bias->is_contiguous() &&
                                   bias->numel() == logits.size(1));
  if (!outputs || !padding || !bias_fits || !selection_fits(logits.size(1), topk)) return false;
  select(logits, weights, ids, rows, topk, scoring, renormalize, scale, 1, 1, bias, is_padding);
  return true;
}

void topk_softmax(Tensor weights, Tensor ids, Tensor rows, Tensor logits, bool renormalize, OptionalTensor bias,
                  OptionalTensor is_padding) {
  if (plain(weights, ids, rows, logits, Scoring::kSoftmax, renormalize, 1.0, bias, is_padding)) return;
  call_dispatcher("vllm_b200::vllm_topk_softmax", weights, ids, rows, logits, renormalize, bias, is_padding);
}

void topk_sigmoid(Tensor weights, Tensor ids, Tensor rows, Tensor logits, bool renormalize, OptionalTensor bias,
                  double scale, OptionalTensor is_padding) {
  if (plain(weights, ids, rows, logits, Scoring::kSigmoid, renormalize, scale, bias, is_padding)) return;
  call_dispatcher("vllm_b200::vllm_topk_sigmoid", weights, ids, rows, logits, renormalize, bias, scale, is_padding);
}

// Where vLLM's kernel for few experts would run: its general one rounds scores to the dtype of the logits.
bool grouped_fits(const Tensor& scores, int64_t num_groups, int64_t topk_group, int64_t topk, const Tensor& bias) {
  if (scores.dim() != 2 || !is_float(scores) || !scores.is_contiguous() || !is_float(bias) || !bias.is_contiguous()) {
    return false;
  }
  const int64_t num_experts = scores.size(1);
  if (scores.size(0) < kGroupedFromTokens) return false;
  if (bias.numel() != num_experts || !selection_fits(num_experts, topk)) return false;
  if (num_groups == 1) return topk_group == 1 && (topk <= 8 || (topk == 22 && num_experts == 512));
  if (num_groups < 1 || topk_group < 1 || topk_group > std::min<int64_t>(4, num_groups) || num_experts % num_groups) {
    return false;
  }
  const int64_t size = num_experts / num_groups;
  return num_experts <= 256 && (size == 4 || size == 8 || size == 16 || size == 32) && size * topk_group <= 128 &&
         topk <= std::min<int64_t>(8, size * topk_group);
}

std::tuple<Tensor, Tensor> grouped_topk(Tensor scores, int64_t num_groups, int64_t topk_group, int64_t topk,
                                        bool renormalize, double scale, Tensor bias, int64_t scoring_func) {
  const bool scoring_fits = scoring_func == 0 || scoring_func == 1;
  if (!scoring_fits || !grouped_fits(scores, num_groups, topk_group, topk, bias)) {
    const auto results = call_dispatcher("vllm_b200::vllm_grouped_topk", scores, num_groups, topk_group, topk,
                                         renormalize, scale, bias, scoring_func);
    return {to<Tensor>(results[0]), to<Tensor>(results[1])};
  }
  const std::vector<int64_t> shape{scores.size(0), topk};
  const Tensor weights = torch::stable::new_empty(scores, shape, ScalarType::Float);
  const Tensor ids = torch::stable::new_empty(scores, shape, ScalarType::Int);
  select(scores, weights, ids, std::nullopt, topk, scoring_func == 1 ? Scoring::kTanhSigmoid : Scoring::kNone,
         renormalize, scale, num_groups, topk_group, bias, std::nullopt);
  return {weights, ids};
}

void moe_align_block_size(Tensor topk_ids, int64_t num_experts, int64_t block_size, Tensor sorted_ids,
                          Tensor block_experts, Tensor num_sorted, OptionalTensor expert_map,
                          OptionalTensor scatter_ids) {
  const int64_t num_ids = topk_ids.numel();
  const ScalarType id_type = topk_ids.scalar_type();
  bool fits = ((num_ids <= kAlignUpToIds && num_experts >= kAlignFewIdsFromExperts) || num_ids >= kAlignFromIds) &&
              (id_type == ScalarType::Int || id_type == ScalarType::Long) && topk_ids.is_contiguous() &&
              num_experts >= 1 && num_experts <= kMaxAlignedExperts && block_size >= 1 && block_size <= (1 << 20) &&
              num_ids < (int64_t{1} << 30) && is_int32(sorted_ids) && is_int32(block_experts) && is_int32(num_sorted) &&
              num_sorted.numel() == 1 && is_int32(expert_map) && is_int32(scatter_ids);
  if (fits) {
    const int64_t most = num_ids + std::min(num_ids, num_experts) * (block_size - 1);
    fits = most < (int64_t{1} << 31) && sorted_ids.numel() >= most && block_experts.numel() >= most / block_size &&
           (!expert_map || expert_map->numel() == num_experts) && (!scatter_ids || scatter_ids->numel() == num_ids);
  }
  const bool pdl = false;
  if (!fits) {
    call_dispatcher("vllm_b200::vllm_moe_align_block_size", topk_ids, num_experts, block_size, sorted_ids,
                    block_experts, num_sorted, expert_map, scatter_ids);
  } else if (topk_ids.is_cuda()) {
    moe_align_op(topk_ids, num_experts, block_size, sorted_ids, block_experts, num_sorted, expert_map, scatter_ids, pdl);
  } else {
    call_dispatcher("vllm_b200::moe_align_block_size", topk_ids, num_experts, block_size, sorted_ids, block_experts,
                    num_sorted, expert_map, scatter_ids, pdl);
  }
}

void batched_moe_align_block_size(int64_t max_tokens, int64_t block_size, Tensor num_tokens, Tensor sorted_ids,
                                  Tensor block_experts, Tensor num_sorted) {
  const int64_t batches = num_tokens.numel();
  bool fits = num_tokens.dim() == 1 && batches >= 1 && batches <= 1024 && block_size >= 1 && block_size <= (1 << 20) &&
              max_tokens >= 0 && max_tokens < (int64_t{1} << 20) && is_int32(num_tokens) && is_int32(sorted_ids) &&
              is_int32(block_experts) && is_int32(num_sorted) && num_sorted.numel() == 1;
  if (fits) {
    const int64_t blocks = (max_tokens + block_size - 1) / block_size * batches;
    fits = blocks * block_size < (int64_t{1} << 31) && sorted_ids.numel() == blocks * block_size &&
           block_experts.numel() == blocks;
  }
  const bool pdl = false;
  if (!fits) {
    call_dispatcher("vllm_b200::vllm_batched_moe_align_block_size", max_tokens, block_size, num_tokens, sorted_ids,
                    block_experts, num_sorted);
  } else if (num_tokens.is_cuda()) {
    batched_moe_align_op(max_tokens, block_size, num_tokens, sorted_ids, block_experts, num_sorted, pdl);
  } else {
    call_dispatcher("vllm_b200::batched_moe_align_block_size", max_tokens, block_size, num_tokens, sorted_ids,
                    block_experts, num_sorted, pdl);
  }
}

constexpr Override kOverrides[] = {
    VLLM_B200_OVERRIDE(topk_softmax),
    VLLM_B200_OVERRIDE(topk_sigmoid),
    VLLM_B200_OVERRIDE(grouped_topk),
    VLLM_B200_OVERRIDE(moe_align_block_size),
    VLLM_B200_OVERRIDE(batched_moe_align_block_size),
};

}  // namespace

std::span<const Override> moe_overrides() { return kOverrides; }

}  // namespace vllm_b200
