#include "token_quant.cuh"

namespace vllm_b200 {
namespace {

// Below so many elements a thread takes four of them: the hardware's exponentials and reciprocals of sixteen, one after
// another, would take longer than the loads. All numbers measured on an H200.
constexpr int64_t kFewElements = 1 << 20;

template <typename In, Activation kActivation, TokenQuant kKind>
cudaError_t choose_chunks(const TokenQuantParams& p, cudaStream_t stream) {
  if (p.rows * p.hidden_size <= kFewElements && p.hidden_size <= 4096) {
    return launch_token_quant<GatedRow<In, kActivation, 4>, kKind, 1, 1024, 1>(p, stream);
  }
  if (p.hidden_size <= 3 * 8 * 32) return launch_token_quant<GatedRow<In, kActivation, 8>, kKind, 3, 128, 8>(p, stream);
  if (p.hidden_size <= 1024 * kChunk) return launch_token_quant<GatedRow<In, kActivation>, kKind, 1, 1024, 1>(p, stream);
  return launch_token_quant<GatedRow<In, kActivation>, kKind, 2, 1024, 1>(p, stream);
}

template <typename In, Activation kActivation, TokenQuant kKind>
cudaError_t choose_threads(const TokenQuantParams& p, cudaStream_t stream) {
  if (p.rows * p.hidden_size <= kFewElements / 2) {
    return launch_tensor_quant<GatedRow<In, kActivation, 4>, kKind, 128, 12>(p, 128, 128, stream);
  }
  return launch_tensor_quant<GatedRow<In, kActivation, 8>, kKind, 256, 6>(p, 256, 32, stream);
}

// Per token and per tensor, e4m3 and int8; nothing in vLLM takes an asymmetric activation here.
template <typename In, Activation kActivation>
cudaError_t choose_kind(const TokenQuantParams& p, TokenQuant kind, bool per_tensor, cudaStream_t stream) {
  if (kind == TokenQuant::kE4M3) {
    return per_tensor ? choose_threads<In, kActivation, TokenQuant::kE4M3>(p, stream)
                      : choose_chunks<In, kActivation, TokenQuant::kE4M3>(p, stream);
  }
  if (kind == TokenQuant::kInt8) {
    return per_tensor ? choose_threads<In, kActivation, TokenQuant::kInt8>(p, stream)
                      : choose_chunks<In, kActivation, TokenQuant::kInt8>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename In>
cudaError_t choose_activation(const TokenQuantParams& p, Activation activation, TokenQuant kind, bool per_tensor,
                              cudaStream_t stream) {
  switch (activation) {
    case Activation::kSilu: return choose_kind<In, Activation::kSilu>(p, kind, per_tensor, stream);
    case Activation::kSiluClamped: return choose_kind<In, Activation::kSiluClamped>(p, kind, per_tensor, stream);
    case Activation::kGelu: return choose_kind<In, Activation::kGelu>(p, kind, per_tensor, stream);
    case Activation::kGeluTanh: return choose_kind<In, Activation::kGeluTanh>(p, kind, per_tensor, stream);
    case Activation::kNone: break;
  }
  return cudaErrorInvalidValue;
}

cudaError_t choose_input(const TokenQuantParams& p, InputType input, Activation activation, TokenQuant kind,
                         bool per_tensor, cudaStream_t stream) {
  if (p.rows == 0 || p.hidden_size == 0) return cudaSuccess;
  if (input == InputType::kBFloat16) return choose_activation<__nv_bfloat16>(p, activation, kind, per_tensor, stream);
  if (input == InputType::kHalf) return choose_activation<__half>(p, activation, kind, per_tensor, stream);
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t gated_token_quant(const TokenQuantParams& params, InputType input, Activation activation, TokenQuant kind,
                              cudaStream_t stream) {
  return choose_input(params, input, activation, kind, false, stream);
}

cudaError_t gated_tensor_quant(const TokenQuantParams& params, InputType input, Activation activation, TokenQuant kind,
                               cudaStream_t stream) {
  return choose_input(params, input, activation, kind, true, stream);
}

}  // namespace vllm_b200
