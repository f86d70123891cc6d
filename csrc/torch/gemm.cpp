#include "../kernels/gemm/small_m_gemm.h"

#include <optional>
#include <vector>

#include "common.h"

namespace vllm_b200 {
namespace {

GemmOutput output_type(const Tensor& out) {
  switch (out.scalar_type()) {
    case ScalarType::BFloat16: return GemmOutput::kBFloat16;
    case ScalarType::Half: return GemmOutput::kHalf;
    case ScalarType::Float: return GemmOutput::kFloat;
    default: STD_TORCH_CHECK(false, "out: takes bfloat16, float16 or float32");
  }
}

GemmFormat weight_format(const Tensor& weight, bool block_scaled) {
  switch (weight.scalar_type()) {
    case ScalarType::Float8_e4m3fn: return block_scaled ? GemmFormat::kE4M3Block : GemmFormat::kE4M3;
    case ScalarType::Char: return GemmFormat::kInt8;
    case ScalarType::BFloat16: return GemmFormat::kBFloat16;
    case ScalarType::Half: return GemmFormat::kHalf;
    default: STD_TORCH_CHECK(false, "weight: takes float8_e4m3fn, int8, bfloat16 or float16");
  }
}

bool rows_aligned(const Tensor& t) {
  const int64_t size = static_cast<int64_t>(t.element_size());
  return reinterpret_cast<uintptr_t>(t.data_ptr()) % 16 == 0 && (t.size(0) < 2 || t.stride(0) * size % 16 == 0) &&
         t.size(1) * size % 16 == 0 && t.stride(1) == 1;
}

// A scale for each row, or one for all of them: the stride to take.
int64_t row_scale_stride(const Tensor& scale, int64_t rows, const char* name) {
  STD_TORCH_CHECK(scale.scalar_type() == ScalarType::Float, name, ": takes float32");
  STD_TORCH_CHECK(scale.numel() == 1 || scale.numel() == rows, name, ": takes 1 or ", rows, " elements, got ",
                  scale.numel());
  STD_TORCH_CHECK(scale.is_contiguous(), name, ": takes a contiguous tensor");
  return scale.numel() == 1 ? 0 : 1;
}

// fp32 [rows, groups] or packed UE8M0 int32 [rows, ceil(groups / 4)]. Returns whether it is packed.
bool check_group_scale(const Tensor& scale, int64_t rows, int64_t groups, const char* name) {
  const bool packed = scale.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(packed || scale.scalar_type() == ScalarType::Float, name, ": takes float32 or int32");
  const int64_t columns = packed ? (groups + 3) / 4 : groups;
  STD_TORCH_CHECK(scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == columns, name, ": takes ", rows,
                  " rows of ", columns, " columns");
  return packed;
}

}  // namespace

// The Python wrapper has named what is wrong in words; these checks keep a
// direct call of the op from reading or writing out of range.
void small_m_gemm_op(const Tensor& x, const std::optional<Tensor>& x_scale, const Tensor& weight,
                     const std::optional<Tensor>& weight_scale, const std::optional<Tensor>& bias, Tensor out,
                     bool block_scaled, bool ue8m0, bool pdl, const std::vector<int64_t>& config) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && out.dim() == 2, "x, weight and out: take 2 dimensions");
  const int64_t m = x.size(0), k = x.size(1), n = weight.size(0);
  STD_TORCH_CHECK(weight.size(1) == k && out.size(0) == m && out.size(1) == n, "takes x [M, K], weight [N, K], out [M, N]");
  STD_TORCH_CHECK(m <= kSmallGemmMaxTokens, "x: takes at most ", kSmallGemmMaxTokens, " rows, got ", m);
  STD_TORCH_CHECK(n < (int64_t{1} << 30) && k < (int64_t{1} << 29), "weight: takes fewer than 2^30 rows and 2^29 columns");
  if (m == 0 || n == 0) return;
  STD_TORCH_CHECK(k > 0, "x: takes at least one column");

  const GemmFormat format = weight_format(weight, block_scaled);
  STD_TORCH_CHECK(!block_scaled || format == GemmFormat::kE4M3Block, "weight: takes float8_e4m3fn with block scales");
  const bool quantize = format == GemmFormat::kE4M3Block && x.scalar_type() == ScalarType::BFloat16;
  STD_TORCH_CHECK(quantize || x.scalar_type() == weight.scalar_type(), "x: takes the dtype of weight");
  STD_TORCH_CHECK(rows_aligned(x), "x: takes rows that start at, and are, a multiple of 16 bytes");
  STD_TORCH_CHECK(rows_aligned(weight), "weight: takes rows that start at, and are, a multiple of 16 bytes");
  STD_TORCH_CHECK(out.stride(1) == 1, "out: takes a last stride of 1");
  const bool scaled = format != GemmFormat::kBFloat16 && format != GemmFormat::kHalf;
  STD_TORCH_CHECK(weight_scale.has_value() == scaled, "weight_scale: comes with an 8-bit weight, and only with one");
  STD_TORCH_CHECK(x_scale.has_value() == (scaled && !quantize), "x_scale: comes with an 8-bit x, and only with one");

  SmallMGemmParams params = {};
  params.x = x.data_ptr();
  params.w = weight.data_ptr();
  params.y = out.data_ptr();
  params.x_stride = x.stride(0);
  params.w_stride = weight.stride(0);
  params.y_stride = out.stride(0);
  params.m = static_cast<int32_t>(m);
  params.n = static_cast<int32_t>(n);
  params.k = static_cast<int32_t>(k);
  if (format == GemmFormat::kE4M3Block) {
    STD_TORCH_CHECK(k % 128 == 0, "x: takes a multiple of 128 columns with block scales, got ", k);
    STD_TORCH_CHECK(!quantize || m <= kSmallGemmMaxQuantizedTokens, "x: takes at most ", kSmallGemmMaxQuantizedTokens,
                    " bfloat16 rows, got ", m);
    const Tensor& scale = *weight_scale;
    // DeepGEMM's packed scales have a row for each row of the weight.
    params.w_scale_shift = scale.scalar_type() == ScalarType::Int ? 0 : 7;
    const int64_t scale_rows = ((n - 1) >> params.w_scale_shift) + 1;
    params.w_scale_packed = check_group_scale(scale, scale_rows, k / 128, "weight_scale");
    params.w_scale = scale.data_ptr();
    params.w_scale_stride_row = scale.stride(0);
    params.w_scale_stride_group = scale.stride(1);
    if (!quantize) {
      params.x_scale_packed = check_group_scale(*x_scale, m, k / 128, "x_scale");
      params.x_scale = x_scale->data_ptr();
      params.x_scale_stride_row = x_scale->stride(0);
      params.x_scale_stride_group = x_scale->stride(1);
    }
  } else if (scaled) {
    params.x_scale_stride_row = row_scale_stride(*x_scale, m, "x_scale");
    params.w_scale_stride_row = row_scale_stride(*weight_scale, n, "weight_scale");
    params.x_scale = x_scale->data_ptr();
    params.w_scale = weight_scale->data_ptr();
  }
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == out.scalar_type() && bias->numel() == n && bias->is_contiguous(),
                    "bias: takes ", n, " elements of out's dtype");
    params.bias = bias->data_ptr();
  }
  params.ue8m0 = ue8m0;
  params.eps = 1e-10f;
  params.pdl = pdl;
  params.output = output_type(out);

  STD_TORCH_CHECK(config.size() == 5, "config: takes row_tiles, warps, cluster, chunks and stages");
  GemmConfig cut;
  cut.row_tiles = static_cast<int>(config[0]);
  cut.warps = static_cast<int>(config[1]);
  cut.cluster = static_cast<int>(config[2]);
  cut.chunks = static_cast<int>(config[3]);
  cut.stages = static_cast<int>(config[4]);

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(small_m_gemm(params, format, quantize, cut, current_stream(x.get_device_index())), "small_m_gemm");
}

}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) { m.impl("small_m_gemm", TORCH_BOX(&vllm_b200::small_m_gemm_op)); }
