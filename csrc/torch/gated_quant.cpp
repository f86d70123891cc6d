#include "../kernels/quant/gated_quant.h"

#include "activation.h"
#include "checks.h"
#include "memory_ops.h"

namespace vllm_b200 {
namespace {

// [batches, rows, hidden_size] of q, and x with rows twice as wide.
GatedGroupQuantParams group_params(const Tensor& x, const Tensor& q, const Tensor& scale, int64_t group_size,
                                   double eps) {
  const int64_t dim = q.dim();
  STD_TORCH_CHECK((dim == 2 || dim == 3) && x.dim() == dim && scale.dim() == dim,
                  "x, q and scale: take 2 or 3 dimensions, got ", x.dim(), ", ", dim, " and ", scale.dim());
  const int64_t hidden_size = q.size(-1), rows = q.size(-2), batches = dim == 3 ? q.size(0) : 1;
  STD_TORCH_CHECK(group_size == 64 || group_size == 128, "group_size: takes 64 or 128, got ", group_size);
  STD_TORCH_CHECK(hidden_size % group_size == 0 && hidden_size < (int64_t{1} << 30), "q: the last dimension, ",
                  hidden_size, ", takes multiples of group_size, ", group_size, ", below 2^30");
  STD_TORCH_CHECK(eps >= 1e-20 && eps <= 1.0, "eps: takes 1e-20 to 1, got ", eps);
  STD_TORCH_CHECK(x.size(-1) == 2 * hidden_size && x.size(-2) == rows && (dim == 2 || x.size(0) == batches),
                  "x: takes the shape of q with rows twice as wide");
  const bool packed = scale.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(packed || scale.scalar_type() == ScalarType::Float, "scale: takes float32 or int32");
  const int64_t groups = hidden_size / group_size, columns = packed ? (groups + 3) / 4 : groups;
  STD_TORCH_CHECK(scale.size(-1) == columns && scale.size(-2) == rows && (dim == 2 || scale.size(0) == batches),
                  "scale: takes ", rows, " rows of ", columns, " columns");
  GatedGroupQuantParams params = {};
  params.x = x.data_ptr();
  params.q = q.data_ptr();
  params.scale = scale.data_ptr();
  params.batches = batches;
  params.rows = rows;
  params.padded_rows = rows;
  params.hidden_size = static_cast<int32_t>(hidden_size);
  params.group_size = static_cast<int32_t>(group_size);
  params.x_stride_batch = dim == 3 ? x.stride(0) : 0;
  params.x_stride_row = x.stride(-2);
  params.q_stride_batch = dim == 3 ? q.stride(0) : 0;
  params.q_stride_row = q.stride(-2);
  params.scale_stride_batch = dim == 3 ? scale.stride(0) : 0;
  params.scale_stride_row = scale.stride(-2);
  params.scale_stride_column = scale.stride(-1);
  params.scale_capacity = elements_to_storage_end(scale);
  params.eps = static_cast<float>(eps);
  if (q.numel() == 0) return params;
  STD_TORCH_CHECK(x.stride(-1) == 1 && q.stride(-1) == 1, "x and q: take a last stride of 1");
  const auto aligned = [&](const Tensor& t, int64_t elements) {
    return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && (rows < 2 || t.stride(-2) % elements == 0) &&
           (batches < 2 || t.stride(0) % elements == 0);
  };
  STD_TORCH_CHECK(aligned(x, 8) && aligned(q, 16), "x and q: take rows that start at multiples of 16 bytes");
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index() && x.get_device_index() == scale.get_device_index(),
                  "x, q and scale: take one device");
  return params;
}

ScaleType scale_type(const Tensor& scale, bool ue8m0) {
  if (scale.scalar_type() == ScalarType::Int) {
    STD_TORCH_CHECK(ue8m0, "ue8m0: packed scales are UE8M0, got False");
    return ScaleType::kPackedUE8M0;
  }
  return ue8m0 ? ScaleType::kFloatPow2 : ScaleType::kFloat;
}

TokenQuantParams row_params(const Tensor& x, const Tensor& q) {
  const Rows x_rows = checked_rows(x, "x"), q_rows = checked_rows(q, "q");
  STD_TORCH_CHECK(q_rows.count == x_rows.count && 2 * q_rows.width == x_rows.width,
                  "x: takes the shape of q with rows twice as wide");
  STD_TORCH_CHECK(q_rows.width % 16 == 0, "q: the last dimension takes multiples of 16, got ", q_rows.width);
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index(), "x and q: take one device");
  TokenQuantParams params = {};
  params.x = x.data_ptr();
  params.q = q.data_ptr();
  params.rows = q_rows.count;
  params.hidden_size = q_rows.width;
  params.x_stride_row = x_rows.stride;
  params.q_stride_row = q_rows.stride;
  return params;
}

