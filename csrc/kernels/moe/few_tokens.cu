#include "few_tokens.h"

#include <algorithm>

#include "few_tokens_down.cuh"
#include "few_tokens_gate_up.cuh"

// Two kernels. In each block a warp or two fetch the weights into rings, far ahead, and the others, in two teams that
// take turns, share the columns of a tile out among them. All blocks find the batch's experts from topk_ids by
// themselves: no sorting, padding or quantising launches.

namespace vllm_b200 {
namespace {

struct Device {
  int sms, shared_per_block;
};

cudaError_t this_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  get(device.sms, cudaDevAttrMultiProcessorCount);
  get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

// As many as fit into the shared memory along with a buffer of weights.
template <Scales kScales>
int tokens_of_a_launch(FewTokensMoeParams p, const Device& device) {
  p.num_tokens = kMaxTokens;
  while (p.num_tokens > 1 &&
         std::max(GateUpLayout<kScales>(p, 1).end, DownLayout<kScales>(p, 1).end) > device.shared_per_block) {
    p.num_tokens /= 2;
  }
  return p.num_tokens;
}

// Buffers of a ring. Measured on an H200 with experts of 2048x768: more do not help, fewer leave the memory idle.
template <typename Layout>
int choose_stages(const FewTokensMoeParams& p, const Device& device) {
  int stages = Layout::kStages;
  while (stages > 1 && Layout(p, stages).end > device.shared_per_block) stages /= 2;
  return stages;
}

template <typename Layout>
cudaError_t launch(void (*kernel)(FewTokensMoeParams, int), const FewTokensMoeParams& p, int blocks, int threads,
                   bool pdl, const Device& device, cudaStream_t stream) {
  const int stages = choose_stages<Layout>(p, device), bytes = Layout(p, stages).end;
  if (bytes > device.shared_per_block) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(blocks), dim3(threads), bytes, stream, pdl, p, stages);
}

template <Scales kScales, int kSets>
cudaError_t launch_both(const FewTokensMoeParams& p, const Device& device, cudaStream_t stream) {
  const int tiles = p.num_tokens * p.top_k * (p.intermediate_size / (kRows / 2));  // at most
  const cudaError_t error =
      launch<GateUpLayout<kScales>>(gate_up_kernel<kScales, kSets>, p, std::clamp(tiles, 1, device.sms),
                                    kGateUpThreads<kScales> + 32, p.pdl, device, stream);
  if (error != cudaSuccess) return error;
  return launch<DownLayout<kScales>>(down_kernel<kScales, kSets>, p, p.hidden_size / kRows,
                                     32 * kTeams * (DownRows<kScales>(p.intermediate_size).team_warps() + 1), true,
                                     device, stream);
}

template <Scales kScales>
cudaError_t launch_all(const FewTokensMoeParams& params, cudaStream_t stream) {
  Device device = {};
  cudaError_t error = this_device(device);
  const int tokens = tokens_of_a_launch<kScales>(params, device);
  const bool whole = params.format == ExpertFormat::kFp8Tensor && (!params.x_scale || !params.hidden_scale);
  if (error == cudaSuccess && whole && params.num_tokens > tokens) return cudaErrorInvalidValue;
  for (int first = 0; error == cudaSuccess && first < params.num_tokens; first += tokens) {
    FewTokensMoeParams p = params;
    const int64_t ids = int64_t{first} * p.top_k;
    p.num_tokens = std::min(params.num_tokens - first, tokens);
    p.x = static_cast<const Bf16*>(p.x) + first * p.x_stride;
    p.out = static_cast<Bf16*>(p.out) + first * p.out_stride;
    p.topk_ids = static_cast<const char*>(p.topk_ids) + ids * (p.ids_are_int64 ? 8 : 4);
    if (p.topk_weights != nullptr) p.topk_weights += ids;
    p.pdl = params.pdl || first > 0;
    error = p.num_tokens > kTileTokens ? launch_both<kScales, 2>(p, device, stream)
                                       : launch_both<kScales, 1>(p, device, stream);
  }
  return error;
}

}  // namespace

cudaError_t few_tokens_moe(const FewTokensMoeParams& params, cudaStream_t stream) {
  switch (params.format) {
    case ExpertFormat::kBf16: return launch_all<Scales::kNone>(params, stream);
    case ExpertFormat::kFp8Block: return launch_all<Scales::kBlocks>(params, stream);
    case ExpertFormat::kFp8BlockPow2: return launch_all<Scales::kPow2Blocks>(params, stream);
    case ExpertFormat::kFp8Token: return launch_all<Scales::kTokens>(params, stream);
    case ExpertFormat::kFp8Tensor: return launch_all<Scales::kTensors>(params, stream);
    case ExpertFormat::kInt8Token: return launch_all<Scales::kInt8Tokens>(params, stream);
    case ExpertFormat::kNvFp4: return launch_all<Scales::kNvFp4>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
