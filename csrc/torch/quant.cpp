#include "quant.h"

#include "../kernels/quant/group_quant.h"
#include "checks.h"

namespace vllm_b200 {
// The Python wrapper has named what is wrong in words; these checks keep a
// direct call of the op from reading or writing out of range.
void per_token_group_quant(const Tensor& x, Tensor q, Tensor scale, int64_t group_size, double eps, bool ue8m0, bool pad,
                           bool pdl) {
  const int64_t dim = x.dim();
  STD_TORCH_CHECK(dim == 2 || dim == 3, "x: takes 2 or 3 dimensions, got ", dim);
  STD_TORCH_CHECK(q.dim() == dim && scale.dim() == dim, "q and scale: take as many dimensions as x, ", dim);
  STD_TORCH_CHECK(group_size == 32 || group_size == 64 || group_size == 128,
                  "group_size: takes 32, 64 or 128, got ", group_size);
  STD_TORCH_CHECK(eps >= 1e-20 && eps <= 1.0, "eps: takes 1e-20 to 1, got ", eps);
  const int64_t hidden_size = x.size(-1), rows = x.size(-2), batches = dim == 3 ? x.size(0) : 1;
  STD_TORCH_CHECK(hidden_size % group_size == 0 && hidden_size < (int64_t{1} << 31), "x: the last dimension, ",
                  hidden_size, ", takes multiples of group_size, ", group_size, ", below 2^31");

  const bool packed = scale.scalar_type() == ScalarType::Int;
  STD_TORCH_CHECK(packed || scale.scalar_type() == ScalarType::Float, "scale: takes float32 or int32");
  STD_TORCH_CHECK(!packed || ue8m0, "ue8m0: packed scales are UE8M0, got False");
  const int64_t groups = hidden_size / group_size, columns = packed ? (groups + 3) / 4 : groups;
  STD_TORCH_CHECK(q.size(-1) == hidden_size && q.size(-2) == rows && (dim == 2 || q.size(0) == batches),
                  "q: takes the shape of x");
  STD_TORCH_CHECK(scale.size(-1) == columns && scale.size(-2) == rows && (dim == 2 || scale.size(0) == batches),
                  "scale: takes ", rows, " rows of ", columns, " columns");
  STD_TORCH_CHECK(x.numel() == 0 || (x.stride(-1) == 1 && q.stride(-1) == 1), "x and q: take a last stride of 1");
  if (x.numel() == 0) return;
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(q.data_ptr()) % 16 == 0 && (rows < 2 || q.stride(-2) % 16 == 0) &&
                      (batches < 2 || q.stride(0) % 16 == 0),
                  "q: takes rows that start at a multiple of 16 bytes");
  STD_TORCH_CHECK(x.get_device_index() == q.get_device_index() && x.get_device_index() == scale.get_device_index(),
                  "x, q and scale: take one device");

  const int64_t aligned_rows = (rows + 3) / 4 * 4;
  const bool has_padding = scale.stride(-2) == 1 && scale.stride(-1) == aligned_rows;

  GroupQuantParams params = {};
  params.x = x.data_ptr();
  params.q = q.data_ptr();
  params.scale = scale.data_ptr();
  params.batches = batches;
  params.rows = rows;
  params.padded_rows = pad && has_padding ? aligned_rows : rows;
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
  params.pdl = pdl;
  const ScaleType scale_type = packed  ? ScaleType::kPackedUE8M0
                               : ue8m0 ? ScaleType::kFloatPow2
                                       : ScaleType::kFloat;

  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  check_launch(group_quant(params, input_type(x), output_type(q), scale_type, current_stream(x.get_device_index())),
               "per_token_group_quant");
}

}  // namespace vllm_b200

STABLE_TORCH_LIBRARY_IMPL(vllm_b200, CUDA, m) {
  m.impl("per_token_group_quant", TORCH_BOX(&vllm_b200::per_token_group_quant));
}
