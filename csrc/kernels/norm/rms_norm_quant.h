#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../quant/token_quant.h"
#include "../quant/types.h"

namespace vllm_b200 {

// x, residual, q [rows, hidden_size], weight [hidden_size]; strides in elements. All in fp32 but for the roundings named:
//   sum      = x + residual, which goes back to residual rounded to its type
//   rstd     = 1 / sqrt(mean(sum^2) + norm_eps)
//   y        = round(round(sum * rstd) * weight), with gemma round(sum * rstd * (1 + weight))
// and then y is quantised as group_quant, token_quant or tensor_quant do. The squares are added in a tree of neighbours
// over 512 columns, and these sums in four chains, whatever the launch: a row's result does not depend on the others.
struct RmsNormQuantParams {
  const void* x;
  void* residual;  // or null
  const void* weight;
  void* q;
  void* scale;            // to write; for tensor_quant [1] to read
  const float* scale_ub;  // token_quant: [1] or null
  const float* global_scale;  // nvfp4: [1]
  int64_t rows;
  int64_t padded_rows;  // group_quant: rows of scale to write; those from `rows` on get 0
  int32_t hidden_size;  // a multiple of 16 and of the group size, at most 16384
  int32_t group_size;   // 64 or 128
  int64_t x_stride_row, residual_stride_row, q_stride_row;
  int64_t scale_stride_row, scale_stride_column;
  int64_t scale_capacity;  // elements from `scale` to the end of its storage
  float norm_eps;
  float eps;  // group_quant: lower bound of amax
  bool gemma;
  bool pdl;  // launch with programmatic stream serialization
};

constexpr int64_t kMaxNormHiddenSize = 16384;

// Every row of x, residual, q and the weight are 16-byte aligned. int8 is rounded to nearest.
cudaError_t rms_norm_group_quant(const RmsNormQuantParams& params, InputType input, OutputType output, ScaleType scale,
                                 cudaStream_t stream);
cudaError_t rms_norm_token_quant(const RmsNormQuantParams& params, InputType input, OutputType output,
                                 cudaStream_t stream);
// The scales in rows of hidden_size / 16 bytes or in tiles, see nvfp4_quant.h; q [rows, hidden_size / 2], contiguous.
cudaError_t rms_norm_nvfp4_quant(const RmsNormQuantParams& params, InputType input, bool swizzled, cudaStream_t stream);
cudaError_t rms_norm_tensor_quant(const RmsNormQuantParams& params, InputType input, OutputType output,
                                  cudaStream_t stream);

}  // namespace vllm_b200
