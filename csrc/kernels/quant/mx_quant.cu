#include "nvfp4_quant.cuh"

namespace vllm_b200 {
namespace {

template <typename Format, typename In>
cudaError_t choose_layout(const Nvfp4QuantParams& p, cudaStream_t stream) {
  return p.swizzled ? launch_nvfp4_quant<Format, In, false, true, false>(p, stream)
                    : launch_nvfp4_quant<Format, In, false, false, false>(p, stream);
}

template <typename Format>
cudaError_t choose_input(const Nvfp4QuantParams& p, InputType input, cudaStream_t stream) {
  switch (input) {
    case InputType::kBFloat16: return choose_layout<Format, __nv_bfloat16>(p, stream);
    case InputType::kHalf: return choose_layout<Format, __half>(p, stream);
    case InputType::kFloat: return choose_layout<Format, float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t mx_quant(const Nvfp4QuantParams& params, InputType input, bool fp8, cudaStream_t stream) {
  if (params.rows == 0 || params.padded_size == 0) return cudaSuccess;
  return fp8 ? choose_input<Mxfp8>(params, input, stream) : choose_input<Mxfp4>(params, input, stream);
}

}  // namespace vllm_b200
