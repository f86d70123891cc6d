#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "types.h"

namespace vllm_b200 {

enum class TokenQuant {
  kE4M3,            // scale = max(min(amax, upper bound) / 448, 1 / (448 * 512)), q = x / scale
  kInt8,            // scale = amax / 127, q = x * (127 / amax)
  kInt8Asymmetric,  // scale = (max - min) / 255, azp = -128 - min / scale, q = x * (1 / scale) + azp
};

enum class Activation { kNone, kSilu, kSiluClamped, kGelu, kGeluTanh };

// Of the gated activations: with g and u the two halves of a row, act(g) * u, or for kSiluClamped
// g' * sigmoid(alpha * g') * (u' + beta) with g' = min(g, limit), u' = u clamped to +-limit.
struct ActivationParams {
  float limit, alpha, beta;
};

// x [rows, hidden_size], or [rows, 2 * hidden_size] with an activation; q [rows, hidden_size]. Strides in elements.
struct TokenQuantParams {
  const void* x;
  void* q;
  float* scale;           // [rows] to write, or [1] to read
  int32_t* azp;           // likewise, of the asymmetric kinds
  const float* scale_ub;  // [1] or null
  int64_t rows;
  int64_t hidden_size;  // a multiple of 16
  int64_t x_stride_row, q_stride_row;
  ActivationParams activation;
  bool pdl;  // launch with programmatic stream serialization
};

constexpr int64_t kMaxTokenQuantHiddenSize = 32768;

// One scale a row, found here. x and q are 16-byte aligned in every row.
cudaError_t token_quant(const TokenQuantParams& params, InputType input, TokenQuant kind, cudaStream_t stream);
cudaError_t gated_token_quant(const TokenQuantParams& params, InputType input, Activation activation, TokenQuant kind,
                              cudaStream_t stream);

// One given scale for all: e4m3 x * (1 / scale), int8 x / scale, int8 asymmetric x * (1 / scale) + azp. Any hidden size.
cudaError_t tensor_quant(const TokenQuantParams& params, InputType input, TokenQuant kind, cudaStream_t stream);
cudaError_t gated_tensor_quant(const TokenQuantParams& params, InputType input, Activation activation, TokenQuant kind,
                               cudaStream_t stream);

// e4m3 x * (1 / scale) with one given scale for group_rows x group_columns elements; strides in elements.
struct StaticGroupQuantParams {
  const void* x;
  void* q;
  const float* scale;  // [row groups, column groups]
  int64_t rows;
  int64_t hidden_size;  // a multiple of 16
  int64_t x_stride_row, q_stride_row;
  int64_t group_rows, group_columns;  // columns: 1 or a multiple of 16
  int64_t scale_stride_row, scale_stride_column;
  bool pdl;  // launch with programmatic stream serialization
};

// x and q are 16-byte aligned in every row.
cudaError_t static_group_quant(const StaticGroupQuantParams& params, InputType input, cudaStream_t stream);

}  // namespace vllm_b200
