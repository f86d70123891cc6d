#pragma once

#include <torch/csrc/stable/library.h>

#include <span>

namespace vllm_b200 {

// A kernel of ours that stands in for an op of vLLM's, with that op's arguments.
// It leaves the arguments it does not take to vllm_b200::vllm_<op>.
struct Override {
  const char* op;
  void (*kernel)(StableIValue*, uint64_t, uint64_t);
};

#define VLLM_B200_OVERRIDE(op) {#op, TORCH_BOX(&vllm_b200::op)}

std::span<const Override> memory_overrides();
std::span<const Override> moe_overrides();
std::span<const Override> quant_overrides();

}  // namespace vllm_b200
