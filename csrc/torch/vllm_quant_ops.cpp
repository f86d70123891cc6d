// Stands in for vLLM's per-token-group quantisation ops. In C++, because vLLM
// calls them from Python in every MoE layer of a prefill, where a kernel in
// Python would cost more than the quantisation.

#include "dispatcher.h"
#include "overrides.h"
#include "quant.h"

namespace vllm_b200 {
namespace {

bool rows_are_aligned(const Tensor& q) {
  for (int64_t d = 0; d + 1 < q.dim(); ++d) {
    if (q.stride(d) % 16 != 0) return false;
  }
  return reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0;
}

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t d = 0; d < a.dim(); ++d) {
    if (a.size(d) != b.size(d)) return false;
  }
  return true;
}

// Whether scale has the leading dimensions of x, then `columns`.
bool scale_matches(const Tensor& x, const Tensor& scale, int64_t columns) {
  if (scale.dim() != x.dim() || scale.size(-1) != columns) return false;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    if (scale.size(d) != x.size(d)) return false;
  }
  return true;
}

// Quantise x into q and scale; false, with nothing written, for arguments that our op does not take.
bool quantise(Tensor x, Tensor q, Tensor scale, int64_t group_size, double eps, bool ue8m0, ScalarType q_type,
              ScalarType scale_type) {
  const ScalarType x_type = x.scalar_type();
  const bool types = (x_type == ScalarType::BFloat16 || x_type == ScalarType::Half || x_type == ScalarType::Float) &&
                     q.scalar_type() == q_type && scale.scalar_type() == scale_type;
  const bool sizes = x.dim() > 0 && same_shape(x, q) && (group_size == 32 || group_size == 64 || group_size == 128) &&
                     x.size(-1) % group_size == 0;
  if (!types || !sizes || !(eps >= 1e-20 && eps <= 1.0)) return false;
  if (x.numel() == 0) return true;

  const bool packed = scale_type == ScalarType::Int;
  const int64_t groups = x.size(-1) / group_size, columns = packed ? (groups + 3) / 4 : groups;
  if ((x.dim() != 2 && x.dim() != 3) || !scale_matches(x, scale, columns)) {
    // As vLLM's kernels see it: a list of rows.
    const int64_t rows = x.numel() / x.size(-1);
    if (!x.is_contiguous() || !q.is_contiguous()) return false;
    const bool listed = scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == columns;
    if (!listed && (!scale.is_contiguous() || scale.numel() != rows * columns)) return false;
    const std::vector<int64_t> shape{rows, x.size(-1)}, scale_shape{rows, columns};
    x = torch::stable::view(x, shape);
    q = torch::stable::view(q, shape);
    if (!listed) scale = torch::stable::view(scale, scale_shape);
  }
  if (x.stride(-1) != 1 || q.stride(-1) != 1 || !rows_are_aligned(q)) return false;

  // Not the padding rows of fp32 scales: vLLM's MLA passes the leading rows of
  // a larger tensor, and what looks like padding may be the scales of further
  // tokens. Packed scales are always whole tensors.
  const bool pad = packed;
  if (x.is_cuda()) {
    per_token_group_quant(x, q, scale, group_size, eps, ue8m0, pad, false);
  } else {
    call_dispatcher("vllm_b200::per_token_group_quant", x, q, scale, group_size, eps, ue8m0, pad, false);
  }
  return true;
}

void per_token_group_fp8_quant(Tensor x, Tensor q, Tensor scale, int64_t group_size, double eps, double low, double high, bool ue8m0,
         bool is_scale_transposed, bool is_tma_aligned) {
  // The two flags repeat what the strides of `scale` say; vLLM's kernel ignores them, too.
  if (low == -448.0 && high == 448.0 &&
      quantise(x, q, scale, group_size, eps, ue8m0, ScalarType::Float8_e4m3fn, ScalarType::Float)) {
    return;
  }
  call_dispatcher("vllm_b200::vllm_per_token_group_fp8_quant", x, q, scale, group_size, eps, low, high, ue8m0,
                  is_scale_transposed, is_tma_aligned);
}

void per_token_group_fp8_quant_packed(Tensor x, Tensor q, Tensor scale, int64_t group_size, double eps, double low, double high) {
  if (low == -448.0 && high == 448.0 &&
      quantise(x, q, scale, group_size, eps, true, ScalarType::Float8_e4m3fn, ScalarType::Int)) {
    return;
  }
  call_dispatcher("vllm_b200::vllm_per_token_group_fp8_quant_packed", x, q, scale, group_size, eps, low, high);
}

void per_token_group_quant_int8(Tensor x, Tensor q, Tensor scale, int64_t group_size, double eps, double low, double high) {
  if (low == -128.0 && high == 127.0 &&
      quantise(x, q, scale, group_size, eps, false, ScalarType::Char, ScalarType::Float)) {
    return;
  }
  call_dispatcher("vllm_b200::vllm_per_token_group_quant_int8", x, q, scale, group_size, eps, low, high);
}

constexpr Override kOverrides[] = {
    VLLM_B200_OVERRIDE(per_token_group_fp8_quant),
    VLLM_B200_OVERRIDE(per_token_group_fp8_quant_packed),
    VLLM_B200_OVERRIDE(per_token_group_quant_int8),
};

}  // namespace

std::span<const Override> quant_overrides() { return kOverrides; }

}  // namespace vllm_b200
