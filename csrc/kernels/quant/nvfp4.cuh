#pragma once

#include "e2m1.cuh"
#include "quantizers.cuh"

// From a group of 16 elements in a lane's registers to its e4m3 scale and its e2m1 numbers;
// vllm_b200_plugin/ops/nvfp4_quant.py has the arithmetic.

namespace vllm_b200 {

constexpr int kTileRows = 128, kTileGroups = 4;  // of the swizzled scales

struct GroupScale {
  uint32_t byte;  // e4m3
  float factor;   // what the elements are multiplied with

  // amax: bits of the group's absolute maximum.
  __device__ __forceinline__ GroupScale(uint32_t amax, float global_scale, float global_reciprocal) {
    constexpr float kReciprocalOfMax = 1.0f / 6.0f;
    const float scale = __fmul_rn(global_scale, __fmul_rn(__uint_as_float(amax), kReciprocalOfMax));
    byte = __nv_cvt_float_to_fp8(scale, __NV_SATFINITE, __NV_E4M3);
    const float rounded = __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
    factor = rounded == 0.0f ? 0.0f : __frcp_rn(__fmul_rn(rounded, global_reciprocal));
  }
};

template <typename In>
__device__ __forceinline__ uint2 quantize_nvfp4(const Chunk<In>& chunk, float factor) {
  float y[2][8];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const float2 pair = unpack_pair(chunk, i);
    y[i / 4][i % 4 * 2] = __fmul_rn(pair.x, factor), y[i / 4][i % 4 * 2 + 1] = __fmul_rn(pair.y, factor);
  }
  return {pack_e2m1(y[0]), pack_e2m1(y[1])};
}

// In words of the four scales of a row in a tile.
__device__ __forceinline__ int64_t swizzled_offset(int64_t tile, int row_in_tile) {
  return tile * kTileRows + row_in_tile % 32 * 4 + row_in_tile / 32;
}

}  // namespace vllm_b200
