#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "mma.cuh"

// NVFP4 weights to bf16, exactly: e2m1 times its e4m3 scale has six significant bits.

namespace vllm_b200 {

// What a product of e2m1_times_scale is short of: e2m1's bits in bf16's place are worth 2^-126 of e2m1, the scale, as
// much as bf16 can hold of it, 2^118 times what it is.
constexpr float kNvFp4Unit = 256.0f;

// Two e4m3 scales, each as both halves of a word, times 2^118. NaN stays NaN.
__device__ __forceinline__ void e4m3_scales(uint32_t pair, uint32_t (&scale)[2]) {
  uint32_t halves;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %1;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "}"
      : "=r"(halves)
      : "r"(pair));
  const float2 wide = __half22float2(reinterpret_cast<const __half2&>(halves));
  const __nv_bfloat162 first = __float2bfloat162_rn(wide.x * 0x1p118f), second = __float2bfloat162_rn(wide.y * 0x1p118f);
  scale[0] = reinterpret_cast<const uint32_t&>(first);
  scale[1] = reinterpret_cast<const uint32_t&>(second);
}

// Eight e2m1, the first in the lowest bits, times `scale`: elements i and i + 4 in out[i]. A product with two powers of
// two puts a nibble's sign and its other bits where bf16 has them, without a carry.
__device__ __forceinline__ void e2m1_times_scale(uint32_t word, uint32_t scale, uint32_t (&out)[4]) {
  constexpr uint32_t kEven = 0x000f000fu, kOdd = 0x00f000f0u, kBits = 0x81c081c0u;
  const uint32_t upper = word >> 8;
  out[0] = (word & kEven) * 0x1040u & kBits;
  out[1] = (word & kOdd) * 0x0104u & kBits;
  out[2] = (upper & kEven) * 0x1040u & kBits;
  out[3] = (upper & kOdd) * 0x0104u & kBits;
#pragma unroll
  for (int i = 0; i < 4; ++i) asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(out[i]) : "r"(scale));
}

// 32 elements of a row of x in the order in which e2m1_times_scale leaves w.
struct NvFp4XFragment {
  uint32_t word[16];

  NvFp4XFragment() = default;
  __device__ __forceinline__ explicit NvFp4XFragment(const uint4 (&eights)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      word[4 * i] = __byte_perm(eights[i].x, eights[i].z, 0x5410);
      word[4 * i + 1] = __byte_perm(eights[i].x, eights[i].z, 0x7632);
      word[4 * i + 2] = __byte_perm(eights[i].y, eights[i].w, 0x5410);
      word[4 * i + 3] = __byte_perm(eights[i].y, eights[i].w, 0x7632);
    }
  }
};

// c += w x^T over 32 elements of each lane, rows g (top) and g + 8 (bottom) of w; the scales are those of its two groups
// of 16, two bytes.
template <int kTokenTiles>
__device__ __forceinline__ void multiply_nvfp4(float (&c)[kTokenTiles][4], uint4 top, uint4 bottom, uint32_t top_scales,
                                               uint32_t bottom_scales, const NvFp4XFragment (&x)[kTokenTiles]) {
  const uint32_t upper[4] = {top.x, top.y, top.z, top.w}, lower[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
  uint32_t upper_scale[2], lower_scale[2];
  e4m3_scales(top_scales, upper_scale);
  e4m3_scales(bottom_scales, lower_scale);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint32_t a[4], b[4];
    e2m1_times_scale(upper[i], upper_scale[i / 2], a);
    e2m1_times_scale(lower[i], lower_scale[i / 2], b);
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      mma_bf16(c[t], a[0], b[0], a[1], b[1], x[t].word[4 * i], x[t].word[4 * i + 1]);
      mma_bf16(c[t], a[2], b[2], a[3], b[3], x[t].word[4 * i + 2], x[t].word[4 * i + 3]);
    }
  }
}

}  // namespace vllm_b200
