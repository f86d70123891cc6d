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
  int sms, shared_per_block, shared_per_sm;
};

// Buffers that a thread has on their way. More take no less time and keep others' requests waiting.
constexpr int kAhead = 2;

cudaError_t this_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  get(device.sms, cudaDevAttrMultiProcessorCount);
  get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  get(device.shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  return error;
}

// Whether a block of down_kernel has one team. By the layer alone: it says in which order a row's sum runs.
bool one_team(const FewTokensMoeParams& p, const Device& device) { return p.hidden_size / kRows > device.sms; }

// As many as fit into the shared memory along with a buffer of weights.
template <Scales kScales, bool kOneTeam>
int tokens_of_a_launch(FewTokensMoeParams p, const Device& device) {
  p.num_tokens = kMaxTokens;
  while (p.num_tokens > 1 &&
         std::max(GateUpLayout<kScales>(p, 1).end, DownLayout<kScales, kOneTeam>(p, 1).end) > device.shared_per_block) {
    p.num_tokens /= 2;
  }
  return p.num_tokens;
}

// Buffers of a ring. Measured on an H200 with experts of 2048x768: more do not help, fewer leave the memory idle. Where
// both teams take turns with them, each gets as many.
template <typename Layout>
int choose_stages(const FewTokensMoeParams& p, int shared_bytes, bool in_turns) {
  int stages = 2 * kTeams;
  while (stages > 1 && Layout(p, stages).end > shared_bytes) stages = in_turns ? stages / 2 : stages - 1;
  return stages;
}

template <typename Layout>
cudaError_t launch(void (*kernel)(FewTokensMoeParams, int), const FewTokensMoeParams& p, int blocks, int threads,
                   bool pdl, int stages, const Device& device, cudaStream_t stream) {
  const int bytes = Layout(p, stages).end;
  if (bytes > device.shared_per_block) return cudaErrorInvalidValue;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  // So that blocks of both kernels, or two of one, find room on a multiprocessor.
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(blocks), dim3(threads), bytes, stream, pdl, p, stages);
}

template <Scales kScales, int kSets, bool kOneTeam>
cudaError_t launch_both(const FewTokensMoeParams& p, const Device& device, cudaStream_t stream) {
  using GateUp = GateUpLayout<kScales>;
  using Down = DownLayout<kScales, kOneTeam>;
  const int tiles = p.num_tokens * p.top_k * (p.intermediate_size / (kRows / 2));  // at most
  const bool plain = p.activation == Activation::kSilu && p.w13_bias == nullptr && !p.interleaved;
  constexpr bool kGeneral = !Format<kScales>::kNvFp4;
  const bool whole_rows = GateUp(p, 1).rows.chunks == 1;
  const cudaError_t error = launch<GateUp>(
      plain ? gate_up_kernel<kScales, kSets, false> : gate_up_kernel<kScales, kSets, kGeneral>, p,
      std::clamp(tiles, 1, device.sms), kGateUpThreads + 32, p.pdl,
      choose_stages<GateUp>(p, device.shared_per_block, whole_rows), device, stream);
  if (error != cudaSuccess) return error;
  // Two blocks share a multiprocessor where each then has two buffers.
  int stages = kOneTeam ? choose_stages<Down>(p, device.shared_per_sm / 2 - 1024, false) : 0;
  if (stages < 2) stages = choose_stages<Down>(p, device.shared_per_block, !kOneTeam);
  return launch<Down>(down_kernel<kScales, kSets, kOneTeam>, p, p.hidden_size / kRows,
                      32 * Down::kTeamsOfBlock * (Down(p, 1).rows.team_warps() + 1), true, stages, device, stream);
}

template <Scales kScales, bool kOneTeam>
cudaError_t launch_all(const FewTokensMoeParams& params, const Device& device, cudaStream_t stream) {
  const int tokens = tokens_of_a_launch<kScales, kOneTeam>(params, device);
  const bool whole = params.format == ExpertFormat::kFp8Tensor && (!params.x_scale || !params.hidden_scale);
  if (whole && params.num_tokens > tokens) return cudaErrorInvalidValue;
  cudaError_t error = cudaSuccess;
  for (int first = 0; error == cudaSuccess && first < params.num_tokens; first += tokens) {
    FewTokensMoeParams p = params;
    const int64_t ids = int64_t{first} * p.top_k;
    p.num_tokens = std::min(params.num_tokens - first, tokens);
    p.x = static_cast<const Bf16*>(p.x) + first * p.x_stride;
    p.out = static_cast<Bf16*>(p.out) + first * p.out_stride;
    p.topk_ids = static_cast<const char*>(p.topk_ids) + ids * (p.ids_are_int64 ? 8 : 4);
    if (p.topk_weights != nullptr) p.topk_weights += ids;
    p.pdl = params.pdl || first > 0;
    p.ahead = kAhead;
    error = p.num_tokens > kTileTokens ? launch_both<kScales, 2, kOneTeam>(p, device, stream)
                                       : launch_both<kScales, 1, kOneTeam>(p, device, stream);
  }
  return error;
}

template <Scales kScales>
cudaError_t choose_form(const FewTokensMoeParams& p, cudaStream_t stream) {
  Device device = {};
  const cudaError_t error = this_device(device);
  if (error != cudaSuccess) return error;
  if constexpr (!Format<kScales>::kNvFp4) {  // which was run with two teams alone
    if (one_team(p, device)) return launch_all<kScales, true>(p, device, stream);
  }
  return launch_all<kScales, false>(p, device, stream);
}

}  // namespace

cudaError_t few_tokens_moe(const FewTokensMoeParams& params, cudaStream_t stream) {
  switch (params.format) {
    case ExpertFormat::kBf16: return choose_form<Scales::kNone>(params, stream);
    case ExpertFormat::kFp8Block: return choose_form<Scales::kBlocks>(params, stream);
    case ExpertFormat::kFp8BlockPow2: return choose_form<Scales::kPow2Blocks>(params, stream);
    case ExpertFormat::kFp8Token: return choose_form<Scales::kTokens>(params, stream);
    case ExpertFormat::kFp8Tensor: return choose_form<Scales::kTensors>(params, stream);
    case ExpertFormat::kInt8Token: return choose_form<Scales::kInt8Tokens>(params, stream);
    case ExpertFormat::kNvFp4: return choose_form<Scales::kNvFp4>(params, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
