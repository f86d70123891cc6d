#pragma once

#include "group_quant.h"
#include "token_quant.h"

namespace vllm_b200 {

// Of the base: x is [batches, rows, 2 * hidden_size], the activated half first; q and scale are as they are there.
struct GatedGroupQuantParams : GroupQuantParams {
  ActivationParams activation;
  // Masked form: rows of each batch that are valid, [batches] or null for all. What lies behind them is left alone.
  const int32_t* valid_rows;
  int64_t valid_rows_stride;
  bool valid_rows_are_vectors;  // set by the launcher
};

// Group quantisation of a gated activation, all of it fp32; int8 is rounded to nearest here. Group size 64 or 128; x and
// q are 16-byte aligned in every row.
cudaError_t gated_group_quant(const GatedGroupQuantParams& params, InputType input, OutputType output, ScaleType scale,
                              Activation activation, cudaStream_t stream);

// The same of the valid rows alone, silu only, batches <= 1024; a grid of one size for any counts.
cudaError_t masked_gated_group_quant(const GatedGroupQuantParams& params, InputType input, OutputType output,
                                     ScaleType scale, cudaStream_t stream);

}  // namespace vllm_b200
