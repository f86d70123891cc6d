#include "moe_routing.h"

#include "../kernels/moe/align.h"
#include "../kernels/moe/moe_sum.h"
#include "../kernels/moe/router.h"
#include "../kernels/moe/topk.h"

namespace vllm_b200 {
namespace {

using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kMaxInt = INT32_MAX;

FloatType float_type(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return FloatType::kFloat;
    case ScalarType::Half: return FloatType::kHalf;
    case ScalarType::BFloat16: return FloatType::kBFloat16;
    default: STD_TORCH_CHECK(false, name, ": takes float32, float16 or bfloat16");
  }
}

IndexType index_type(const Tensor& ids, const char* name) {
  switch (ids.scalar_type()) {
    case ScalarType::Int:
    case ScalarType::UInt32: return IndexType::kInt32;
    case ScalarType::Long: return IndexType::kInt64;
    default: STD_TORCH_CHECK(false, name, ": takes int32, uint32 or int64");
  }
}

// A contiguous tensor of `count` elements on the device of the others.
void check_flat(const Tensor& tensor, int64_t count, int32_t device, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, name, ": takes ", count,
                  " contiguous elements, got ", tensor.numel());
  STD_TORCH_CHECK(tensor.get_device_index() == device, name, ": takes the device of the other tensors");
}

int32_t* int32_data(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, ": takes int32");
  return static_cast<int32_t*>(tensor.data_ptr());
}

SelectParams select_params(int64_t num_experts, int32_t device, int64_t topk, int64_t scoring,
                           bool renormalize, double scale, int64_t num_groups, int64_t topk_group,
                           const OptionalTensor& bias) {
  SelectParams params = {};
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= kMaxRoutedExperts, "num_experts: takes 1 to ", kMaxRoutedExperts,
                  ", got ", num_experts);
  STD_TORCH_CHECK(topk >= 1 && topk <= kMaxTopK && topk <= num_experts, "topk: takes 1 to ", kMaxTopK, " of ",
                  num_experts, " experts, got ", topk);
  STD_TORCH_CHECK(scoring >= 0 && scoring <= 3, "scoring: takes 0 to 3, got ", scoring);
  STD_TORCH_CHECK(num_groups >= 1 && topk_group >= 1 && topk_group <= num_groups, "topk_group: takes 1 to ",
                  num_groups, " groups, got ", topk_group);
  params.group_quads = 1;
  if (num_groups > 1) {
    STD_TORCH_CHECK(scoring >= 2, "num_groups: takes 1 with this scoring, got ", num_groups);
    const int64_t size = num_experts / num_groups;
    STD_TORCH_CHECK(num_experts % num_groups == 0 && (size == 4 || size == 8 || size == 16 || size == 32),
                    "num_groups: takes groups of 4, 8, 16 or 32 experts, got ", num_groups, " of ", num_experts);
    STD_TORCH_CHECK(topk <= topk_group * size, "topk: takes up to the experts of topk_group groups, got ", topk);
    params.group_quads = static_cast<int32_t>(size / 4);
  }
  if (bias) {
    check_flat(*bias, num_experts, device, "bias");
    params.bias = bias->data_ptr();
    params.bias_type = float_type(*bias, "bias");
  }
  params.scoring = static_cast<Scoring>(scoring);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.topk = static_cast<int32_t>(topk);
  params.num_groups = static_cast<int32_t>(num_groups);
  params.topk_group = static_cast<int32_t>(topk_group);
  params.renormalize = renormalize;
  params.scale = scale;
  return params;
}

SelectOutputs select_outputs(int64_t num_tokens, int64_t topk, int32_t device, const Tensor& weights, const Tensor& ids,
                             const OptionalTensor& source_rows, const OptionalTensor& is_padding) {
  STD_TORCH_CHECK(num_tokens <= kMaxInt, "logits: takes fewer than 2^31 rows");
  SelectOutputs out = {};
  check_flat(weights, num_tokens * topk, device, "weights");
  check_flat(ids, num_tokens * topk, device, "ids");
  STD_TORCH_CHECK(weights.scalar_type() == ScalarType::Float, "weights: takes float32");
  out.weights = static_cast<float*>(weights.data_ptr());
  out.ids = ids.data_ptr();
  out.id_type = index_type(ids, "ids");
  if (source_rows) {
    check_flat(*source_rows, num_tokens * topk, device, "source_rows");
    out.source_rows = int32_data(*source_rows, "source_rows");
  }
  if (is_padding) {
    check_flat(*is_padding, num_tokens, device, "is_padding");
    STD_TORCH_CHECK(is_padding->scalar_type() == ScalarType::Bool, "is_padding: takes bool");
    out.is_padding = static_cast<const bool*>(is_padding->data_ptr());
  }
  out.num_tokens = num_tokens;
  return out;
}

