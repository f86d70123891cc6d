#include "nvfp4_quant.cuh"

namespace vllm_b200 {
namespace {

template <typename In, bool kGated>
cudaError_t choose_layout(const Nvfp4QuantParams& p, cudaStream_t stream) {
  if constexpr (sizeof(In) == 2) {
    if (p.expert_offsets != nullptr) return launch_nvfp4_quant<Nvfp4, In, kGated, true, true>(p, stream);
  }
  return p.swizzled ? launch_nvfp4_quant<Nvfp4, In, kGated, true, false>(p, stream)
                    : launch_nvfp4_quant<Nvfp4, In, kGated, false, false>(p, stream);
}

template <typename In>
cudaError_t choose_source(const Nvfp4QuantParams& p, cudaStream_t stream) {
  return p.silu_and_mul ? choose_layout<In, true>(p, stream) : choose_layout<In, false>(p, stream);
}

}  // namespace

cudaError_t nvfp4_quant(const Nvfp4QuantParams& params, InputType input, cudaStream_t stream) {
  if (params.rows == 0 || params.padded_size == 0) return cudaSuccess;
  switch (input) {
    case InputType::kBFloat16: return choose_source<__nv_bfloat16>(params, stream);
    case InputType::kHalf: return choose_source<__half>(params, stream);
    case InputType::kFloat:
      return params.silu_and_mul || params.expert_offsets != nullptr ? cudaErrorInvalidValue
                                                                     : choose_layout<float, false>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
