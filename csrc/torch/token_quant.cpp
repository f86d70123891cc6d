#include "../kernels/quant/token_quant.h"

#include "checks.h"
#include "memory_ops.h"

namespace vllm_b200 {
namespace {

TokenQuant quant_kind(const Tensor& q, bool has_azp) {
  if (output_type(q) == OutputType::kE4M3) {
    STD_TORCH_CHECK(!has_azp, "azp: goes with int8 only");
    return TokenQuant::kE4M3;
  }
  return has_azp ? TokenQuant::kInt8Asymmetric : TokenQuant::kInt8;
}

TokenQuantParams row_params(const Tensor& x, const Tensor& q) {
  const Rows x_rows = checked_rows(x, "x"), q_rows = checked_rows(q, "q");
  STD_TORCH_CHECK(q_rows.count == x_rows.count && q_rows.width == x_rows.width, "q: takes the shape of x");
  STD_TORCH_CHECK(x_rows.width % 16 == 0, "x: the last dimension takes multiples of 16, got ", x_rows.width);
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index(), "x and q: take one device");
  TokenQuantParams params = {};
  params.x = x.data_ptr();
  params.q = q.data_ptr();
  params.rows = x_rows.count;
  params.hidden_size = x_rows.width;
  params.x_stride_row = x_rows.stride;
  params.q_stride_row = q_rows.stride;
  return params;
}

}  // namespace

namespace ops {

void per_token_quant(const Tensor& x, Tensor q, Tensor scale, std::optional<Tensor> azp,
                     const std::optional<Tensor>& scale_ub, bool pdl) {
  TokenQuantParams params = row_params(x, q);
  STD_TORCH_CHECK(params.hidden_size <= kMaxTokenQuantHiddenSize, "x: the last dimension takes up to ",
                  kMaxTokenQuantHiddenSize, ", got ", params.hidden_size);
  check_type(scale, "scale", ScalarType::Float);
  STD_TORCH_CHECK(scale.numel() == params.rows && scale.is_contiguous(), "scale: takes one number a row, contiguous");
  params.scale = static_cast<float*>(scale.data_ptr());
  if (azp) {
    check_type(*azp, "azp", ScalarType::Int);
    STD_TORCH_CHECK(azp->numel() == params.rows && azp->is_contiguous(), "azp: takes one number a row, contiguous");
    params.azp = static_cast<int32_t*>(azp->data_ptr());
  }
  const TokenQuant kind = quant_kind(q, azp.has_value());
  if (scale_ub) {
    STD_TORCH_CHECK(kind == TokenQuant::kE4M3, "scale_ub: goes with e4m3 only");
    check_scalar(*scale_ub, "scale_ub", x);
    params.scale_ub = static_cast<const float*>(scale_ub->data_ptr());
  }
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(token_quant(params, input_type(x), kind, current_stream(x.get_device_index())), "per_token_quant");
}

void per_tensor_quant(const Tensor& x, Tensor q, const Tensor& scale, const std::optional<Tensor>& azp, bool pdl) {
  TokenQuantParams params = row_params(x, q);
  check_scalar(scale, "scale", x);
  params.scale = static_cast<float*>(scale.data_ptr());
  if (azp) {
    check_scalar(*azp, "azp", x, ScalarType::Int);
    params.azp = static_cast<int32_t*>(azp->data_ptr());
  }
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(tensor_quant(params, input_type(x), quant_kind(q, azp.has_value()), current_stream(x.get_device_index())),
               "per_tensor_quant");
}

void static_group_quant(const Tensor& x, Tensor q, const Tensor& scale, int64_t group_rows, int64_t group_columns,
                        bool pdl) {
  const TokenQuantParams rows = row_params(x, q);
  STD_TORCH_CHECK(output_type(q) == OutputType::kE4M3, "q: takes float8_e4m3fn");
  STD_TORCH_CHECK(group_rows > 0 && rows.rows % group_rows == 0, "group_rows: takes a divisor of ", rows.rows, ", got ",
                  group_rows);
  STD_TORCH_CHECK((group_columns == 1 || (group_columns > 0 && group_columns % 16 == 0)) &&
                      rows.hidden_size % group_columns == 0,
                  "group_columns: takes 1 or a multiple of 16 that divides ", rows.hidden_size, ", got ", group_columns);
  const int64_t row_groups = rows.rows / group_rows, column_groups = rows.hidden_size / group_columns;
  check_type(scale, "scale", ScalarType::Float);
  const bool along_rows = scale.dim() == 1 && column_groups == 1, along_columns = scale.dim() == 1 && row_groups == 1;
  STD_TORCH_CHECK(scale.dim() == 2 ? scale.size(0) == row_groups && scale.size(1) == column_groups
                                   : (along_rows || along_columns) && scale.numel() == row_groups * column_groups,
                  "scale: takes [", row_groups, ", ", column_groups, "], or one dimension where the other one is 1");
  STD_TORCH_CHECK(scale.get_device_index() == x.get_device_index(), "scale: takes the device of x");
  StaticGroupQuantParams params = {};
  params.x = rows.x;
  params.q = rows.q;
  params.scale = static_cast<const float*>(scale.data_ptr());
  params.rows = rows.rows;
  params.hidden_size = rows.hidden_size;
  params.x_stride_row = rows.x_stride_row;
  params.q_stride_row = rows.q_stride_row;
  params.group_rows = group_rows;
  params.group_columns = group_columns;
  params.scale_stride_row = scale.dim() == 2 || along_rows ? scale.stride(0) : 0;
  params.scale_stride_column = scale.dim() == 2 ? scale.stride(1) : along_rows ? 0 : scale.stride(0);
  params.pdl = pdl;
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(vllm_b200::static_group_quant(params, input_type(x), current_stream(x.get_device_index())),
               "static_group_quant");
}

}  // namespace ops
}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) {
  m.impl("per_token_quant", TORCH_BOX(&vllm_b200::ops::per_token_quant));
  m.impl("per_tensor_quant", TORCH_BOX(&vllm_b200::ops::per_tensor_quant));
  m.impl("static_group_quant", TORCH_BOX(&vllm_b200::ops::static_group_quant));
}
