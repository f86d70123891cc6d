#include <algorithm>

#include "gated_group_quant.cuh"

namespace vllm_b200 {
namespace {

template <typename In>
cudaError_t choose_activation(const GatedGroupQuantParams& p, OutputType output, ScaleType scale, Activation activation,
                              cudaStream_t stream) {
  switch (activation) {
    case Activation::kSilu: return choose_output<In, Activation::kSilu>(p, output, scale, stream);
    case Activation::kSiluClamped: return choose_output<In, Activation::kSiluClamped>(p, output, scale, stream);
    case Activation::kGelu: return choose_output<In, Activation::kGelu>(p, output, scale, stream);
    case Activation::kGeluTanh: return choose_output<In, Activation::kGeluTanh>(p, output, scale, stream);
    case Activation::kNone: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t gated_group_quant(const GatedGroupQuantParams& params, InputType input, OutputType output, ScaleType scale,
                              Activation activation, cudaStream_t stream) {
  if (params.batches == 0 || params.padded_rows == 0 || params.hidden_size == 0) return cudaSuccess;
  switch (input) {
    case InputType::kBFloat16: return choose_activation<__nv_bfloat16>(params, output, scale, activation, stream);
    case InputType::kHalf: return choose_activation<__half>(params, output, scale, activation, stream);
    case InputType::kFloat: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
