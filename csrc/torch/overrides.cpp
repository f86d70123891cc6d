#include "overrides.h"

#include <cstring>

// Puts ours before the kernel that `op` of `op_namespace` has for `dispatch_key`; 1 where we have none. The op
// vllm_b200::vllm_<op> has to lead to that kernel.
extern "C" __attribute__((visibility("default"))) int vllm_b200_override_op(const char* op_namespace, const char* op,
                                                                            const char* dispatch_key) {
  using torch::stable::detail::StableLibrary;
  for (const auto& table : {vllm_b200::memory_overrides(), vllm_b200::moe_overrides(), vllm_b200::quant_overrides()}) {
    for (const vllm_b200::Override& override : table) {
      if (std::strcmp(override.op, op) != 0) continue;
      // Never deleted: that would take the kernel out again.
      auto* library = new StableLibrary(StableLibrary::Kind::IMPL, op_namespace, dispatch_key, __FILE__, __LINE__);
      library->impl(override.op, override.kernel);
      return 0;
    }
  }
  return 1;
}