bool rows_start_at_16_bytes(const Tensor& x) {
  const int64_t vector = 16 / static_cast<int64_t>(x.element_size());
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && (x.size(0) < 2 || x.stride(0) % vector == 0);
}

GateParams gate_params(const Tensor& x, const Tensor& weight, const Tensor& logits, bool pdl) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1),
                  "x, weight: take [num_tokens, hidden_size] and [num_experts, hidden_size]");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && weight.scalar_type() == ScalarType::BFloat16,
                  "x, weight: take bfloat16");
  const int64_t num_tokens = x.size(0), num_experts = weight.size(0), hidden_size = x.size(1);
  STD_TORCH_CHECK(num_tokens <= kMaxGateTokens, "x: takes up to ", kMaxGateTokens, " tokens, got ", num_tokens);
  STD_TORCH_CHECK(num_experts >= 8 && num_experts % 8 == 0 && num_experts <= kMaxRoutedExperts,
                  "weight: takes 8 to ", kMaxRoutedExperts, " experts, a multiple of 8, got ", num_experts);
  STD_TORCH_CHECK(hidden_size > 0 && hidden_size % 8 == 0 && hidden_size < kMaxInt,
                  "weight: takes a hidden_size that is a multiple of 8, got ", hidden_size);
  STD_TORCH_CHECK(x.stride(1) == 1 && weight.stride(1) == 1, "x, weight: take a last stride of 1");
  STD_TORCH_CHECK(num_tokens == 0 || rows_start_at_16_bytes(x), "x: takes rows at multiples of 16 bytes");
  STD_TORCH_CHECK(rows_start_at_16_bytes(weight), "weight: takes rows at multiples of 16 bytes");
  check_flat(logits, num_tokens * num_experts, x.get_device_index(), "logits");
  STD_TORCH_CHECK(weight.get_device_index() == x.get_device_index(), "weight: takes the device of x");
  GateParams params = {};
  params.x = x.data_ptr();
  params.weight = weight.data_ptr();
  params.logits = logits.data_ptr();
  params.logits_type = float_type(logits, "logits");
  STD_TORCH_CHECK(params.logits_type != FloatType::kHalf, "logits: takes float32 or bfloat16");
  params.num_tokens = static_cast<int32_t>(num_tokens);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.hidden_size = static_cast<int32_t>(hidden_size);
  params.x_stride = x.stride(0);
  params.weight_stride = weight.stride(0);
  params.pdl = pdl;
  return params;
}

void router_gate_op(const Tensor& x, const Tensor& weight, Tensor logits, bool pdl) {
  const GateParams params = gate_params(x, weight, logits, pdl);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(gate(params, current_stream(x.get_device_index())), "router_gate");
}

void router_op(const Tensor& x, const Tensor& weight, Tensor logits, Tensor weights, Tensor ids,
               OptionalTensor source_rows, int64_t topk, int64_t scoring, bool renormalize, double scale,
               int64_t num_groups, int64_t topk_group, OptionalTensor bias, OptionalTensor is_padding, bool pdl) {
  const int32_t device = x.get_device_index();
  const GateParams params = gate_params(x, weight, logits, pdl);
  STD_TORCH_CHECK(params.num_experts >= kMinFusedExperts && params.num_experts <= kMaxFusedExperts, "weight: takes ",
                  kMinFusedExperts, " to ", kMaxFusedExperts, " experts, got ", params.num_experts);
  STD_TORCH_CHECK(scoring <= 1, "scoring: takes 0 to 1, got ", scoring);
  const SelectParams select = select_params(params.num_experts, device, topk, scoring, renormalize, scale,
                                            num_groups, topk_group, bias);
  const SelectOutputs out = select_outputs(params.num_tokens, topk, device, weights, ids, source_rows, is_padding);
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(router(params, select, out, current_stream(device)), "router");
}

void split_router_op(const Tensor& x, const Tensor& weight, Tensor logits, Tensor weights, Tensor ids, Tensor sums,
                     int64_t topk, int64_t scoring, bool renormalize, double scale, int64_t num_groups,
                     int64_t topk_group, OptionalTensor bias, OptionalTensor is_padding, bool pdl) {
  const int32_t device = x.get_device_index();
  const GateParams params = gate_params(x, weight, logits, pdl);
  const SelectParams select = select_params(params.num_experts, device, topk, scoring, renormalize, scale,
                                            num_groups, topk_group, bias);
  STD_TORCH_CHECK(block_selects(select), "scoring, topk, num_groups: take 1 to 3, up to ", kListSize, " and up to ",
                  kMaxLists, ", got ", scoring, ", ", topk, " and ", num_groups);
  const SelectOutputs out = select_outputs(params.num_tokens, topk, device, weights, ids, std::nullopt, is_padding);
  check_flat(sums, kMaxGateSlices * logits.numel(), device, "sums");
  STD_TORCH_CHECK(sums.scalar_type() == ScalarType::Float, "sums: takes float32");
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(split_router(params, select, out, static_cast<float*>(sums.data_ptr()), current_stream(device)),
               "split_router");
}

}  // namespace

