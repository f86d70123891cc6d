#pragma once

#include <optional>

#include "common.h"

// The ops; apart from the launchers of the same names, which take parameters.
namespace vllm_b200::ops {

// The ops of vllm_b200_plugin/ops/token_quant.py on CUDA tensors.
void per_token_quant(const Tensor& x, Tensor q, Tensor scale, std::optional<Tensor> azp,
                     const std::optional<Tensor>& scale_ub, bool pdl);
void per_tensor_quant(const Tensor& x, Tensor q, const Tensor& scale, const std::optional<Tensor>& azp, bool pdl);

// Those of vllm_b200_plugin/ops/gated_quant.py. activation: an index into ACTIVATIONS there.
void gated_group_quant(const Tensor& x, Tensor q, Tensor scale, int64_t group_size, double eps, bool ue8m0, bool pad,
                       int64_t activation, double limit, double alpha, double beta, bool pdl);
void gated_token_quant(const Tensor& x, Tensor q, Tensor scale, const std::optional<Tensor>& scale_ub,
                       int64_t activation, double limit, double alpha, double beta, bool pdl);
void gated_tensor_quant(const Tensor& x, Tensor q, const Tensor& scale, int64_t activation, double limit, double alpha,
                        double beta, bool pdl);
void masked_silu_group_quant(const Tensor& x, const Tensor& counts, Tensor q, Tensor scale, double eps, bool ue8m0,
                             bool pdl);

// Those of vllm_b200_plugin/ops/norm_quant.py.
void rms_norm_group_quant(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, Tensor q, Tensor scale,
                          double norm_eps, int64_t group_size, double eps, bool ue8m0, bool pad, bool gemma, bool pdl);
void rms_norm_token_quant(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, Tensor q, Tensor scale,
                          const std::optional<Tensor>& scale_ub, double norm_eps, bool gemma, bool pdl);
void rms_norm_tensor_quant(const Tensor& x, std::optional<Tensor> residual, const Tensor& weight, Tensor q,
                           const Tensor& scale, double norm_eps, bool gemma, bool pdl);

// Those of vllm_b200_plugin/ops/cache.py.
void reshape_and_cache_flash(const Tensor& key, const Tensor& value, Tensor key_cache, Tensor value_cache,
                             const Tensor& slot_mapping, const Tensor& k_scale, const Tensor& v_scale, bool pdl);
void concat_and_cache_mla(const Tensor& kv_c, const Tensor& k_pe, Tensor kv_cache, const Tensor& slot_mapping,
                          const Tensor& scale, bool pdl);

}  // namespace vllm_b200::ops
