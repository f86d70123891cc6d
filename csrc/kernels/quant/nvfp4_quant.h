#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace vllm_b200 {

// x [rows, hidden_size], or [rows, 2 * hidden_size] for silu_and_mul; q [rows, padded_size / 2] bytes; a scale of one byte
// for every 16 elements: [rows, groups], or tiles of 128 rows by 4 groups, byte m % 32 * 16 + m / 32 * 4 + g in each.
// q and scale are contiguous. vllm_b200_plugin/ops/nvfp4_quant.py has the arithmetic.
struct Nvfp4QuantParams {
  const void* x;
  uint8_t* q;
  uint8_t* scale;
  const float* global_scale;  // [1], or [num_experts]
  int64_t rows;
  int64_t x_stride_row;  // in elements; every row begins at a multiple of 16 bytes
  int32_t hidden_size;   // a multiple of 16
  int32_t padded_size;   // columns of q; those from hidden_size on get 0
  int32_t groups;        // columns of scale, with swizzled scales a multiple of 4
  bool swizzled;
  bool silu_and_mul;  // first silu(gate) * up, gate the first half of a row, rounded to the type of x
  bool pdl;           // launch with programmatic stream serialization
  // Rows sorted by expert, or null. Expert e has rows expert_offsets[e] to expert_offsets[e + 1], and scales from row
  // scale_offsets[e] on, which is a multiple of 128; scales are swizzled.
  const int32_t* expert_offsets;
  const int32_t* scale_offsets;
  int32_t num_experts;
  int64_t scale_tiles;  // of 128 rows that `scale` has room for
};

cudaError_t nvfp4_quant(const Nvfp4QuantParams& params, InputType input, cudaStream_t stream);

// The same with groups of 32 and UE8M0 scales, without a global scale, silu_and_mul or experts: MXFP4, or MXFP8 with
// q [rows, padded_size]. Sizes are multiples of 32. vllm_b200_plugin/ops/mx_quant.py has the arithmetic.
cudaError_t mx_quant(const Nvfp4QuantParams& params, InputType input, bool fp8, cudaStream_t stream);

}  // namespace vllm_b200
