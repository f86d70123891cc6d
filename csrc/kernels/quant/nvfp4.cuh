#pragma once

#include "e2m1.cuh"
#include "quantizers.cuh"

// From a chunk of 16 elements in a lane's registers to the scale of its group and to its packed numbers, in NVFP4, MXFP4
// and MXFP8; vllm_b200_plugin/ops/nvfp4_quant.py and mx_quant.py have the arithmetic.

namespace vllm_b200 {

constexpr int kTileRows = 128, kTileGroups = 4;  // of the swizzled scales

struct GroupScale {
  uint32_t byte;
  float factor;  // what the elements are multiplied with
};

template <typename In>
__device__ __forceinline__ uint2 pack_e2m1(const Chunk<In>& chunk, float factor) {
  float y[2][8];
#pragma unroll
  for (int i = 0; i < kChunk / 2; ++i) {
    const float2 pair = unpack_pair(chunk, i);
    y[i / 4][i % 4 * 2] = __fmul_rn(pair.x, factor), y[i / 4][i % 4 * 2 + 1] = __fmul_rn(pair.y, factor);
  }
  return {pack_e2m1(y[0]), pack_e2m1(y[1])};
}

struct Nvfp4 {
  using Packed = uint2;  // of a chunk
  static constexpr int kLanesPerGroup = 1;
  static constexpr bool kHasGlobalScale = true;

  // amax: bits of the group's absolute maximum.
  static __device__ __forceinline__ GroupScale scale(uint32_t amax, float global_scale, float global_reciprocal) {
    constexpr float kReciprocalOfMax = 1.0f / 6.0f;
    const float scale = __fmul_rn(global_scale, __fmul_rn(__uint_as_float(amax), kReciprocalOfMax));
    const __nv_fp8_storage_t byte = __nv_cvt_float_to_fp8(scale, __NV_SATFINITE, __NV_E4M3);
    const float rounded = __half2float(__half(__nv_cvt_fp8_to_halfraw(byte, __NV_E4M3)));
    return {byte, rounded == 0.0f ? 0.0f : __frcp_rn(__fmul_rn(rounded, global_reciprocal))};
  }
  template <typename In>
  static __device__ __forceinline__ Packed pack(const Chunk<In>& chunk, float factor) {
    return pack_e2m1(chunk, factor);
  }
};

struct Mxfp4 {
  using Packed = uint2;
  static constexpr int kLanesPerGroup = 2;
  static constexpr bool kHasGlobalScale = false;

  static __device__ __forceinline__ GroupScale scale(uint32_t amax, float, float) {
    if (amax > 0x7f800000u) return {255, __uint_as_float(0x7fffffffu)};
    // A maximum from 1.75 times a power of two on counts as the next one, whose quarter the scale is.
    const int exponent = max(static_cast<int>((amax + 0x200000u) >> 23) - 2, 0);
    return {static_cast<uint32_t>(exponent), exponent == 0 ? 0.0f : __uint_as_float((254u - exponent) << 23)};
  }
  template <typename In>
  static __device__ __forceinline__ Packed pack(const Chunk<In>& chunk, float factor) {
    return pack_e2m1(chunk, factor);
  }
};

struct Mxfp8 {
  using Packed = uint4;
  static constexpr int kLanesPerGroup = 2;
  static constexpr bool kHasGlobalScale = false;

  // The smallest power of two not below amax / 448, from 2^-127 to 2^127.
  static __device__ __forceinline__ GroupScale scale(uint32_t amax, float, float) {
    if (amax > 0x7f800000u) return {255, __uint_as_float(0x7fffffffu)};
    const uint32_t least = __float_as_uint(__fdiv_rn(__uint_as_float(amax), 448.0f));
    const uint32_t exponent = least <= 0x400000u ? 0 : min((least + 0x7fffffu) >> 23, 254u);
    return {exponent, exponent == 254 ? __uint_as_float(0x400000u) : __uint_as_float((254u - exponent) << 23)};
  }
  template <typename In>
  static __device__ __forceinline__ Packed pack(const Chunk<In>& chunk, float factor) {
    Packed packed;
    quantize_chunk(chunk, Multiplier(factor), reinterpret_cast<__nv_fp8_e4m3*>(&packed));
    return packed;
  }
};

// In words of the four scales of a row in a tile.
__device__ __forceinline__ int64_t swizzled_offset(int64_t tile, int row_in_tile) {
  return tile * kTileRows + row_in_tile % 32 * 4 + row_in_tile / 32;
}

}  // namespace vllm_b200
