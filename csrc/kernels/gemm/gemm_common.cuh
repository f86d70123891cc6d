#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "nvfp4.cuh"
#include "small_m_gemm.h"

// What the kernels behind small_m_gemm share: the scales' layouts and the last step of a result.

namespace vllm_b200 {

constexpr int kPiece = 128;  // bytes of K that a warp multiplies in one step; the scale group of e4m3

__device__ __forceinline__ float e8m0_to_float(uint32_t exponent) {
  return __uint_as_float(exponent == 0 ? 0x00400000u : exponent == 255 ? 0x7fffffffu : exponent << 23);
}

__device__ __forceinline__ float load_scale(const void* scale, bool packed, int64_t row_offset, int group,
                                            int64_t stride_group) {
  if (!packed) return static_cast<const float*>(scale)[row_offset + group * stride_group];
  const uint32_t word = static_cast<const uint32_t*>(scale)[row_offset + group / 4 * stride_group];
  return e8m0_to_float(word >> group % 4 * 8 & 0xff);
}

template <typename T>
__device__ __forceinline__ void store_output(const SmallMGemmParams& p, int token, int row, float value) {
  if (p.bias != nullptr) value += static_cast<float>(static_cast<const T*>(p.bias)[row]);
  static_cast<T*>(p.y)[token * p.y_stride + row] = static_cast<T>(value);
}

template <GemmFormat kFormat>
constexpr int kElementBits = kFormat == GemmFormat::kBFloat16 || kFormat == GemmFormat::kHalf ? 16
                             : kFormat == GemmFormat::kNvFp4                                  ? 4
                                                                                              : 8;

// What a result is multiplied by: nothing where the scales belong to blocks.
template <GemmFormat kFormat>
struct ResultScale {
  static constexpr bool kRowScaled =
      kFormat == GemmFormat::kE4M3 || kFormat == GemmFormat::kInt8 || kFormat == GemmFormat::kNvFp4;
  static constexpr bool kTokenScaled = kRowScaled && kFormat != GemmFormat::kNvFp4;
  float row, token;

  __device__ __forceinline__ void load(const SmallMGemmParams& p, int token_index, int row_index) {
    if constexpr (kRowScaled) row = static_cast<const float*>(p.w_scale)[row_index * p.w_scale_stride_row];
    if constexpr (kTokenScaled) token = static_cast<const float*>(p.x_scale)[token_index * p.x_scale_stride_row];
  }
  __device__ __forceinline__ float apply(float value) const {
    if constexpr (kFormat == GemmFormat::kNvFp4) value *= kNvFp4Unit;
    if constexpr (kRowScaled) value *= row;
    if constexpr (kTokenScaled) value *= token;
    return value;
  }
};

// One result, scaled, with the bias to y.
__device__ __forceinline__ void store_result(const SmallMGemmParams& p, int token, int row, float value) {
  switch (p.output) {
    case GemmOutput::kBFloat16: store_output<__nv_bfloat16>(p, token, row, value); break;
    case GemmOutput::kHalf: store_output<__half>(p, token, row, value); break;
    case GemmOutput::kFloat: store_output<float>(p, token, row, value); break;
  }
}

}  // namespace vllm_b200
