#include "activation.h"
#include "common.h"

#include "../kernels/moe/few_tokens.h"

namespace vllm_b200 {
namespace {

void check_contiguous(const Tensor& tensor, const char* name, ScalarType dtype, std::initializer_list<int64_t> shape) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype, name, ": wrong dtype");
  STD_TORCH_CHECK(tensor.dim() == static_cast<int64_t>(shape.size()), name, ": takes ", shape.size(),
                  " dimensions, got ", tensor.dim());
  int64_t dim = 0;
  for (const int64_t size : shape) {
    STD_TORCH_CHECK(tensor.size(dim) == size, name, ": takes ", size, " in dimension ", dim, ", got ",
                    tensor.size(dim));
    ++dim;
  }
  STD_TORCH_CHECK(tensor.is_contiguous() && reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0, name,
                  ": takes a contiguous tensor that starts at a multiple of 16 bytes");
}

// Rows may be strided.
void check_rows(const Tensor& tensor, const char* name, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::BFloat16, name, ": takes bfloat16");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == columns, name, ": takes [", rows,
                  ", ", columns, "]");
  STD_TORCH_CHECK(tensor.stride(1) == 1 && (rows < 2 || tensor.stride(0) % 8 == 0) &&
                      reinterpret_cast<uintptr_t>(tensor.data_ptr()) % 16 == 0,
                  name, ": takes rows that start at multiples of 16 bytes and a last stride of 1");
}

// A row of quantised weights has scales of 128 columns each, one scale, or shares that of the expert.
void check_scale(const std::optional<Tensor>& scale, const char* name, ExpertFormat format, bool of_rows,
                 int64_t num_experts, int64_t rows, int64_t columns, int32_t device) {
  STD_TORCH_CHECK(scale.has_value() == (format != ExpertFormat::kBf16), name, ": goes with quantised weights");
  if (!scale.has_value()) return;
  STD_TORCH_CHECK(scale->get_device_index() == device, name, ": takes the device of x");
  if (format == ExpertFormat::kFp8Block || format == ExpertFormat::kFp8BlockPow2) {
    check_contiguous(*scale, name, ScalarType::Float, {num_experts, rows / 128, columns / 128});
  } else if (of_rows) {
    check_contiguous(*scale, name, ScalarType::Float, {num_experts, rows});
  } else {
    check_contiguous(*scale, name, ScalarType::Float, {num_experts});
  }
}

const float* check_number(const std::optional<Tensor>& number, const char* name, ExpertFormat format, int32_t device) {
  if (!number.has_value()) return nullptr;
  STD_TORCH_CHECK(format == ExpertFormat::kFp8Tensor && number->scalar_type() == ScalarType::Float &&
                      number->numel() == 1 && number->get_device_index() == device,
                  name, ": takes one float32 and goes with one scale for all activations");
  return static_cast<const float*>(number->data_ptr());
}

const void* check_bias(const std::optional<Tensor>& bias, const char* name, int64_t num_experts, int64_t rows,
                       int32_t device) {
  if (!bias.has_value()) return nullptr;
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::BFloat16 && bias->is_contiguous() && bias->dim() == 2 &&
                      bias->size(0) == num_experts && bias->size(1) == rows && bias->get_device_index() == device,
                  name, ": takes bfloat16 [", num_experts, ", ", rows, "], contiguous, on the device of x");
  return bias->data_ptr();
}

const float* floats(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->data_ptr()) : nullptr;
}

}  // namespace

