#pragma once

#include <cstdint>

// fp32 to e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives): to nearest, ties to the even code, saturating at 6, NaN
// to 6; the sign of a zero stays. One definition, two realisations with the same bits.

namespace vllm_b200 {

// Bits of a where mask has 1, of b elsewhere.
__device__ __forceinline__ uint32_t select_bits(uint32_t a, uint32_t b, uint32_t mask) {
  uint32_t selected;  // left to itself, the compiler takes two instructions
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(selected) : "r"(a), "r"(b), "r"(mask));
  return selected;
}

// y rounded to one bit of mantissa, or to a multiple of 0.5 below 1, and then a little further from 0, by less than what
// the next number is away: cutting its mantissa off gives the e2m1 number, with the sign of y where that is 0.
__device__ __forceinline__ float round_to_e2m1_and_a_bit(float y) {
  float clamped, step;
  asm("min.xorsign.abs.f32 %0, %1, %2;" : "=f"(clamped) : "f"(y), "f"(6.0f));    // NaN gives 6
  asm("max.xorsign.abs.f32 %0, %1, %2;" : "=f"(step) : "f"(clamped), "f"(1.0f));  // sets the place that is rounded to
  constexpr float kShift = 4194304.0f;  // 2^22: the sum's last place is half of the leading place of `step`
  const float sum = fmaf(step, kShift, clamped);
  return fmaf(step, -(kShift - 0.25f), sum);  // a quarter of `step` remains
}

// The halves a and b of the result; times 2^-14 the e2m1 code is in bits 9 to 11 and the sign in bit 15 of each.
__device__ __forceinline__ uint32_t e2m1_halves(float a, float b) {
  uint32_t halves;
  asm("{\n"
      ".reg .b32 pair;\n"
      "cvt.rn.f16x2.f32 pair, %2, %1;\n"
      "mul.rn.f16x2 %0, pair, %3;\n"
      "}"
      : "=r"(halves)
      : "f"(round_to_e2m1_and_a_bit(a)), "f"(round_to_e2m1_and_a_bit(b)), "r"(0x04000400));
  return halves;
}

// In bytes 1 and 3: y[0] and y[1], y[2] and y[3].
__device__ __forceinline__ uint32_t e2m1_bytes_1_and_3(const float* y) {
  const uint32_t odd = e2m1_halves(y[1], y[3]), even = e2m1_halves(y[0], y[2]) >> 4;
  const uint32_t codes = select_bits(odd, even, 0x0e000e00u) << 3;
  const uint32_t signs = select_bits(odd, even, 0x80008000u);
  return select_bits(codes, signs, 0x77007700u);
}

// Eight numbers to four bytes, y[0] in the lowest four bits.
__device__ __forceinline__ uint32_t pack_e2m1(const float (&y)[8]) {
#if __CUDA_ARCH__ >= 1000
  uint32_t packed;
  asm("{\n"
      ".reg .b8 b0, b1, b2, b3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b0, %2, %1;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b1, %4, %3;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b2, %6, %5;\n"
      "cvt.rn.satfinite.e2m1x2.f32 b3, %8, %7;\n"
      "mov.b32 %0, {b0, b1, b2, b3};\n"
      "}"
      : "=r"(packed)
      : "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]), "f"(y[4]), "f"(y[5]), "f"(y[6]), "f"(y[7]));
  return packed;
#else
  return __byte_perm(e2m1_bytes_1_and_3(y), e2m1_bytes_1_and_3(y + 4), 0x7531);
#endif
}

}  // namespace vllm_b200
