#include "token_quant.cuh"

namespace vllm_b200 {
namespace {

// A thread has one chunk of a row as long as a block has enough of them: measured on an H200 for few rows and for many.
template <typename In, TokenQuant kKind>
cudaError_t choose_chunks(const TokenQuantParams& p, cudaStream_t stream) {
  using Source = PlainRow<In>;
  constexpr int kFull = sizeof(In) == 4 ? 1 : 2;  // whether an SM's registers allow all of its threads
  if (p.hidden_size <= 512 * kChunk) return launch_token_quant<Source, kKind, 1, 512, 2 * kFull>(p, stream);
  if (p.hidden_size <= 1024 * kChunk) return launch_token_quant<Source, kKind, 1, 1024, kFull>(p, stream);
  return launch_token_quant<Source, kKind, 4, 512, 1>(p, stream);
}

template <typename In>
cudaError_t choose_kind(const TokenQuantParams& p, TokenQuant kind, cudaStream_t stream) {
  switch (kind) {
    case TokenQuant::kE4M3: return choose_chunks<In, TokenQuant::kE4M3>(p, stream);
    case TokenQuant::kInt8: return choose_chunks<In, TokenQuant::kInt8>(p, stream);
    case TokenQuant::kInt8Asymmetric: return choose_chunks<In, TokenQuant::kInt8Asymmetric>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename In, TokenQuant kKind>
cudaError_t choose_threads(const TokenQuantParams& p, cudaStream_t stream) {
  using Source = PlainRow<In>;
  constexpr int kFull = sizeof(In) == 4 ? 1 : 2;
  const int64_t chunks = p.rows * (p.hidden_size / kChunk);
  if (chunks < 64 * 132) return launch_tensor_quant<Source, kKind, 256, 4 * kFull>(p, 64, 64, stream);  // on many SMs
  if (chunks < 2048 * 132) return launch_tensor_quant<Source, kKind, 256, 4 * kFull>(p, 256, 256, stream);
  return launch_tensor_quant<Source, kKind, 1024, kFull>(p, 1024, 1024, stream);
}

template <typename In>
cudaError_t choose_tensor_kind(const TokenQuantParams& p, TokenQuant kind, cudaStream_t stream) {
  switch (kind) {
    case TokenQuant::kE4M3: return choose_threads<In, TokenQuant::kE4M3>(p, stream);
    case TokenQuant::kInt8: return choose_threads<In, TokenQuant::kInt8>(p, stream);
    case TokenQuant::kInt8Asymmetric: return choose_threads<In, TokenQuant::kInt8Asymmetric>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t token_quant(const TokenQuantParams& params, InputType input, TokenQuant kind, cudaStream_t stream) {
  if (params.rows == 0 || params.hidden_size == 0) return cudaSuccess;
  switch (input) {
    case InputType::kBFloat16: return choose_kind<__nv_bfloat16>(params, kind, stream);
    case InputType::kHalf: return choose_kind<__half>(params, kind, stream);
    case InputType::kFloat: return choose_kind<float>(params, kind, stream);
  }
  return cudaErrorInvalidValue;
}

cudaError_t tensor_quant(const TokenQuantParams& params, InputType input, TokenQuant kind, cudaStream_t stream) {
  TokenQuantParams p = params;
  if (p.rows == 0 || p.hidden_size == 0) return cudaSuccess;
  if (p.x_stride_row == p.hidden_size && p.q_stride_row == p.hidden_size) {
    p.hidden_size *= p.rows;  // one long row
    p.rows = 1;
  }
  switch (input) {
    case InputType::kBFloat16: return choose_tensor_kind<__nv_bfloat16>(p, kind, stream);
    case InputType::kHalf: return choose_tensor_kind<__half>(p, kind, stream);
    case InputType::kFloat: return choose_tensor_kind<float>(p, kind, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