// The op vllm_b200::few_tokens_moe on CUDA tensors; see vllm_b200_plugin/ops/moe_few_tokens.py. The Python wrapper has
// named what is wrong in words; these checks keep a direct call of the op from reading or writing out of range.
void few_tokens_moe_op(const Tensor& x, const Tensor& w13, std::optional<Tensor> w13_scale, const Tensor& w2,
                       std::optional<Tensor> w2_scale, std::optional<Tensor> topk_weights, const Tensor& topk_ids,
                       std::optional<Tensor> expert_map, std::optional<Tensor> x_scale,
                       std::optional<Tensor> hidden_scale, std::optional<Tensor> w13_bias,
                       std::optional<Tensor> w2_bias, Tensor scratch, Tensor out, bool up_first, bool interleaved,
                       int64_t format_id, int64_t activation, double limit, double alpha, double beta, bool pdl) {
  STD_TORCH_CHECK(format_id >= 0 && format_id <= static_cast<int64_t>(ExpertFormat::kNvFp4), "format: got ",
                  format_id);
  const auto format = static_cast<ExpertFormat>(format_id);
  const bool bf16 = format == ExpertFormat::kBf16, nvfp4 = format == ExpertFormat::kNvFp4;
  const bool maxima = format >= ExpertFormat::kFp8Token && !nvfp4;
  STD_TORCH_CHECK(x.dim() == 2 && w13.dim() == (nvfp4 ? 4 : 3) && topk_ids.dim() == 2,
                  "x and topk_ids: take 2 dimensions; w13: takes 3, with NVFP4 4");
  STD_TORCH_CHECK(!nvfp4 || (!up_first && activation == 0 && !w13_bias.has_value() && !w2_bias.has_value()),
                  "up_first, activation, w13_bias, w2_bias: NVFP4 takes the gate's rows first, silu and no biases");
  STD_TORCH_CHECK(bf16 || !interleaved, "interleaved: goes with bfloat16 weights");
  const int64_t num_tokens = x.size(0), hidden_size = x.size(1), top_k = topk_ids.size(1);
  const int64_t num_experts = w13.size(0), intermediate_size = nvfp4 ? w13.size(1) * 8 : w13.size(1) / 2;
  const int64_t multiple = bf16 ? 64 : 128;
  STD_TORCH_CHECK(hidden_size % multiple == 0 && intermediate_size % multiple == 0 && hidden_size > 0 &&
                      intermediate_size > 0 && intermediate_size < (1 << 20),
                  "hidden and intermediate size: take multiples of ", multiple, ", got ", hidden_size, " and ",
                  intermediate_size);
  STD_TORCH_CHECK(hidden_size <= kMaxHiddenSize, "hidden size: takes ", kMaxHiddenSize, " at most, got ", hidden_size);
  STD_TORCH_CHECK(num_experts > 0 && num_experts <= kMaxExperts, "w13: takes 1 to ", kMaxExperts, " experts, got ",
                  num_experts);
  const int64_t count = num_tokens * top_k;
  STD_TORCH_CHECK(count <= kMaxAssignments, "topk_ids: takes ", kMaxAssignments, " ids at most, got ", count);
  const int32_t device = x.get_device_index();
  check_rows(x, "x", num_tokens, hidden_size);
  check_rows(out, "out", num_tokens, hidden_size);
  const auto weight_type = bf16                                 ? ScalarType::BFloat16
                           : nvfp4                              ? ScalarType::Byte
                           : format == ExpertFormat::kInt8Token ? ScalarType::Char
                                                                : ScalarType::Float8_e4m3fn;
  const bool row_scales = !nvfp4 && w13_scale.has_value() && w13_scale->dim() == 2;
  if (nvfp4) {
    check_contiguous(w13, "w13", weight_type, {num_experts, intermediate_size / 8, hidden_size / 128, kNvFp4TileBytes});
    check_contiguous(w2, "w2", weight_type, {num_experts, hidden_size / 16, intermediate_size / 128, kNvFp4TileBytes});
  } else {
    check_contiguous(w13, "w13", weight_type, {num_experts, 2 * intermediate_size, hidden_size});
    check_contiguous(w2, "w2", weight_type, {num_experts, hidden_size, intermediate_size});
  }
  check_scale(w13_scale, "w13_scale", format, row_scales, num_experts, 2 * intermediate_size, hidden_size, device);
  check_scale(w2_scale, "w2_scale", format, row_scales, num_experts, hidden_size, intermediate_size, device);
  const int64_t elements = count * (intermediate_size + (maxima ? intermediate_size / 8 : 0));
  STD_TORCH_CHECK(scratch.scalar_type() == ScalarType::BFloat16 && scratch.is_contiguous() &&
                      scratch.numel() >= elements && reinterpret_cast<uintptr_t>(scratch.data_ptr()) % 16 == 0,
                  "scratch: takes ", elements, " elements of bfloat16 at least, contiguous, at a multiple of 16 bytes");
  const bool ids_are_int64 = topk_ids.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(ids_are_int64 || topk_ids.scalar_type() == ScalarType::Int, "topk_ids: takes int32 or int64");
  STD_TORCH_CHECK(topk_ids.size(0) == num_tokens && topk_ids.is_contiguous(), "topk_ids: takes [", num_tokens,
                  ", top_k], contiguous");
  for (const Tensor& tensor : {w13, w2, topk_ids, Tensor(scratch), Tensor(out)}) {
    STD_TORCH_CHECK(tensor.get_device_index() == device, "all tensors: take one device");
  }
  if (topk_weights.has_value()) {
    STD_TORCH_CHECK(topk_weights->scalar_type() == ScalarType::Float && topk_weights->is_contiguous() &&
                        topk_weights->dim() == 2 && topk_weights->size(0) == num_tokens &&
                        topk_weights->size(1) == top_k && topk_weights->get_device_index() == device,
                    "topk_weights: takes float32 in the shape of topk_ids, contiguous");
  }
  if (expert_map.has_value()) {
    STD_TORCH_CHECK(expert_map->scalar_type() == ScalarType::Int && expert_map->dim() == 1 &&
                        expert_map->is_contiguous() && expert_map->get_device_index() == device,
                    "expert_map: takes int32 [num_global_experts], contiguous");
  }
  if (num_tokens == 0) return;

  FewTokensMoeParams params = {};
  params.x = x.data_ptr();
  params.w13 = w13.data_ptr();
  params.w13_scale = floats(w13_scale);
  params.w2 = w2.data_ptr();
  params.w2_scale = floats(w2_scale);
  params.topk_weights = floats(topk_weights);
  params.topk_ids = topk_ids.data_ptr();
  params.expert_map = expert_map.has_value() ? static_cast<const int32_t*>(expert_map->data_ptr()) : nullptr;
  params.x_scale = check_number(x_scale, "x_scale", format, device);
  params.hidden_scale = check_number(hidden_scale, "hidden_scale", format, device);
  params.w13_bias = check_bias(w13_bias, "w13_bias", num_experts, 2 * intermediate_size, device);
  params.w2_bias = check_bias(w2_bias, "w2_bias", num_experts, hidden_size, device);
  params.hidden = scratch.data_ptr();
  if (maxima && params.hidden_scale == nullptr) {
    params.maxima = static_cast<char*>(scratch.data_ptr()) + 2 * count * intermediate_size;
  }
  params.out = out.data_ptr();
  params.num_tokens = static_cast<int32_t>(num_tokens);
  params.top_k = static_cast<int32_t>(top_k);
  params.num_experts = static_cast<int32_t>(num_experts);
  params.num_global_experts = static_cast<int32_t>(expert_map.has_value() ? expert_map->size(0) : num_experts);
  params.hidden_size = static_cast<int32_t>(hidden_size);
  params.intermediate_size = static_cast<int32_t>(intermediate_size);
  params.x_stride = x.stride(0);
  params.out_stride = out.stride(0);
  params.ids_are_int64 = ids_are_int64;
  params.up_first = up_first;
  params.row_scales = row_scales;
  params.format = format;
  params.activation = activation_of(activation);
  params.activation_params = activation_params(limit, alpha, beta);
  params.interleaved = interleaved;
  params.pdl = pdl;

  const torch::stable::accelerator::DeviceGuard guard(device);
  check_launch(few_tokens_moe(params, current_stream(device)), "few_tokens_moe");
}

}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) { m.impl("few_tokens_moe", TORCH_BOX(&vllm_b200::few_tokens_moe_op)); }
