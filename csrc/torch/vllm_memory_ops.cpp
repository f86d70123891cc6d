// Stands in for vLLM's quantisation, fused quantisation and KV-cache ops, whose arguments these have. What ours do not
// take goes on to vLLM's kernel, kept as the op vllm_b200::vllm_<name>.

#include <optional>
#include <string>
#include <vector>

#include "../kernels/norm/rms_norm_quant.h"
#include "../kernels/quant/token_quant.h"
#include "checks.h"
#include "dispatcher.h"
#include "memory_ops.h"
#include "overrides.h"

namespace vllm_b200 {
namespace {

using OptionalTensor = std::optional<Tensor>;

// vLLM's lower bound of a scale times the format's maximum: our eps.
constexpr double kE4M3Eps = 1.0 / 512, kInt8Eps = 127.0 / (1 << 23);

// Our op on CUDA tensors without a way through the dispatcher, which costs a microsecond.
template <typename Function, typename... Args>
void run(const char* op, Function* function, const Tensor& x, const Args&... args) {
  if (x.is_cuda()) {
    function(x, args...);
  } else {
    call_dispatcher(op, x, args...);
  }
}

bool is_16_bit(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half;
}

bool is_one_float(const Tensor& scale) { return scale.scalar_type() == ScalarType::Float && scale.numel() == 1; }

// Whether ours reads x and writes q: rows of vectors, x `times` as wide as q.
bool takes_rows(const Tensor& x, const Tensor& q, int64_t times, int64_t widest) {
  if (x.dim() == 0 || q.dim() == 0 || q.numel() == 0) return false;
  const Rows x_rows(x), q_rows(q);
  return x_rows.regular && q_rows.regular && rows_are_vectors(x, x_rows) && rows_are_vectors(q, q_rows) &&
         x_rows.count == q_rows.count && x_rows.width == times * q_rows.width && q_rows.width % 16 == 0 &&
         q_rows.width <= widest;
}

bool is_e4m3(const Tensor& q) { return q.scalar_type() == ScalarType::Float8_e4m3fn; }
bool is_int8(const Tensor& q) { return q.scalar_type() == ScalarType::Char; }

bool one_a_row(const Tensor& scale, const Tensor& x, ScalarType type = ScalarType::Float) {
  return scale.scalar_type() == type && scale.is_contiguous() && x.size(-1) > 0 &&
         scale.numel() == x.numel() / x.size(-1);
}

constexpr int64_t kAnyWidth = int64_t{1} << 62;

bool is_float(const Tensor& x) { return is_16_bit(x) || x.scalar_type() == ScalarType::Float; }

// --- one scale a token or a tensor

void dynamic_per_token_scaled_fp8_quant(Tensor result, Tensor input, Tensor scale, OptionalTensor scale_ub) {
  if (is_float(input) && is_e4m3(result) && takes_rows(input, result, 1, kMaxTokenQuantHiddenSize) &&
      one_a_row(scale, input) && (!scale_ub || is_one_float(*scale_ub))) {
    return run("vllm_b200::per_token_quant", &ops::per_token_quant, input, result, scale, OptionalTensor{}, scale_ub,
               false);
  }
  call_dispatcher("vllm_b200::vllm_dynamic_per_token_scaled_fp8_quant", result, input, scale, scale_ub);
}

void dynamic_scaled_int8_quant(Tensor result, Tensor input, Tensor scale, OptionalTensor azp) {
  if (is_float(input) && is_int8(result) && takes_rows(input, result, 1, kMaxTokenQuantHiddenSize) &&
      one_a_row(scale, input) && (!azp || one_a_row(*azp, input, ScalarType::Int))) {
    return run("vllm_b200::per_token_quant", &ops::per_token_quant, input, result, scale, azp, OptionalTensor{}, false);
  }
  call_dispatcher("vllm_b200::vllm_dynamic_scaled_int8_quant", result, input, scale, azp);
}

// Groups are vLLM's: ours were not timed beside them.
void static_scaled_fp8_quant(Tensor result, Tensor input, Tensor scale, std::optional<std::vector<int64_t>> group_shape) {
  if (is_float(input) && is_e4m3(result) && takes_rows(input, result, 1, kAnyWidth) && is_one_float(scale)) {
    return run("vllm_b200::per_tensor_quant", &ops::per_tensor_quant, input, result, scale, OptionalTensor{}, false);
  }
  call_dispatcher("vllm_b200::vllm_static_scaled_fp8_quant", result, input, scale, group_shape);
}

void static_scaled_int8_quant(Tensor result, Tensor input, Tensor scale, OptionalTensor azp) {
  if (is_float(input) && is_int8(result) && takes_rows(input, result, 1, kAnyWidth) && is_one_float(scale) &&
      (!azp || (azp->scalar_type() == ScalarType::Int && azp->numel() == 1))) {
    return run("vllm_b200::per_tensor_quant", &ops::per_tensor_quant, input, result, scale, azp, false);
  }
  call_dispatcher("vllm_b200::vllm_static_scaled_int8_quant", result, input, scale, azp);
}

// --- after a gated activation

// vLLM's kernels take a transposed scale for [groups, leading rows] storage, whatever its shape says.
std::optional<Tensor> group_scales(const Tensor& scale, int64_t rows, int64_t groups, bool transposed,
                                   int64_t leading_rows) {
  if (scale.scalar_type() != ScalarType::Float) return std::nullopt;
  const bool right = scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == groups &&
                     (transposed ? (rows < 2 || scale.stride(0) == 1) && (groups < 2 || scale.stride(1) == leading_rows)
                                 : scale.is_contiguous());
  return right ? std::optional<Tensor>(scale) : std::nullopt;
}

// Measured on an H200 behind a kernel that does not let its successor start early: vLLM's kernel takes 1.6 us for a token
// and ours 1.8, from 16 tokens of 14336 on ours is the faster one (benchmarks/results/h200/memory_bound.jsonl).
constexpr int64_t kGatedFromElements = 16 * 14336;

void silu_and_mul_per_block_quant(Tensor out, Tensor input, Tensor scales, int64_t group_size, OptionalTensor scale_ub,
                                  bool is_scale_transposed) {
  if (is_16_bit(input) && (is_e4m3(out) || is_int8(out)) && input.dim() == 2 && out.dim() == 2 &&
      (group_size == 64 || group_size == 128) && !scale_ub && takes_rows(input, out, 2, kAnyWidth) &&
      out.size(1) % group_size == 0 && out.numel() >= kGatedFromElements) {
    const int64_t rows = out.size(0);
    if (const auto scale = group_scales(scales, rows, out.size(1) / group_size, is_scale_transposed, rows)) {
      return run("vllm_b200::gated_group_quant", &ops::gated_group_quant, input, out, *scale, group_size,
                 is_e4m3(out) ? kE4M3Eps : kInt8Eps, false, false, int64_t{0},
                                    0.0, 1.0, 0.0, false);
    }
  }
  call_dispatcher("vllm_b200::vllm_silu_and_mul_per_block_quant", out, input, scales, group_size, scale_ub,
                  is_scale_transposed);
}

void silu_and_mul_quant(Tensor result, Tensor input, Tensor scale) {
  if (is_16_bit(input) && is_e4m3(result) && takes_rows(input, result, 2, kAnyWidth) && is_one_float(scale)) {
    return run("vllm_b200::gated_tensor_quant", &ops::gated_tensor_quant, input, result, scale, int64_t{0}, 0.0, 1.0,
               0.0, false);
  }
  call_dispatcher("vllm_b200::vllm_silu_and_mul_quant", result, input, scale);
}

void persistent_masked_m_silu_mul_quant(Tensor input, Tensor counts, Tensor y_q, Tensor y_s, bool use_ue8m0) {
  const bool shapes = input.dim() == 3 && y_q.dim() == 3 && y_s.dim() == 3 && counts.dim() == 1 && y_q.numel() > 0 &&
                      input.size(2) == 2 * y_q.size(2) && y_q.size(2) % 128 == 0 && input.size(0) <= 1024;
  const bool packed = y_s.scalar_type() == ScalarType::Int;
  if (shapes && is_16_bit(input) && is_e4m3(y_q) && counts.scalar_type() == ScalarType::Int &&
      (packed ? use_ue8m0 : y_s.scalar_type() == ScalarType::Float) && input.stride(2) == 1 && y_q.stride(2) == 1 &&
      input.stride(1) % 8 == 0 && input.stride(0) % 8 == 0 && y_q.stride(1) % 16 == 0 && y_q.stride(0) % 16 == 0 &&
      y_s.size(1) == y_q.size(1) && y_s.size(2) == (packed ? (y_q.size(2) / 128 + 3) / 4 : y_q.size(2) / 128) &&
      reinterpret_cast<uintptr_t>(input.data_ptr()) % 16 == 0 && reinterpret_cast<uintptr_t>(y_q.data_ptr()) % 16 == 0) {
    return run("vllm_b200::masked_silu_group_quant", &ops::masked_silu_group_quant, input, counts, y_q, y_s, 1e-10,
               use_ue8m0, false);
  }
  call_dispatcher("vllm_b200::vllm_persistent_masked_m_silu_mul_quant", input, counts, y_q, y_s, use_ue8m0);
}

// --- after RMSNorm

bool takes_norm(const Tensor& input, const OptionalTensor& residual, const Tensor& weight, const Tensor& result) {
  if (!is_16_bit(input) || !(is_e4m3(result) || is_int8(result)) ||
      !takes_rows(input, result, 1, kMaxNormHiddenSize)) {
    return false;
  }
  if (weight.scalar_type() != input.scalar_type() || weight.dim() != 1 || weight.size(0) != input.size(-1) ||
      !rows_are_vectors(weight, Rows(weight)) || weight.stride(0) != 1) {
    return false;
  }
  return !residual || (residual->scalar_type() == input.scalar_type() &&
                       takes_rows(*residual, result, 1, kMaxNormHiddenSize));
}

void rms_norm_per_block_quant(Tensor result, Tensor input, Tensor weight, Tensor scale, double epsilon,
                              OptionalTensor scale_ub, OptionalTensor residual, int64_t group_size,
                              bool is_scale_transposed) {
  if (!scale_ub && (group_size == 64 || group_size == 128) && takes_norm(input, residual, weight, result) &&
      input.size(-1) % group_size == 0 && scale.dim() == 2) {
    const int64_t rows = Rows(input).count, step = scale.stride(1) > 0 ? scale.stride(1) : 1;
    const int64_t leading_rows = (rows + step - 1) / step * step;
    if (const auto scales = group_scales(scale, rows, input.size(-1) / group_size, is_scale_transposed, leading_rows)) {
      return run("vllm_b200::rms_norm_group_quant", &ops::rms_norm_group_quant, input, residual, weight, result,
                 *scales, epsilon, group_size,
                                       is_e4m3(result) ? kE4M3Eps : kInt8Eps, false, false, false, false);
    }
  }
  call_dispatcher("vllm_b200::vllm_rms_norm_per_block_quant", result, input, weight, scale, epsilon, scale_ub, residual,
                  group_size, is_scale_transposed);
}

void rms_norm_dynamic_per_token_quant(Tensor result, Tensor input, Tensor weight, Tensor scale, double epsilon,
                                      OptionalTensor scale_ub, OptionalTensor residual) {
  if (takes_norm(input, residual, weight, result) && one_a_row(scale, input) &&
      (!scale_ub || (is_one_float(*scale_ub) && is_e4m3(result)))) {
    return run("vllm_b200::rms_norm_token_quant", &ops::rms_norm_token_quant, input, residual, weight, result, scale,
               scale_ub, epsilon, false, false);
  }
  call_dispatcher("vllm_b200::vllm_rms_norm_dynamic_per_token_quant", result, input, weight, scale, epsilon, scale_ub,
                  residual);
}

void fused_add_rms_norm_static_fp8_quant(Tensor result, Tensor input, Tensor residual, Tensor weight, Tensor scale,
                                         double epsilon) {
  if (takes_norm(input, residual, weight, result) && is_e4m3(result) && is_one_float(scale)) {
    return run("vllm_b200::rms_norm_tensor_quant", &ops::rms_norm_tensor_quant, input, OptionalTensor(residual),
               weight, result, scale, epsilon, false, false);
  }
  call_dispatcher("vllm_b200::vllm_fused_add_rms_norm_static_fp8_quant", result, input, residual, weight, scale, epsilon);
}

// --- into the KV cache

bool begins_at_vectors(const Tensor& x) {
  const int64_t bytes = static_cast<int64_t>(x.element_size());
  if (x.dim() == 0 || x.numel() == 0 || x.stride(-1) != 1) return false;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    if (x.stride(d) * bytes % 16 != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0;
}

// What the cache holds by vLLM's name: the numbers as they are, or e4m3.
bool takes_cache_dtype(const std::string& name, const Tensor& source, const Tensor& cache) {
  if (!is_16_bit(source)) return false;
  if (name == "fp8" || name == "fp8_e4m3") return cache.scalar_type() == ScalarType::Byte || is_e4m3(cache);
  return (name == "auto" || name == "bfloat16" || name == "float16") && cache.scalar_type() == source.scalar_type();
}

bool takes_slots(const Tensor& slots) {
  return slots.scalar_type() == ScalarType::Long && slots.dim() == 1 && slots.is_contiguous();
}

bool takes_cache_scale(const Tensor& scale, int64_t heads) {
  return scale.scalar_type() == ScalarType::Float && scale.is_contiguous() &&
         (scale.numel() == 1 || scale.numel() == heads);
}

void reshape_and_cache_flash(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping,
                             std::string kv_cache_dtype, Tensor k_scale, Tensor v_scale) {
  const bool shapes = key.dim() == 3 && value.dim() == 3 && key_cache.dim() == 4 && value_cache.dim() == 4 &&
                      key.size(2) % 16 == 0 && value.size(2) % 16 == 0 && key_cache.size(2) == key.size(1) &&
                      key_cache.size(3) == key.size(2) && value_cache.size(2) == value.size(1) &&
                      value_cache.size(3) == value.size(2) && value_cache.size(0) == key_cache.size(0) &&
                      value_cache.size(1) == key_cache.size(1);
  if (shapes && takes_slots(slot_mapping) && takes_cache_dtype(kv_cache_dtype, key, key_cache) &&
      takes_cache_dtype(kv_cache_dtype, value, value_cache) && key.scalar_type() == value.scalar_type() &&
      begins_at_vectors(key) && begins_at_vectors(value) && begins_at_vectors(key_cache) &&
      begins_at_vectors(value_cache) && takes_cache_scale(k_scale, key.size(1)) &&
      takes_cache_scale(v_scale, value.size(1)) && key.size(0) >= slot_mapping.size(0) &&
      value.size(0) >= slot_mapping.size(0)) {
    return run("vllm_b200::reshape_and_cache_flash", &ops::reshape_and_cache_flash, key, value, key_cache,
               value_cache, slot_mapping, k_scale, v_scale, false);
  }
  call_dispatcher("vllm_b200::vllm_reshape_and_cache_flash", key, value, key_cache, value_cache, slot_mapping,
                  kv_cache_dtype, k_scale, v_scale);
}

void concat_and_cache_mla(Tensor kv_c, Tensor k_pe, Tensor kv_cache, Tensor slot_mapping, std::string kv_cache_dtype,
                          Tensor scale) {
  if (kv_c.dim() == 2 && k_pe.dim() == 2 && kv_cache.dim() == 3 && kv_c.size(1) % 16 == 0 && k_pe.size(1) % 16 == 0 &&
      kv_cache.size(2) == kv_c.size(1) + k_pe.size(1) && takes_slots(slot_mapping) &&
      takes_cache_dtype(kv_cache_dtype, kv_c, kv_cache) && k_pe.scalar_type() == kv_c.scalar_type() &&
      begins_at_vectors(kv_c) && begins_at_vectors(k_pe) && begins_at_vectors(kv_cache) && takes_cache_scale(scale, 1) &&
      kv_c.size(0) >= slot_mapping.size(0) && k_pe.size(0) >= slot_mapping.size(0)) {
    return run("vllm_b200::concat_and_cache_mla", &ops::concat_and_cache_mla, kv_c, k_pe, kv_cache, slot_mapping,
               scale, false);
  }
  call_dispatcher("vllm_b200::vllm_concat_and_cache_mla", kv_c, k_pe, kv_cache, slot_mapping, kv_cache_dtype, scale);
}

constexpr Override kOverrides[] = {
    VLLM_B200_OVERRIDE(dynamic_per_token_scaled_fp8_quant),
    VLLM_B200_OVERRIDE(dynamic_scaled_int8_quant),
    VLLM_B200_OVERRIDE(static_scaled_fp8_quant),
    VLLM_B200_OVERRIDE(static_scaled_int8_quant),
    VLLM_B200_OVERRIDE(silu_and_mul_per_block_quant),
    VLLM_B200_OVERRIDE(silu_and_mul_quant),
    VLLM_B200_OVERRIDE(persistent_masked_m_silu_mul_quant),
    VLLM_B200_OVERRIDE(rms_norm_per_block_quant),
    VLLM_B200_OVERRIDE(rms_norm_dynamic_per_token_quant),
    VLLM_B200_OVERRIDE(fused_add_rms_norm_static_fp8_quant),
    VLLM_B200_OVERRIDE(reshape_and_cache_flash),
    VLLM_B200_OVERRIDE(concat_and_cache_mla),
};

}  // namespace

std::span<const Override> memory_overrides() { return kOverrides; }

}  // namespace vllm_b200
