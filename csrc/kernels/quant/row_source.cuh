#pragma once

#include "quantizers.cuh"
#include "token_quant.h"

// Where the numbers of a chunk come from: memory as they are, or a gated activation of two halves of a row. `load` and
// `finish` are apart so that a thread can have the loads of several chunks under way.

namespace vllm_b200 {

// x * sigmoid(k * x) from the hardware's exp2 and reciprocal: within some 1e-6 of the true value while that matters.
__device__ __forceinline__ float times_sigmoid(float x, float k) {
  constexpr float kLog2E = 1.4426950408889634f;
  float power, reciprocal;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-kLog2E * k * x));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
  return x * reciprocal;
}

template <Activation kActivation>
__device__ __forceinline__ float activate_and_multiply(float gate, float up, const ActivationParams& p) {
  if constexpr (kActivation == Activation::kSilu) {
    return times_sigmoid(gate, 1.0f) * up;
  } else if constexpr (kActivation == Activation::kSiluClamped) {
    return times_sigmoid(min_nan(gate, p.limit), p.alpha) * (max_nan(min_nan(up, p.limit), -p.limit) + p.beta);
  } else if constexpr (kActivation == Activation::kGelu) {
    return 0.5f * gate * (1.0f + erff(gate * 0.70710678118654752f)) * up;
  } else {
    // (1 + tanh(z)) / 2 = sigmoid(2 z)
    const float z = 0.79788456080286536f * (gate + 0.044715f * gate * gate * gate);
    constexpr float kLog2E = 1.4426950408889634f;
    float power, reciprocal;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(-2.0f * kLog2E * z));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(1.0f + power));
    return gate * reciprocal * up;
  }
}

template <typename In, int kElements = kChunk>
struct PlainRow {
  static constexpr int kSize = kElements;
  using Input = In;
  using Values = Chunk<In, kSize>;
  using Raw = Values;
  using Divide = std::conditional_t<sizeof(In) == 4, ExactDivisor, Divisor>;

  static __device__ __forceinline__ void load(Raw& raw, const In* x, int64_t) { load_chunk<In, true>(raw, x); }
  static __device__ __forceinline__ Values finish(const Raw& raw, const ActivationParams&) { return raw; }
};

template <typename In, Activation kActivation, int kElements = kChunk>
struct GatedRow {
  static constexpr int kSize = kElements;
  using Input = In;
  using Values = Chunk<float, kSize>;
  using Divide = Divisor;  // the activation is no exact number: the last bit of a quotient says nothing
  struct Raw {
    Chunk<In, kSize> gate, up;
  };

  // x: the gate's chunk; the other half lies hidden_size further on.
  static __device__ __forceinline__ void load(Raw& raw, const In* x, int64_t hidden_size) {
    load_chunk<In, true>(raw.gate, x);
    load_chunk<In, true>(raw.up, x + hidden_size);
  }
  static __device__ __forceinline__ Values finish(const Raw& raw, const ActivationParams& p) {
    Values values;
#pragma unroll
    for (int i = 0; i < kSize / 2; ++i) {
      const float2 gate = unpack_pair(raw.gate, i), up = unpack_pair(raw.up, i);
      pack_pair(values, i, activate_and_multiply<kActivation>(gate.x, up.x, p),
                activate_and_multiply<kActivation>(gate.y, up.y, p));
    }
    return values;
  }
};

}  // namespace vllm_b200
