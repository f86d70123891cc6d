#pragma once

#include "common.h"

namespace vllm_b200 {

// The op vllm_b200::per_token_group_quant on CUDA tensors; see vllm_b200_plugin/ops/quant.py.
void per_token_group_quant(const Tensor& x, Tensor q, Tensor scale, int64_t group_size, double eps, bool ue8m0, bool pad,
                           bool pdl);

}  // namespace vllm_b200
