#pragma once

#include <cuda_fp8.h>

#include <cstdint>

#include "small_m_gemm.h"

// Products of 16 rows of w with 8 rows of x over 64 bytes of K, on tensor cores, with instructions that every GPU from
// Hopper on has.
//
// The order of K does not matter to a sum as long as both operands agree on it, so a lane takes 16 consecutive bytes of
// each of its rows instead of the scattered pieces that the instruction's layout names.

namespace vllm_b200 {

// c += a b^T for 16 rows of a and 8 of b; lane 4 g + t holds rows g and g + 8 of a, row g of b, and of c columns 2 t and
// 2 t + 1 in rows g (c[0], c[1]) and g + 8 (c[2], c[3]).
__device__ __forceinline__ void mma_bf16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_f16(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                        uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_s8(int32_t (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                       uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Four e4m3 to four fp16, exactly; NaN stays NaN.
__device__ __forceinline__ uint2 e4m3_to_f16(uint32_t word) {
  uint2 halves;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(halves.x), "=r"(halves.y)
      : "r"(word));
  return halves;
}

template <GemmFormat kFormat>
struct Mma {
  using Accumulator = float;
  static constexpr bool kE4M3 = kFormat == GemmFormat::kE4M3Block || kFormat == GemmFormat::kE4M3;

  // 64 bytes of each of 8 rows of x as the instruction takes them. e4m3 is widened to fp16, which holds it exactly:
  // Hopper has no e4m3 form of this instruction and would widen both operands anew every time.
  struct XFragment {
    uint32_t word[kE4M3 ? 8 : 4];

    XFragment() = default;

    // Widened before.
    __device__ __forceinline__ XFragment(uint4 low, uint4 high)
        : word{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w} {}

    __device__ __forceinline__ explicit XFragment(uint4 bytes) {
      const uint32_t source[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if constexpr (kE4M3) {
          const uint2 halves = e4m3_to_f16(source[i]);
          word[2 * i] = halves.x, word[2 * i + 1] = halves.y;
        } else {
          word[i] = source[i];
        }
      }
    }
  };

  // 64 bytes of rows g (top) and g + 8 (bottom) of w.
  template <int kTokenTiles>
  static __device__ __forceinline__ void multiply(Accumulator (&c)[kTokenTiles][4], uint4 top, uint4 bottom,
                                                  const XFragment (&x)[kTokenTiles]) {
    const uint32_t upper[4] = {top.x, top.y, top.z, top.w}, lower[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
    if constexpr (kE4M3) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint2 a = e4m3_to_f16(upper[i]), b = e4m3_to_f16(lower[i]);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) mma_f16(c[t], a.x, b.x, a.y, b.y, x[t].word[2 * i], x[t].word[2 * i + 1]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 4; i += 2) {
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
          if constexpr (kFormat == GemmFormat::kBFloat16) {
            mma_bf16(c[t], upper[i], lower[i], upper[i + 1], lower[i + 1], x[t].word[i], x[t].word[i + 1]);
          } else {
            mma_f16(c[t], upper[i], lower[i], upper[i + 1], lower[i + 1], x[t].word[i], x[t].word[i + 1]);
          }
        }
      }
    }
  }
};

template <>
struct Mma<GemmFormat::kInt8> {
  using Accumulator = int32_t;

  struct XFragment {
    uint32_t word[4];

    XFragment() = default;
    __device__ __forceinline__ explicit XFragment(uint4 bytes) : word{bytes.x, bytes.y, bytes.z, bytes.w} {}
  };

  template <int kTokenTiles>
  static __device__ __forceinline__ void multiply(Accumulator (&c)[kTokenTiles][4], uint4 top, uint4 bottom,
                                                  const XFragment (&x)[kTokenTiles]) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      mma_s8(c[t], top.x, bottom.x, top.y, bottom.y, x[t].word[0], x[t].word[1]);
      mma_s8(c[t], top.z, bottom.z, top.w, bottom.w, x[t].word[2], x[t].word[3]);
    }
  }
};

}  // namespace vllm_b200
