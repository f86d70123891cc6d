#pragma once

#include "../kernels/quant/token_quant.h"
#include "common.h"

namespace vllm_b200 {

// By their places in ACTIVATIONS of vllm_b200_plugin/ops/gated_quant.py.
inline Activation activation_of(int64_t index) {
  switch (index) {
    case 0: return Activation::kSilu;
    case 1: return Activation::kSiluClamped;
    case 2: return Activation::kGelu;
    case 3: return Activation::kGeluTanh;
    default: STD_TORCH_CHECK(false, "activation: takes 0 to 3, got ", index);
  }
}

inline ActivationParams activation_params(double limit, double alpha, double beta) {
  return {static_cast<float>(limit), static_cast<float>(alpha), static_cast<float>(beta)};
}

}  // namespace vllm_b200
