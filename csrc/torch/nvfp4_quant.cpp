#include "../kernels/quant/nvfp4_quant.h"

#include <algorithm>

#include "nvfp4.h"

namespace vllm_b200 {
namespace {

Nvfp4QuantParams nvfp4_params(const Tensor& x, const Tensor& q, const Tensor& scale, bool silu_and_mul, bool swizzled,
                              bool pdl) {
  STD_TORCH_CHECK(x.dim() == 2, "x: takes 2 dimensions, got ", x.dim());
  const Rows rows = checked_rows(x, "x");
  const int64_t halves = silu_and_mul ? 2 : 1, hidden_size = x.size(1) / halves;
  STD_TORCH_CHECK(x.size(1) % (halves * kNvfp4GroupSize) == 0, "x: the last dimension takes multiples of ",
                  halves * kNvfp4GroupSize, ", got ", x.size(1));
  check_nvfp4_layout(x, q, scale, swizzled);
  Nvfp4QuantParams params = {};
  params.x = x.data_ptr();
  params.q = static_cast<uint8_t*>(q.data_ptr());
  params.scale = static_cast<uint8_t*>(scale.data_ptr());
  params.rows = x.size(0);
  params.x_stride_row = rows.stride;
  params.hidden_size = static_cast<int32_t>(hidden_size);
  params.padded_size = static_cast<int32_t>(2 * q.size(1));
  params.groups = static_cast<int32_t>(scale.size(1));
  params.swizzled = swizzled;
  params.silu_and_mul = silu_and_mul;
  params.pdl = pdl;
  return params;
}

void launch(const Nvfp4QuantParams& params, const Tensor& x, const char* name) {
  const InputType input = input_type(x);
  STD_TORCH_CHECK(input != InputType::kFloat || (!params.silu_and_mul && params.expert_offsets == nullptr),
                  "x: takes bfloat16 or float16 here");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(nvfp4_quant(params, input, current_stream(x.get_device_index())), name);
}

}  // namespace

namespace ops {

void nvfp4_quant(const Tensor& x, const Tensor& global_scale, Tensor q, Tensor scale, bool swizzled, bool silu_and_mul,
                 bool pdl) {
  Nvfp4QuantParams params = nvfp4_params(x, q, scale, silu_and_mul, swizzled, pdl);
  check_nvfp4_outputs(x, params.hidden_size, q, scale, swizzled);
  check_scalar(global_scale, "global_scale", x);
  params.global_scale = static_cast<const float*>(global_scale.data_ptr());
  launch(params, x, "nvfp4_quant");
}

void nvfp4_experts_quant(const Tensor& x, const Tensor& global_scale, const Tensor& expert_offsets,
                         const Tensor& scale_offsets, Tensor q, Tensor scale, bool silu_and_mul, bool pdl) {
  Nvfp4QuantParams params = nvfp4_params(x, q, scale, silu_and_mul, true, pdl);
  check_type(global_scale, "global_scale", ScalarType::Float);
  const int64_t num_experts = global_scale.numel();
  check_shape(global_scale, "global_scale", {num_experts});
  for (const Tensor* offsets : {&expert_offsets, &scale_offsets}) {
    check_type(*offsets, "expert_offsets and scale_offsets", ScalarType::Int);
    check_shape(*offsets, "expert_offsets and scale_offsets", {num_experts + 1});
    STD_TORCH_CHECK(offsets->is_contiguous() && offsets->get_device_index() == x.get_device_index(),
                    "expert_offsets and scale_offsets: are contiguous, on the device of x");
  }
  STD_TORCH_CHECK(global_scale.is_contiguous() && global_scale.get_device_index() == x.get_device_index(),
                  "global_scale: is contiguous, on the device of x");
  STD_TORCH_CHECK(params.padded_size == params.hidden_size, "q: takes ", params.hidden_size / 2, " columns, got ",
                  q.size(1));
  params.global_scale = static_cast<const float*>(global_scale.data_ptr());
  params.expert_offsets = static_cast<const int32_t*>(expert_offsets.data_ptr());
  params.scale_offsets = static_cast<const int32_t*>(scale_offsets.data_ptr());
  params.num_experts = static_cast<int32_t>(num_experts);
  // No routing needs more tiles than this, whatever there is room for.
  const int64_t most = (params.rows + (kNvfp4TileRows - 1) * std::min(params.rows, num_experts)) / kNvfp4TileRows;
  params.scale_tiles = std::min(scale.size(0) / kNvfp4TileRows, most);
  launch(params, x, "nvfp4_experts_quant");
}

// MXFP4 where q holds bytes, MXFP8 where it holds e4m3.
void mx_quant(const Tensor& x, Tensor q, Tensor scale, bool swizzled, bool pdl) {
  STD_TORCH_CHECK(x.dim() == 2, "x: takes 2 dimensions, got ", x.dim());
  const Rows rows = checked_rows(x, "x");
  const int64_t hidden_size = x.size(1), groups = hidden_size / 32;
  STD_TORCH_CHECK(hidden_size % 32 == 0 && hidden_size < (int64_t{1} << 30), "x: the last dimension takes multiples of 32",
                  ", got ", hidden_size);
  const bool fp8 = q.scalar_type() == ScalarType::Float8_e4m3fn;
  if (!fp8) check_type(q, "q", ScalarType::Byte);
  check_type(scale, "scale", ScalarType::Byte);
  check_shape(q, "q", {x.size(0), fp8 ? hidden_size : hidden_size / 2});
  check_shape(scale, "scale",
              {round_up_to(x.size(0), swizzled ? kNvfp4TileRows : 1), round_up_to(groups, swizzled ? kNvfp4TileGroups : 1)});
  STD_TORCH_CHECK(q.is_contiguous() && scale.is_contiguous(), "q and scale: are contiguous");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(scale.data_ptr()) % (swizzled ? 4 : 1) == 0,
                  "q and scale: start at multiples of 16 and 4 bytes");
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index() && x.get_device_index() == scale.get_device_index(),
                  "x, q and scale: take one device");
  Nvfp4QuantParams params = {};
  params.x = x.data_ptr();
  params.q = static_cast<uint8_t*>(q.data_ptr());
  params.scale = static_cast<uint8_t*>(scale.data_ptr());
  params.rows = x.size(0);
  params.x_stride_row = rows.stride;
  params.hidden_size = params.padded_size = static_cast<int32_t>(hidden_size);
  params.groups = static_cast<int32_t>(scale.size(1));
  params.swizzled = swizzled;
  params.pdl = pdl;
  const InputType input = input_type(x);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(vllm_b200::mx_quant(params, input, fp8, current_stream(x.get_device_index())), "mx_quant");
}

}  // namespace ops
}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) {
  m.impl("nvfp4_quant", TORCH_BOX(&vllm_b200::ops::nvfp4_quant));
  m.impl("mx_quant", TORCH_BOX(&vllm_b200::ops::mx_quant));
  m.impl("nvfp4_experts_quant", TORCH_BOX(&vllm_b200::ops::nvfp4_experts_quant));
}
