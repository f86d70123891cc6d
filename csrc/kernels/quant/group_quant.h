#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace vllm_b200 {

// x [batches, rows, hidden_size], q likewise, scale [batches, rows, columns]:
// a column is a group, or four groups when the scales are packed.
// Strides in elements of the tensor they belong to.
struct GroupQuantParams {
  const void* x;
  void* q;
  void* scale;
  int64_t batches;
  int64_t rows;
  int64_t padded_rows;  // rows of scale to write; those from `rows` on get 0
  int32_t hidden_size;
  int32_t group_size;  // 32, 64 or 128, divides hidden_size
  int64_t x_stride_batch, x_stride_row;
  int64_t q_stride_batch, q_stride_row;
  int64_t scale_stride_batch, scale_stride_row, scale_stride_column;
  int64_t scale_capacity;  // elements from `scale` to the end of its storage
  float eps;               // lower bound of amax, at least 1e-20
  bool pdl;                // launch with programmatic stream serialization
};

// q = x / scale to nearest e4m3 or toward zero int8, scale = max(amax, eps) / qmax per group of a row.
// q must be 16-byte aligned in every row; x may have any alignment.
cudaError_t group_quant(const GroupQuantParams& params, InputType input, OutputType output, ScaleType scale,
                        cudaStream_t stream);

}  // namespace vllm_b200
