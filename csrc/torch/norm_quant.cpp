#include "../kernels/norm/rms_norm_quant.h"
#include "checks.h"
#include "memory_ops.h"
#include "nvfp4.h"

namespace vllm_b200 {
namespace {

// All but q and the scales.
RmsNormQuantParams norm_params(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                               double norm_eps, bool gemma, bool pdl) {
  const Rows x_rows = checked_rows(x, "x");
  STD_TORCH_CHECK(x_rows.width % 16 == 0 && x_rows.width <= kMaxNormHiddenSize,
                  "x: the last dimension takes multiples of 16 up to ", kMaxNormHiddenSize, ", got ", x_rows.width);
  check_type(weight, "weight", x.scalar_type());
  check_shape(weight, "weight", {x_rows.width});
  checked_rows(weight, "weight");
  STD_TORCH_CHECK(x.get_device_index() == weight.get_device_index(), "weight: takes the device of x");
  RmsNormQuantParams params = {};
  if (residual) {
    const Rows rows = checked_rows(*residual, "residual");
    STD_TORCH_CHECK(rows.count == x_rows.count && rows.width == x_rows.width, "residual: takes the shape of x");
    check_type(*residual, "residual", x.scalar_type());
    STD_TORCH_CHECK(x.get_device_index() == residual->get_device_index(), "residual: takes the device of x");
    params.residual = params.total = residual->data_ptr();
    params.residual_stride_row = params.total_stride_row = rows.stride;
  }
  params.x = x.data_ptr();
  params.weight = weight.data_ptr();
  params.rows = x_rows.count;
  params.padded_rows = x_rows.count;
  params.hidden_size = static_cast<int32_t>(x_rows.width);
  params.x_stride_row = x_rows.stride;
  params.norm_eps = static_cast<float>(norm_eps);
  params.gemma = gemma;
  params.pdl = pdl;
  return params;
}

// With q in the shape of x, a byte an element.
RmsNormQuantParams norm_params(const Tensor& x, const std::optional<Tensor>& residual, const Tensor& weight,
                               const Tensor& q, double norm_eps, bool gemma, bool pdl) {
  RmsNormQuantParams params = norm_params(x, residual, weight, norm_eps, gemma, pdl);
  const Rows rows = checked_rows(q, "q");
  STD_TORCH_CHECK(rows.count == params.rows && rows.width == params.hidden_size, "q: takes the shape of x");
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index(), "q: takes the device of x");
  params.q = q.data_ptr();
  params.q_stride_row = rows.stride;
  return params;
}

// With x + residual in `total`, which leaves the residual alone.
RmsNormQuantParams norm_params(const Tensor& x, const Tensor& residual, const Tensor& weight, const Tensor& total,
                               const Tensor& q, double norm_eps, bool gemma, bool pdl) {
  RmsNormQuantParams params = norm_params(x, std::optional<Tensor>(residual), weight, q, norm_eps, gemma, pdl);
  const Rows rows = checked_rows(total, "total");
  STD_TORCH_CHECK(rows.count == params.rows && rows.width == params.hidden_size, "total: takes the shape of x");
  check_type(total, "total", x.scalar_type());
  STD_TORCH_CHECK(x.get_device_index() == total.get_device_index(), "total: takes the device of x");
  params.total = total.data_ptr();
  params.total_stride_row = rows.stride;
  return params;
}

void run_group_quant(RmsNormQuantParams params, const Tensor& x, const Tensor& q, const Tensor& scale,
                     int64_t group_size, double eps, bool ue8m0, bool pad) {
  STD_TORCH_CHECK(group_size == 64 || group_size == 128, "group_size: takes 64 or 128, got ", group_size);
  STD_TORCH_CHECK(params.hidden_size % group_size == 0, "x: the last dimension takes multiples of group_size ",
                  group_size, ", got ", params.hidden_size);
  STD_TORCH_CHECK(eps >= 1e-20 && eps <= 1.0, "eps: takes 1e-20 to 1, got ", eps);
  const bool packed = scale.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(packed || scale.scalar_type() == ScalarType::Float, "scale: takes float32 or int32");
  STD_TORCH_CHECK(!packed || ue8m0, "ue8m0: packed scales are UE8M0, got False");
  const OutputType output = output_type(q);
  STD_TORCH_CHECK(output == OutputType::kE4M3 || !ue8m0, "ue8m0: goes with e4m3 only");
  const int64_t groups = params.hidden_size / group_size, columns = packed ? (groups + 3) / 4 : groups;
  check_shape(scale, "scale", {params.rows, columns});
  STD_TORCH_CHECK(x.get_device_index() == scale.get_device_index(), "scale: takes the device of x");
  if (x.numel() == 0) return;
  const int64_t aligned_rows = (params.rows + 3) / 4 * 4;
  if (pad && scale.stride(-2) == 1 && scale.stride(-1) == aligned_rows) params.padded_rows = aligned_rows;
  params.scale = scale.data_ptr();
  params.group_size = static_cast<int32_t>(group_size);
  params.scale_stride_row = scale.stride(0);
  params.scale_stride_column = scale.stride(1);
  params.scale_capacity = elements_to_storage_end(scale);
  params.eps = static_cast<float>(eps);
  const ScaleType type = packed ? ScaleType::kPackedUE8M0 : ue8m0 ? ScaleType::kFloatPow2 : ScaleType::kFloat;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(
      vllm_b200::rms_norm_group_quant(params, input_type(x), output, type, current_stream(x.get_device_index())),
      "rms_norm_group_quant");
}

void run_token_quant(RmsNormQuantParams params, const Tensor& x, const Tensor& q, const Tensor& scale,
                     const std::optional<Tensor>& scale_ub) {
  check_type(scale, "scale", ScalarType::Float);
  STD_TORCH_CHECK(scale.numel() == params.rows && scale.is_contiguous(), "scale: takes one number a row, contiguous");
  params.scale = scale.data_ptr();
  const OutputType output = output_type(q);
  if (scale_ub) {
    STD_TORCH_CHECK(output == OutputType::kE4M3, "scale_ub: goes with e4m3 only");
    check_scalar(*scale_ub, "scale_ub", x);
    params.scale_ub = static_cast<const float*>(scale_ub->data_ptr());
  }
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(vllm_b200::rms_norm_token_quant(params, input_type(x), output, current_stream(x.get_device_index())),
               "rms_norm_token_quant");
}

void run_tensor_quant(RmsNormQuantParams params, const Tensor& x, const Tensor& q, const Tensor& scale) {
  check_scalar(scale, "scale", x);
  params.scale = scale.data_ptr();
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(
      vllm_b200::rms_norm_tensor_quant(params, input_type(x), output_type(q), current_stream(x.get_device_index())),
      "rms_norm_tensor_quant");
}

}  // namespace

