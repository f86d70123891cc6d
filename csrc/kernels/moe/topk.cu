#include "topk.h"

#include <algorithm>

#include "../common/launch.cuh"
#include "select.cuh"
#include "select_block.cuh"

namespace vllm_b200 {
namespace {

// Few tokens: a block's threads make the scores and rank them at once.
template <Scoring kScoring>
__global__ void __launch_bounds__(32 * kMaxLists) topk_block_kernel(const __grid_constant__ TopKParams p) {
  pdl_trigger();
  const int64_t token = blockIdx.x;
  const int expert = expert_of_thread(p.select);
  const float bias = load_bias(p.select, expert);
  pdl_wait();
  const float logit = expert < 0 ? 0.0f : load_float(p.logits, p.logits_type, token * p.stride + expert);
  select_row_by_block<kScoring>(p.select, p.out, token, expert, bias, logit);
}

template <Scoring kScoring>
cudaError_t launch_block(const TopKParams& p, cudaStream_t stream) {
  return launch_kernel(topk_block_kernel<kScoring>, dim3(p.out.num_tokens), dim3(32 * block_select_warps(p.select)), 0,
                       stream, p.pdl, p);
}

// Many tokens, or more experts to choose than a list holds: one warp a token.

constexpr int kMaxWarps = 4, kMaxBlockTokens = 512;

template <Scoring kScoring, int kQuads>
__global__ void __launch_bounds__(32 * kMaxWarps) topk_kernel(const __grid_constant__ TopKParams p) {
  pdl_trigger();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  const int64_t bytes = p.logits_type == FloatType::kFloat ? 4 : 2;
  const void* row = static_cast<const char*>(p.logits) + token * p.stride * bytes;
  float bias[4 * kQuads], x[4 * kQuads];
  load_bias<kQuads>(p.select, bias);
  pdl_wait();
  if (token >= p.out.num_tokens) return;
  load_quads<kQuads>(row, p.logits_type, p.select.num_experts, kBeyond<kScoring>, x);
  select_row<kScoring, kQuads>(p.select, p.out, token, bias, x);
}

template <Scoring kScoring, int kQuads>
cudaError_t launch(const TopKParams& p, cudaStream_t stream) {
  const int64_t tokens = p.out.num_tokens;
  const int warps = tokens <= 512 ? 1 : kMaxWarps;
  return launch_kernel(topk_kernel<kScoring, kQuads>, dim3((tokens + warps - 1) / warps), dim3(32 * warps), 0, stream,
                       p.pdl, p);
}

template <Scoring kScoring>
cudaError_t choose_kernel(const TopKParams& p, cudaStream_t stream) {
  if (p.out.num_tokens <= kMaxBlockTokens && block_selects(p.select)) return launch_block<kScoring>(p, stream);
  switch ((p.select.num_experts + 127) / 128) {
    case 1: return launch<kScoring, 1>(p, stream);
    case 2: return launch<kScoring, 2>(p, stream);
    case 3: return launch<kScoring, 3>(p, stream);
    case 4: return launch<kScoring, 4>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t topk(const TopKParams& params, cudaStream_t stream) {
  if (params.out.num_tokens == 0 || params.select.topk == 0) return cudaSuccess;
  switch (params.select.scoring) {
    case Scoring::kSoftmax: return choose_kernel<Scoring::kSoftmax>(params, stream);
    case Scoring::kSigmoid: return choose_kernel<Scoring::kSigmoid>(params, stream);
    case Scoring::kTanhSigmoid: return choose_kernel<Scoring::kTanhSigmoid>(params, stream);
    case Scoring::kNone: return choose_kernel<Scoring::kNone>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
