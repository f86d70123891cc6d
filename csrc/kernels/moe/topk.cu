#include "topk.h"

#include <algorithm>

#include "../common/launch.cuh"
#include "select.cuh"

// One warp a token: decode wants one round trip to memory and no barrier.

namespace vllm_b200 {
namespace {

constexpr int kMaxWarps = 4;

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
cudaError_t choose_quads(const TopKParams& p, cudaStream_t stream) {
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
    case Scoring::kSoftmax: return choose_quads<Scoring::kSoftmax>(params, stream);
    case Scoring::kSigmoid: return choose_quads<Scoring::kSigmoid>(params, stream);
    case Scoring::kTanhSigmoid: return choose_quads<Scoring::kTanhSigmoid>(params, stream);
    case Scoring::kNone: return choose_quads<Scoring::kNone>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
