#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

namespace vllm_b200 {

// Consecutive elements in registers: sixteen are 32 bytes of a 16-bit type, 64 of fp32. Where there are few elements for
// many threads, four make every step of the work a quarter as long.
constexpr int kChunk = 16;

template <typename T, int kSize = kChunk>
struct Chunk {
  static constexpr int kWords = kSize * sizeof(T) / 4;
  uint32_t word[kWords];
};

// Words in vectors as wide as there are: 16 bytes each, or 8 or 4 in all.
template <int kWords>
__device__ __forceinline__ void load_words(uint32_t (&word)[kWords], const void* source) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      const uint4 v = static_cast<const uint4*>(source)[i];
      word[4 * i] = v.x, word[4 * i + 1] = v.y, word[4 * i + 2] = v.z, word[4 * i + 3] = v.w;
    }
  } else if constexpr (kWords == 2) {
    const uint2 v = *static_cast<const uint2*>(source);
    word[0] = v.x, word[1] = v.y;
  } else {
    static_assert(kWords == 1);
    word[0] = *static_cast<const uint32_t*>(source);
  }
}

template <int kWords>
__device__ __forceinline__ void store_words(void* destination, const uint32_t (&word)[kWords]) {
  if constexpr (kWords % 4 == 0) {
#pragma unroll
    for (int i = 0; i < kWords / 4; ++i) {
      static_cast<uint4*>(destination)[i] = make_uint4(word[4 * i], word[4 * i + 1], word[4 * i + 2], word[4 * i + 3]);
    }
  } else if constexpr (kWords == 2) {
    *static_cast<uint2*>(destination) = make_uint2(word[0], word[1]);
  } else {
    static_assert(kWords == 1);
    *static_cast<uint32_t*>(destination) = word[0];
  }
}

template <typename T, bool kAligned, int kSize>
__device__ __forceinline__ void load_chunk(Chunk<T, kSize>& chunk, const T* source) {
  if constexpr (kAligned) {
    load_words(chunk.word, source);
  } else if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) chunk.word[i] = reinterpret_cast<const uint32_t*>(source)[i];
  } else {
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(source);
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) chunk.word[i] = halves[2 * i] | uint32_t(halves[2 * i + 1]) << 16;
  }
}

template <typename T, int kSize>
__device__ __forceinline__ void store_chunk(T* destination, const Chunk<T, kSize>& chunk) {
  store_words(destination, chunk.word);
}

// Elements 2*i and 2*i+1 as fp32 (exact).
template <typename T, int kSize>
__device__ __forceinline__ float2 unpack_pair(const Chunk<T, kSize>& chunk, int i) {
  if constexpr (sizeof(T) == 4) {
    return {__uint_as_float(chunk.word[2 * i]), __uint_as_float(chunk.word[2 * i + 1])};
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return {__uint_as_float(chunk.word[i] << 16), __uint_as_float(chunk.word[i] & 0xffff0000u)};
  } else {
    return __half22float2(reinterpret_cast<const __half2&>(chunk.word[i]));
  }
}

// Rounds a and b to the nearest of T, ties to even, as elements 2*i and 2*i+1.
template <typename T, int kSize>
__device__ __forceinline__ void pack_pair(Chunk<T, kSize>& chunk, int i, float a, float b) {
  if constexpr (sizeof(T) == 4) {
    chunk.word[2 * i] = __float_as_uint(a), chunk.word[2 * i + 1] = __float_as_uint(b);
  } else if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    chunk.word[i] = reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(a, b);
    chunk.word[i] = reinterpret_cast<const uint32_t&>(pair);
  }
}

// Bits of max|x| as fp32. Non-negative floats order like their bits, and NaN
// above all of them, so a NaN in the chunk survives every maximum that follows.
template <typename T, int kSize>
__device__ __forceinline__ uint32_t absmax_bits(const Chunk<T, kSize>& chunk) {
  constexpr int kWords = Chunk<T, kSize>::kWords;
  if constexpr (sizeof(T) == 4) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kWords; ++i) bits = max(bits, chunk.word[i] & 0x7fffffffu);
    return bits;
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
    Pair pair[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) pair[i] = __habs2(reinterpret_cast<const Pair&>(chunk.word[i]));
#pragma unroll
    for (int half = kWords / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) pair[i] = __hmax2_nan(pair[i], pair[i + half]);
    }
    Chunk<T, 2> one;
    one.word[0] = reinterpret_cast<const uint32_t&>(pair[0]);
    const float2 both = unpack_pair(one, 0);
    return max(__float_as_uint(both.x) & 0x7fffffffu, __float_as_uint(both.y) & 0x7fffffffu);
  }
}

// Four fp32 to four bytes, the first in the lowest byte.
// e4m3: round to nearest even, saturate at 448, NaN to 0x7f.
__device__ __forceinline__ uint32_t pack_bytes(__nv_fp8_e4m3*, float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2({a, b}, __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2({c, d}, __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

// Saturates.
__device__ __forceinline__ uint32_t pack_int8(int a, int b, int c, int d) {
  uint32_t packed;
  asm("{\n"
      ".reg .b32 high;\n"
      "cvt.pack.sat.s8.s32.b32 high, %1, %2, 0;\n"
      "cvt.pack.sat.s8.s32.b32 %0, %3, %4, high;\n"
      "}"
      : "=r"(packed)
      : "r"(d), "r"(c), "r"(b), "r"(a));
  return packed;
}

// int8: round toward zero, saturate, NaN to 0.
__device__ __forceinline__ uint32_t pack_bytes(int8_t*, float a, float b, float c, float d) {
  return pack_int8(__float2int_rz(a), __float2int_rz(b), __float2int_rz(c), __float2int_rz(d));
}

// int8 rounded to the nearest, ties to even.
struct NearestInt8 {
  int8_t value;
};

__device__ __forceinline__ uint32_t pack_bytes(NearestInt8*, float a, float b, float c, float d) {
  return pack_int8(__float2int_rn(a), __float2int_rn(b), __float2int_rn(c), __float2int_rn(d));
}

// int8 rounded to the nearest, ties away from zero.
struct RoundedInt8 {
  int8_t value;
};

__device__ __forceinline__ uint32_t pack_bytes(RoundedInt8*, float a, float b, float c, float d) {
  return pack_int8(__float2int_rz(roundf(a)), __float2int_rz(roundf(b)), __float2int_rz(roundf(c)),
                   __float2int_rz(roundf(d)));
}

}  // namespace vllm_b200
