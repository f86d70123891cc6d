#pragma once

// What the kernels that end in a quantisation share: from a chunk in registers to its scale, its bytes and their places.

#include <cuda_fp8.h>

#include <cstdint>
#include <type_traits>

#include "../common/vec.cuh"
#include "types.h"

namespace vllm_b200 {

constexpr int kWarpColumns = 32 * kChunk;
constexpr uint32_t kFullWarp = 0xffffffffu;

template <typename Out>
constexpr int kQuantMax = std::is_same_v<Out, __nv_fp8_e4m3> ? 448 : 127;

// Of two numbers the smaller or larger one; NaN where one is, as in PyTorch.
__device__ __forceinline__ float min_nan(float a, float b) {
  float smaller;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(smaller) : "f"(a), "f"(b));
  return smaller;
}
__device__ __forceinline__ float max_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}

// The smallest power of two not below y; Inf and NaN stay what they are.
__device__ __forceinline__ float round_up_to_pow2(float y) {
  const uint32_t bits = __float_as_uint(y);
  return bits >= 0x7f800000u ? y : __uint_as_float((bits + 0x7fffffu) & 0x7f800000u);
}

// a / kDivisor correctly rounded: one residual step (Markstein, "IA-64 and
// Elementary Functions", section 8). Right for every fp32 mantissa under 448 and
// 127, and for Inf and NaN; tests/test_quant.py goes through all of them.
template <int kDivisor>
__device__ __forceinline__ float divide_by(float a) {
  constexpr float kReciprocal = 1.0f / kDivisor;
  const float estimate = a * kReciprocal;
  const float quotient = fmaf(fmaf(-estimate, kDivisor, a), kReciprocal, estimate);
  return __float_as_uint(a) < 0x7f800000u ? quotient : a;
}

// scale = max(min(amax, upper bound) / 448, 1 / (448 * 512)), vLLM's floor; NaN passes.
__device__ __forceinline__ float token_scale_e4m3(uint32_t amax, const float* upper_bound) {
  float bound = __uint_as_float(amax);
  if (upper_bound != nullptr) bound = min_nan(bound, *upper_bound);
  return max_nan(divide_by<448>(bound), 1.0f / (448.0f * 512.0f));
}

// x / y for x of 11 significant bits at most, as x * high + x * low with high +
// low = 1 / y to some 47 bits: rounded once, so equal to the true quotient
// wherever that decides about the 8-bit result (tests/test_quant.py goes
// through all pairs). low >= 0 keeps the sign of -0.
struct Divisor {
  float high, low;

  __device__ explicit Divisor(float y) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(high) : "f"(y));
    if (fmaf(-high, y, 1.0f) < 0.0f) high = __uint_as_float(__float_as_uint(high) - 1);
    low = fmaf(-high, y, 1.0f) * high;
    if (isinf(y)) low = 0.0f;
  }
  __device__ float operator()(float x) const { return fmaf(x, high, x * low); }
};

// fp32 operands leave no spare bits: the full division.
struct ExactDivisor {
  float y;
  __device__ explicit ExactDivisor(float scale) { y = scale; }
  __device__ float operator()(float x) const { return __fdiv_rn(x, y); }
};

struct PowerOfTwoDivisor {
  float reciprocal;

  __device__ explicit PowerOfTwoDivisor(float y) {
    const uint32_t bits = __float_as_uint(y);
    reciprocal = bits < 0x7f800000u ? __uint_as_float(0x7f000000u - bits) : isinf(y) ? 0.0f : y;
  }
  __device__ float operator()(float x) const { return x * reciprocal; }
};

// A product with the reciprocal, rounded twice: what vLLM does where one scale serves a whole tensor, and in int8.
struct Multiplier {
  float reciprocal;

  __device__ explicit Multiplier(float y) { reciprocal = y; }
  __device__ float operator()(float x) const { return __fmul_rn(x, reciprocal); }
};

template <typename Out, typename In, int kSize, typename Divide>
__device__ __forceinline__ void quantize_chunk(const Chunk<In, kSize>& chunk, const Divide& divide, Out* destination) {
  uint32_t packed[kSize / 4];
#pragma unroll
  for (int i = 0; i < kSize / 4; ++i) {
    const float2 low = unpack_pair(chunk, 2 * i), high = unpack_pair(chunk, 2 * i + 1);
    packed[i] =
        pack_bytes(static_cast<Out*>(nullptr), divide(low.x), divide(low.y), divide(high.x), divide(high.y));
  }
  store_words(destination, packed);
}

// The scale of the calling lane's group, from the bits of its chunk's absolute maximum.
template <typename Out, int kGroupSize, bool kPow2, int kSize = kChunk>
__device__ __forceinline__ float group_scale(uint32_t bits, float eps) {
#pragma unroll
  for (int lanes = kGroupSize / kSize / 2; lanes > 0; lanes /= 2) {
    bits = max(bits, __shfl_xor_sync(kFullWarp, bits, lanes));
  }
  float scale = divide_by<kQuantMax<Out>>(__uint_as_float(max(bits, __float_as_uint(eps))));
  if constexpr (kPow2) {
    // vLLM's floor for power-of-two scales; a NaN has to pass it.
    scale = round_up_to_pow2(__uint_as_float(max(__float_as_uint(scale), __float_as_uint(1e-10f))));
  }
  return scale;
}

// Where a lane's part of one row lies.
template <typename In, typename Out>
struct Tile {
  const In* x;
  Out* q;
  uint32_t* scale;
  bool scale_exists;  // padding rows of the last column may lie beyond the storage

  template <typename Params>
  __device__ __forceinline__ Tile(const Params& p, int64_t batch, int64_t row, int column, int scale_column) {
    x = static_cast<const In*>(p.x) + batch * p.x_stride_batch + row * p.x_stride_row + column;
    q = static_cast<Out*>(p.q) + batch * p.q_stride_batch + row * p.q_stride_row + column;
    const int64_t offset =
        batch * p.scale_stride_batch + row * p.scale_stride_row + scale_column * p.scale_stride_column;
    scale = static_cast<uint32_t*>(p.scale) + offset;
    scale_exists = offset < p.scale_capacity;
  }
};

// In UE8M0, where Inf and NaN both become 255, which is NaN.
__device__ __forceinline__ uint8_t exponent_byte(float scale) { return (__float_as_uint(scale) & 0x7fffffffu) >> 23; }

// What the calling lane stores for its group: the bits of the scale or, packed, the biased exponents of four groups side
// by side. The whole warp calls it; where `valid` is false the scale counts as 0.
template <ScaleType kScale, int kLanesPerGroup>
__device__ __forceinline__ uint32_t scale_word(float scale, bool valid, int lane) {
  uint32_t word = valid ? __float_as_uint(scale) : 0;
  if constexpr (kScale == ScaleType::kPackedUE8M0) {
    word = valid ? exponent_byte(scale) << (lane / kLanesPerGroup % 4 * 8) : 0;
    word |= __shfl_xor_sync(kFullWarp, word, kLanesPerGroup);
    word |= __shfl_xor_sync(kFullWarp, word, 2 * kLanesPerGroup);
  }
  return word;
}

}  // namespace vllm_b200