namespace ops {

void rms_norm_group_quant(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, Tensor q, Tensor scale,
                          double norm_eps, int64_t group_size, double eps, bool ue8m0, bool pad, bool gemma, bool pdl) {
  run_group_quant(norm_params(x, residual, weight, q, norm_eps, gemma, pdl), x, q, scale, group_size, eps, ue8m0, pad);
}

void add_rms_norm_group_quant(const Tensor& x, const Tensor& residual, const Tensor& weight, Tensor total, Tensor q,
                              Tensor scale, double norm_eps, int64_t group_size, double eps, bool ue8m0, bool pad,
                              bool gemma, bool pdl) {
  run_group_quant(norm_params(x, residual, weight, total, q, norm_eps, gemma, pdl), x, q, scale, group_size, eps, ue8m0,
                  pad);
}

void rms_norm_token_quant(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, Tensor q, Tensor scale,
                          const std::optional<Tensor>& scale_ub, double norm_eps, bool gemma, bool pdl) {
  run_token_quant(norm_params(x, residual, weight, q, norm_eps, gemma, pdl), x, q, scale, scale_ub);
}

void add_rms_norm_token_quant(const Tensor& x, const Tensor& residual, const Tensor& weight, Tensor total, Tensor q,
                              Tensor scale, const std::optional<Tensor>& scale_ub, double norm_eps, bool gemma,
                              bool pdl) {
  run_token_quant(norm_params(x, residual, weight, total, q, norm_eps, gemma, pdl), x, q, scale, scale_ub);
}

void rms_norm_tensor_quant(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, Tensor q,
                           const Tensor& scale, double norm_eps, bool gemma, bool pdl) {
  run_tensor_quant(norm_params(x, residual, weight, q, norm_eps, gemma, pdl), x, q, scale);
}

void add_rms_norm_tensor_quant(const Tensor& x, const Tensor& residual, const Tensor& weight, Tensor total, Tensor q,
                               const Tensor& scale, double norm_eps, bool gemma, bool pdl) {
  run_tensor_quant(norm_params(x, residual, weight, total, q, norm_eps, gemma, pdl), x, q, scale);
}

void rms_norm_nvfp4_quant(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight,
                          const Tensor& global_scale, Tensor q, Tensor scale, double norm_eps, bool swizzled, bool gemma,
                          bool pdl) {
  STD_TORCH_CHECK(x.dim() == 2, "x: takes 2 dimensions, got ", x.dim());
  RmsNormQuantParams params = norm_params(x, residual, weight, norm_eps, gemma, pdl);
  check_nvfp4_outputs(x, x.size(1), q, scale, swizzled);
  check_shape(q, "q", {x.size(0), x.size(1) / 2});
  check_scalar(global_scale, "global_scale", x);
  params.q = q.data_ptr();
  params.scale = scale.data_ptr();
  params.global_scale = static_cast<const float*>(global_scale.data_ptr());
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(
      vllm_b200::rms_norm_nvfp4_quant(params, input_type(x), swizzled, current_stream(x.get_device_index())),
      "rms_norm_nvfp4_quant");
}

}  // namespace ops
}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) {
  m.impl("rms_norm_group_quant", TORCH_BOX(&vllm_b200::ops::rms_norm_group_quant));
  m.impl("add_rms_norm_group_quant", TORCH_BOX(&vllm_b200::ops::add_rms_norm_group_quant));
  m.impl("rms_norm_token_quant", TORCH_BOX(&vllm_b200::ops::rms_norm_token_quant));
  m.impl("add_rms_norm_token_quant", TORCH_BOX(&vllm_b200::ops::add_rms_norm_token_quant));
  m.impl("rms_norm_nvfp4_quant", TORCH_BOX(&vllm_b200::ops::rms_norm_nvfp4_quant));
  m.impl("rms_norm_tensor_quant", TORCH_BOX(&vllm_b200::ops::rms_norm_tensor_quant));
  m.impl("add_rms_norm_tensor_quant", TORCH_BOX(&vllm_b200::ops::add_rms_norm_tensor_quant));
}