void topk_op(const Tensor& logits, Tensor weights, Tensor ids, OptionalTensor source_rows, int64_t topk_count,
             int64_t scoring, bool renormalize, double scale, int64_t num_groups, int64_t topk_group,
             OptionalTensor bias, OptionalTensor is_padding, bool pdl) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: takes 2 dimensions, got ", logits.dim());
  STD_TORCH_CHECK(logits.numel() == 0 || logits.stride(1) == 1, "logits: takes a last stride of 1");
  const int32_t device = logits.get_device_index();
  TopKParams params = {};
  params.logits = logits.data_ptr();
  params.logits_type = float_type(logits, "logits");
  params.stride = logits.stride(0);
  params.select = select_params(logits.size(1), device, topk_count, scoring, renormalize, scale, num_groups,
                                topk_group, bias);
  params.out = select_outputs(logits.size(0), topk_count, device, weights, ids, source_rows, is_padding);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(topk(params, current_stream(device)), "topk");
}

void moe_align_op(const Tensor& topk_ids, int64_t num_experts, int64_t block_size, Tensor sorted_ids,
                  Tensor block_experts, Tensor num_sorted, OptionalTensor expert_map, OptionalTensor scatter_ids,
                  bool pdl) {
  const int32_t device = topk_ids.get_device_index();
  const int64_t num_ids = topk_ids.numel();
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= kMaxAlignedExperts, "num_experts: takes 1 to ",
                  kMaxAlignedExperts, ", got ", num_experts);
  STD_TORCH_CHECK(block_size >= 1 && block_size <= kMaxInt / num_experts, "block_size: takes at least 1, got ",
                  block_size);
  const int64_t most = num_ids + std::min(num_ids, num_experts) * (block_size - 1);
  STD_TORCH_CHECK(most <= kMaxInt, "topk_ids: takes fewer than 2^31 positions with padding, got ", most);
  check_flat(topk_ids, num_ids, device, "topk_ids");
  STD_TORCH_CHECK(sorted_ids.numel() >= most, "sorted_ids: takes at least ", most, " elements, got ",
                  sorted_ids.numel());
  STD_TORCH_CHECK(block_experts.numel() >= most / block_size, "block_experts: takes at least ", most / block_size,
                  " elements, got ", block_experts.numel());
  check_flat(sorted_ids, sorted_ids.numel(), device, "sorted_ids");
  check_flat(block_experts, block_experts.numel(), device, "block_experts");
  check_flat(num_sorted, 1, device, "num_sorted");
  MoeAlignParams params = {};
  params.wide_ids = index_type(topk_ids, "topk_ids") == IndexType::kInt64;
  STD_TORCH_CHECK(topk_ids.scalar_type() != ScalarType::UInt32, "topk_ids: takes int32 or int64");
  params.topk_ids = topk_ids.data_ptr();
  if (expert_map) {
    check_flat(*expert_map, num_experts, device, "expert_map");
    params.expert_map = int32_data(*expert_map, "expert_map");
  }
  params.sorted_ids = int32_data(sorted_ids, "sorted_ids");
  params.block_experts = int32_data(block_experts, "block_experts");
  params.num_sorted = int32_data(num_sorted, "num_sorted");
  if (scatter_ids) {
    check_flat(*scatter_ids, num_ids, device, "scatter_ids");
    params.scatter_ids = int32_data(*scatter_ids, "scatter_ids");
  }
  params.num_ids = num_ids;
  params.max_sorted = sorted_ids.numel();
  params.max_blocks = block_experts.numel();
  params.num_experts = static_cast<int32_t>(num_experts);
  params.block_size = static_cast<int32_t>(block_size);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(moe_align(params, current_stream(device)), "moe_align_block_size");
}

