#include "token_quant.cuh"

namespace vllm_b200 {
namespace {

template <typename In, TokenQuant kKind>
cudaError_t choose_chunks(const TokenQuantParams& p, cudaStream_t stream) {
  using Source = PlainRow<In>;
  const int64_t chunks = p.hidden_size / kChunk;
  // Few rows want many threads each, many rows few: then a block is short of neither loads nor warps.
  if (p.rows <= 132 && chunks <= 1024) return launch_token_quant<Source, kKind, 1>(p, stream);
  if (chunks <= 128 || chunks > 1024) return launch_token_quant<Source, kKind, 4>(p, stream);
  return launch_token_quant<Source, kKind, 2>(p, stream);
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

template <typename In>
cudaError_t choose_tensor_kind(const TokenQuantParams& p, TokenQuant kind, cudaStream_t stream) {
  using Source = PlainRow<In>;
  switch (kind) {
    case TokenQuant::kE4M3: return launch_tensor_quant<Source, TokenQuant::kE4M3>(p, stream);
    case TokenQuant::kInt8: return launch_tensor_quant<Source, TokenQuant::kInt8>(p, stream);
    case TokenQuant::kInt8Asymmetric: return launch_tensor_quant<Source, TokenQuant::kInt8Asymmetric>(p, stream);
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