TokenQuant kind_of(const Tensor& q) {
  return output_type(q) == OutputType::kE4M3 ? TokenQuant::kE4M3 : TokenQuant::kInt8;
}

}  // namespace

namespace ops {

void gated_group_quant(const Tensor& x, Tensor q, Tensor scale, int64_t group_size, double eps, bool ue8m0, bool pad,
                       int64_t activation, double limit, double alpha, double beta, bool pdl) {
  GatedGroupQuantParams params = group_params(x, q, scale, group_size, eps);
  const OutputType output = output_type(q);
  const ScaleType type = scale_type(scale, ue8m0);
  STD_TORCH_CHECK(output == OutputType::kE4M3 || type == ScaleType::kFloat, "ue8m0: goes with e4m3 only");
  if (q.numel() == 0) return;
  const int64_t aligned_rows = (params.rows + 3) / 4 * 4;
  if (pad && scale.stride(-2) == 1 && scale.stride(-1) == aligned_rows) params.padded_rows = aligned_rows;
  params.activation = activation_params(limit, alpha, beta);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(vllm_b200::gated_group_quant(params, input_type(x), output, type, activation_of(activation),
                                            current_stream(x.get_device_index())),
               "gated_group_quant");
}

void gated_token_quant(const Tensor& x, Tensor q, Tensor scale, const std::optional<Tensor>& scale_ub,
                       int64_t activation, double limit, double alpha, double beta, bool pdl) {
  TokenQuantParams params = row_params(x, q);
  STD_TORCH_CHECK(params.hidden_size <= kMaxTokenQuantHiddenSize, "q: the last dimension takes up to ",
                  kMaxTokenQuantHiddenSize, ", got ", params.hidden_size);
  check_type(scale, "scale", ScalarType::Float);
  STD_TORCH_CHECK(scale.numel() == params.rows && scale.is_contiguous(), "scale: takes one number a row, contiguous");
  params.scale = static_cast<float*>(scale.data_ptr());
  if (scale_ub) {
    STD_TORCH_CHECK(kind_of(q) == TokenQuant::kE4M3, "scale_ub: goes with e4m3 only");
    check_scalar(*scale_ub, "scale_ub", x);
    params.scale_ub = static_cast<const float*>(scale_ub->data_ptr());
  }
  params.activation = activation_params(limit, alpha, beta);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(vllm_b200::gated_token_quant(params, input_type(x), activation_of(activation), kind_of(q),
                                            current_stream(x.get_device_index())),
               "gated_token_quant");
}

void gated_tensor_quant(const Tensor& x, Tensor q, const Tensor& scale, int64_t activation, double limit, double alpha,
                        double beta, bool pdl) {
  TokenQuantParams params = row_params(x, q);
  check_scalar(scale, "scale", x);
  params.scale = static_cast<float*>(scale.data_ptr());
  params.activation = activation_params(limit, alpha, beta);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(vllm_b200::gated_tensor_quant(params, input_type(x), activation_of(activation), kind_of(q),
                                             current_stream(x.get_device_index())),
               "gated_tensor_quant");
}

void masked_silu_group_quant(const Tensor& x, const Tensor& counts, Tensor q, Tensor scale, double eps, bool ue8m0,
                             bool pdl) {
  STD_TORCH_CHECK(x.dim() == 3, "x: takes 3 dimensions, got ", x.dim());
  GatedGroupQuantParams params = group_params(x, q, scale, 128, eps);
  check_type(counts, "counts", ScalarType::Int);
  check_shape(counts, "counts", {x.size(0)});
  STD_TORCH_CHECK(counts.get_device_index() == x.get_device_index(), "counts: takes the device of x");
  STD_TORCH_CHECK(x.size(0) <= 1024, "x: takes up to 1024 experts, got ", x.size(0));
  STD_TORCH_CHECK(x.size(0) * x.size(1) < (int64_t{1} << 31), "x: takes below 2^31 rows");
  check_type(q, "q", ScalarType::Float8_e4m3fn);
  if (q.numel() == 0) return;
  params.valid_rows = static_cast<const int32_t*>(counts.data_ptr());
  params.valid_rows_stride = counts.stride(0);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(masked_gated_group_quant(params, input_type(x), OutputType::kE4M3, scale_type(scale, ue8m0),
                                        current_stream(x.get_device_index())),
               "masked_silu_group_quant");
}

}  // namespace ops
}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) {
  m.impl("gated_group_quant", TORCH_BOX(&vllm_b200::ops::gated_group_quant));
  m.impl("gated_token_quant", TORCH_BOX(&vllm_b200::ops::gated_token_quant));
  m.impl("gated_tensor_quant", TORCH_BOX(&vllm_b200::ops::gated_tensor_quant));
  m.impl("masked_silu_group_quant", TORCH_BOX(&vllm_b200::ops::masked_silu_group_quant));
}