void batched_moe_align_op(int64_t max_tokens, int64_t block_size, const Tensor& num_tokens, Tensor sorted_ids,
                          Tensor block_experts, Tensor num_sorted, bool pdl) {
  const int32_t device = num_tokens.get_device_index();
  const int64_t batches = num_tokens.numel();
  STD_TORCH_CHECK(batches >= 1 && batches <= 1024, "num_tokens: takes 1 to 1024 batches, got ", batches);
  STD_TORCH_CHECK(block_size >= 1 && max_tokens >= 0 && max_tokens <= kMaxInt && block_size <= kMaxInt,
                  "block_size, max_tokens: take at least 1 and 0, got ", block_size, " and ", max_tokens);
  const int64_t blocks = (max_tokens + block_size - 1) / block_size;
  STD_TORCH_CHECK(blocks * block_size <= kMaxInt / batches, "max_tokens: takes fewer than 2^31 positions in all");
  check_flat(num_tokens, batches, device, "num_tokens");
  check_flat(sorted_ids, batches * blocks * block_size, device, "sorted_ids");
  check_flat(block_experts, batches * blocks, device, "block_experts");
  check_flat(num_sorted, 1, device, "num_sorted");
  BatchedMoeAlignParams params = {};
  params.num_tokens = int32_data(num_tokens, "num_tokens");
  params.sorted_ids = int32_data(sorted_ids, "sorted_ids");
  params.block_experts = int32_data(block_experts, "block_experts");
  params.num_sorted = int32_data(num_sorted, "num_sorted");
  params.num_batches = static_cast<int32_t>(batches);
  params.max_tokens = static_cast<int32_t>(max_tokens);
  params.blocks_per_batch = static_cast<int32_t>(blocks);
  params.block_size = static_cast<int32_t>(block_size);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(batched_moe_align(params, current_stream(device)), "batched_moe_align_block_size");
}

void moe_sum_op(const Tensor& x, Tensor out, OptionalTensor topk_ids, OptionalTensor expert_map, bool pdl) {
  STD_TORCH_CHECK(x.dim() == 3, "x: takes 3 dimensions, got ", x.dim());
  const int32_t device = x.get_device_index();
  const int64_t num_tokens = x.size(0), topk_count = x.size(1), hidden_size = x.size(2);
  const int64_t vector = 16 / static_cast<int64_t>(x.element_size());
  STD_TORCH_CHECK(hidden_size < kMaxInt && topk_count < kMaxInt, "x: takes sizes below 2^31");
  check_flat(out, num_tokens * hidden_size, device, "out");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), "out: takes the dtype of x");
  MoeSumParams params = {};
  params.type = float_type(x, "x");
  if (out.numel() == 0) return;
  STD_TORCH_CHECK(hidden_size % vector == 0 && (topk_count == 0 || x.stride(2) == 1) && rows_start_at_16_bytes(x) &&
                      (topk_count < 2 || x.stride(1) % vector == 0) &&
                      reinterpret_cast<uintptr_t>(out.data_ptr()) % 16 == 0,
                  "x, out: take rows of whole 16 bytes at multiples of 16 bytes");
  params.x = x.data_ptr();
  params.out = out.data_ptr();
  params.num_tokens = num_tokens;
  params.topk = static_cast<int32_t>(topk_count);
  params.hidden_size = static_cast<int32_t>(hidden_size);
  params.x_stride_token = x.stride(0);
  params.x_stride_k = x.stride(1);
  if (topk_ids) {
    STD_TORCH_CHECK(topk_ids->dim() == 2 && topk_ids->size(0) == num_tokens && topk_ids->size(1) == topk_count &&
                        topk_ids->get_device_index() == device,
                    "topk_ids: takes the first two dimensions of x, on its device");
    STD_TORCH_CHECK(topk_ids->scalar_type() != ScalarType::UInt32, "topk_ids: takes int32 or int64");
    params.id_type = index_type(*topk_ids, "topk_ids");
    params.topk_ids = topk_ids->data_ptr();
    params.id_stride_token = topk_ids->stride(0);
    params.id_stride_k = topk_ids->stride(1);
  }
  if (expert_map) {
    check_flat(*expert_map, expert_map->numel(), device, "expert_map");
    params.expert_map = int32_data(*expert_map, "expert_map");
  }
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(moe_sum(params, current_stream(device)), "moe_sum");
}

}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) {
  m.impl("topk", TORCH_BOX(&vllm_b200::topk_op));
  m.impl("router_gate", TORCH_BOX(&vllm_b200::router_gate_op));
  m.impl("router", TORCH_BOX(&vllm_b200::router_op));
  m.impl("split_router", TORCH_BOX(&vllm_b200::split_router_op));
  m.impl("moe_align_block_size", TORCH_BOX(&vllm_b200::moe_align_op));
  m.impl("batched_moe_align_block_size", TORCH_BOX(&vllm_b200::batched_moe_align_op));
  m.impl("moe_sum", TORCH_BOX(&vllm_b200::moe_sum_op));
}
