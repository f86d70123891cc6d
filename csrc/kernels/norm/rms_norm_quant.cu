#include "rms_norm_quant.cuh"

namespace vllm_b200 {
namespace {

template <typename In, typename Out, int kGroupSize>
cudaError_t choose_scale(const RmsNormQuantParams& p, ScaleType scale, cudaStream_t stream) {
  if (scale == ScaleType::kFloat) {
    return choose_launch<In, GroupEnd<In, Out, kGroupSize, ScaleType::kFloat>>(p, stream);
  }
  if constexpr (std::is_same_v<Out, __nv_fp8_e4m3>) {
    return scale == ScaleType::kFloatPow2
               ? choose_launch<In, GroupEnd<In, Out, kGroupSize, ScaleType::kFloatPow2>>(p, stream)
               : choose_launch<In, GroupEnd<In, Out, kGroupSize, ScaleType::kPackedUE8M0>>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename In, typename Out>
cudaError_t choose_group_size(const RmsNormQuantParams& p, ScaleType scale, cudaStream_t stream) {
  if (p.group_size == 128) return choose_scale<In, Out, 128>(p, scale, stream);
  if (p.group_size == 64) return choose_scale<In, Out, 64>(p, scale, stream);
  return cudaErrorInvalidValue;
}

template <typename In>
cudaError_t choose_output(const RmsNormQuantParams& p, OutputType output, ScaleType scale, cudaStream_t stream) {
  return output == OutputType::kE4M3 ? choose_group_size<In, __nv_fp8_e4m3>(p, scale, stream)
                                     : choose_group_size<In, NearestInt8>(p, scale, stream);
}

template <typename In, bool kPerTensor>
cudaError_t choose_kind(const RmsNormQuantParams& p, OutputType output, cudaStream_t stream) {
  return output == OutputType::kE4M3 ? choose_launch<In, RowEnd<In, TokenQuant::kE4M3, kPerTensor>>(p, stream)
                                     : choose_launch<In, RowEnd<In, TokenQuant::kInt8, kPerTensor>>(p, stream);
}

template <bool kPerTensor>
cudaError_t choose_input(const RmsNormQuantParams& params, InputType input, OutputType output, cudaStream_t stream) {
  if (params.rows == 0 || params.hidden_size == 0) return cudaSuccess;
  RmsNormQuantParams p = params;
  p.padded_rows = p.rows;
  if (input == InputType::kBFloat16) return choose_kind<__nv_bfloat16, kPerTensor>(p, output, stream);
  if (input == InputType::kHalf) return choose_kind<__half, kPerTensor>(p, output, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t rms_norm_group_quant(const RmsNormQuantParams& params, InputType input, OutputType output, ScaleType scale,
                                 cudaStream_t stream) {
  if (params.padded_rows == 0 || params.hidden_size == 0) return cudaSuccess;
  if (input == InputType::kBFloat16) return choose_output<__nv_bfloat16>(params, output, scale, stream);
  if (input == InputType::kHalf) return choose_output<__half>(params, output, scale, stream);
  return cudaErrorInvalidValue;
}

cudaError_t rms_norm_token_quant(const RmsNormQuantParams& params, InputType input, OutputType output,
                                 cudaStream_t stream) {
  return choose_input<false>(params, input, output, stream);
}

cudaError_t rms_norm_tensor_quant(const RmsNormQuantParams& params, InputType input, OutputType output,
                                  cudaStream_t stream) {
  return choose_input<true>(params, input, output, stream);
}

}  // namespace vllm_b200
