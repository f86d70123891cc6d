#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "common.h"

namespace vllm_b200 {

// Calls an op; the stack it leaves has the results.
template <typename... Args>
std::vector<StableIValue> call_dispatcher(const char* op, const Args&... args) {
  std::vector<StableIValue> stack{torch::stable::detail::from(args)...};
  STD_TORCH_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION) == 0, op, " failed");
  return stack;
}

}  // namespace vllm_b200
