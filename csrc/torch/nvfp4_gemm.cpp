#include "../kernels/gemm/small_m_gemm.h"

#include <optional>
#include <vector>

#include "checks.h"

namespace vllm_b200 {

// The Python wrapper has named what is wrong in words; these checks keep a
// direct call of the op from reading or writing out of range.
void nvfp4_gemm_op(const Tensor& x, const Tensor& weight, const Tensor& weight_scale, const Tensor& weight_global_scale,
                   const std::optional<Tensor>& bias, Tensor out, bool swizzled, bool pdl,
                   const std::vector<int64_t>& config) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x and weight: take 2 dimensions");
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  check_shape(weight, "weight", {n, k / 2});
  check_shape(out, "out", {m, n});
  STD_TORCH_CHECK(m <= kSmallGemmMaxTokens, "x: takes at most ", kSmallGemmMaxTokens, " rows, got ", m);
  STD_TORCH_CHECK(n < (int64_t{1} << 30) && k < (int64_t{1} << 29), "weight: takes fewer than 2^30 rows and 2^28 bytes each");
  if (m == 0 || n == 0) return;
  STD_TORCH_CHECK(k > 0 && k % 64 == 0, "x: takes a multiple of 64 columns, got ", k);
  check_type(x, "x", ScalarType::BFloat16);
  check_type(weight, "weight", ScalarType::Byte);
  check_type(weight_scale, "weight_scale", ScalarType::Float8_e4m3fn);
  check_type(weight_global_scale, "weight_global_scale", ScalarType::Float);
  checked_rows(x, "x");
  checked_rows(weight, "weight");
  const int64_t groups = k / 16;
  if (swizzled) {
    check_shape(weight_scale, "weight_scale", {(n + 127) / 128 * 128, groups});
  } else {
    check_shape(weight_scale, "weight_scale", {n, groups});
  }
  STD_TORCH_CHECK(weight_scale.is_contiguous() && reinterpret_cast<uintptr_t>(weight_scale.data_ptr()) % 4 == 0,
                  "weight_scale: takes a contiguous tensor that starts at a multiple of 4 bytes");
  STD_TORCH_CHECK(weight_global_scale.is_contiguous() &&
                      (weight_global_scale.numel() == 1 || weight_global_scale.numel() == n),
                  "weight_global_scale: takes 1 or ", n, " contiguous elements");
  STD_TORCH_CHECK(out.stride(1) == 1, "out: takes a last stride of 1");

  SmallMGemmParams params = {};
  params.x = x.data_ptr();
  params.w = weight.data_ptr();
  params.y = out.data_ptr();
  params.x_stride = x.stride(0);
  params.w_stride = weight.stride(0);
  params.y_stride = out.stride(0);
  params.w_group_scale = weight_scale.data_ptr();
  params.w_group_tiled = swizzled;
  params.w_group_stride_row = swizzled ? 128 * groups : groups;
  params.w_scale = weight_global_scale.data_ptr();
  params.w_scale_stride_row = weight_global_scale.numel() == 1 ? 0 : 1;
  params.m = static_cast<int32_t>(m);
  params.n = static_cast<int32_t>(n);
  params.k = static_cast<int32_t>(k);
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == out.scalar_type() && bias->numel() == n && bias->is_contiguous(),
                    "bias: takes ", n, " elements of out's dtype");
    params.bias = bias->data_ptr();
  }
  params.pdl = pdl;
  switch (out.scalar_type()) {
    case ScalarType::BFloat16: params.output = GemmOutput::kBFloat16; break;
    case ScalarType::Half: params.output = GemmOutput::kHalf; break;
    case ScalarType::Float: params.output = GemmOutput::kFloat; break;
    default: STD_TORCH_CHECK(false, "out: takes bfloat16, float16 or float32");
  }
  STD_TORCH_CHECK(config.size() == 5 && config[4] == 0, "config: takes row_tiles, warps, cluster, chunks and no stages");
  const GemmConfig cut = {static_cast<int>(config[0]), static_cast<int>(config[1]), static_cast<int>(config[2]),
                          static_cast<int>(config[3])};
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(small_m_gemm(params, GemmFormat::kNvFp4, false, cut, current_stream(x.get_device_index())), "nvfp4_gemm");
}

}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) { m.impl("nvfp4_gemm", TORCH_BOX(&vllm_b200::nvfp4_gemm_op)); }
