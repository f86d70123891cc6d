#include "router.h"

#include <cooperative_groups.h>

#include <algorithm>

#include "../common/cluster.cuh"
#include "../common/launch.cuh"
#include "gate.cuh"
#include "select.cuh"
#include "select_block.cuh"

namespace vllm_b200 {
namespace {

namespace cg = cooperative_groups;

// --- the gate for very few tokens: a block has one expert, and multiplies on the CUDA cores

// x . w of eight elements, added to sum in order.
__device__ __forceinline__ float dot(float sum, uint4 x, uint4 w) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    sum = fmaf(__uint_as_float(a[i] << 16), __uint_as_float(b[i] << 16), sum);
    sum = fmaf(__uint_as_float(a[i] & 0xffff0000u), __uint_as_float(b[i] & 0xffff0000u), sum);
  }
  return sum;
}

// kSteps: of the block, whose weights are read before the wait.
template <int kWarps, int kTokens, int kSteps>
__global__ void __launch_bounds__(32 * kWarps, 2) gate_dot_kernel(const __grid_constant__ GateParams p) {
  constexpr int kStep = 32 * kWarps * 8;  // elements of the block at a time
  __shared__ float partial[kTokens][kWarps];
  pdl_trigger();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, expert = blockIdx.x;
  const __nv_bfloat16* row = static_cast<const __nv_bfloat16*>(p.weight) + expert * p.weight_stride;
  const __nv_bfloat16* x = static_cast<const __nv_bfloat16*>(p.x);
  int k = threadIdx.x * 8;
  uint4 weight[kSteps];
  auto load_weights = [&] {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      weight[s] = make_uint4(0, 0, 0, 0);
      if (k + s * kStep < p.hidden_size) load_ahead(weight[s], row + k + s * kStep);
    }
  };
  load_weights();
  pdl_wait();

  float sum[kTokens] = {};
  while (true) {
    uint4 token[kSteps][kTokens];
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        token[s][t] = make_uint4(0, 0, 0, 0);
        const int at = k + s * kStep;
        if (at < p.hidden_size) token[s][t] = *reinterpret_cast<const uint4*>(x + t * p.x_stride + at);
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) sum[t] = dot(sum[t], token[s][t], weight[s]);
    }
    k += kSteps * kStep;
    if (k >= p.hidden_size) break;
    load_weights();
  }
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) sum[t] += __shfl_xor_sync(kAllLanes, sum[t], step);
  }
  if (lane == 0) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) partial[t][warp] = sum[t];
  }
  __syncthreads();
  const int t = threadIdx.x;
  if (t >= kTokens) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kWarps; ++i) total += partial[t][i];
  store_logit(p, t, expert, total);
}

// kTokens: exactly so many.
template <int kTokens>
cudaError_t launch_gate_dot(const GateParams& p, cudaStream_t stream) {
  constexpr int kWarps = 8;
  const auto kernel = p.hidden_size <= 2048   ? gate_dot_kernel<kWarps, kTokens, 1>
                      : p.hidden_size <= 4096 ? gate_dot_kernel<kWarps, kTokens, 2>
                                              : gate_dot_kernel<kWarps, kTokens, 4>;
  return launch_kernel(kernel, dim3(p.num_experts), dim3(32 * kWarps), 0, stream, p.pdl, p);
}

// --- the gate alone: a block has 8 experts and a slice of K, a cluster all of K

template <int kWarps, int kSteps, int kTokenTiles>
__global__ void __launch_bounds__(32 * kWarps, 2) gate_kernel(const __grid_constant__ GateParams p, const int slice) {
  constexpr int kOutputs = 128 * kTokenTiles, kWarpK = kSteps * kStepK;
  __shared__ float partial[kWarps * kOutputs];
  __shared__ float sums[kOutputs];
  pdl_trigger();
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  const int warp = threadIdx.x / 32, first_expert = blockIdx.x / blocks * 8;
  const int end = min(p.hidden_size, (rank + 1) * slice);
  int k = rank * slice + warp * kWarpK;

  GateWeights<1, kSteps> weights;
  weights.load(p, first_expert, k, end);
  pdl_wait();
  float sum[kTokenTiles][1][4] = {};
  gate_product(p, weights, k, end, sum);
  for (k += kWarps * kWarpK; k < end; k += kWarps * kWarpK) {
    weights.load(p, first_expert, k, end);
    gate_product(p, weights, k, end, sum);
  }
  store_partial(partial, sum);
  __syncthreads();

  const int outputs = min(kOutputs, p.num_tokens * 8);
  for (int i = threadIdx.x; i < outputs; i += 32 * kWarps) {
    sums[i] = sum_partials<kWarps>(partial, i, kOutputs);
  }
  cluster.sync();
  for (int i = rank * 32 * kWarps + threadIdx.x; i < outputs; i += blocks * 32 * kWarps) {
    float total = 0.0f;
    for (int b = 0; b < blocks; ++b) total += *cluster.map_shared_rank(sums + i, b);
    store_logit(p, i / 8, first_expert + i % 8, total);
  }
  cluster.sync();
}

template <int kWarps, int kSteps, int kTokenTiles>
cudaError_t launch_gate(const GateParams& p, int cluster, cudaStream_t stream) {
  const int slice = ((p.hidden_size + cluster - 1) / cluster + kStepK - 1) / kStepK * kStepK;
  return launch_clusters(gate_kernel<kWarps, kSteps, kTokenTiles>, dim3((p.num_experts + 7) / 8 * cluster),
                         dim3(32 * kWarps), cluster, 0, stream, p.pdl, p, slice);
}

}  // namespace

// Measured on an H200, from 64x2048 to 384x7168: up to two tokens the CUDA cores
// win; then these are the steps that a warp takes at a time in clusters of 8.
cudaError_t gate(const GateParams& params, cudaStream_t stream) {
  constexpr int kCluster = 8;
  if (params.num_tokens == 0) return cudaSuccess;
  if (params.num_tokens == 1) return launch_gate_dot<1>(params, stream);
  if (params.num_tokens == 2) return launch_gate_dot<2>(params, stream);
  if (params.num_tokens > 16) return launch_gate<8, 1, 2>(params, kCluster, stream);
  if (params.hidden_size <= 2048) return launch_gate<8, 1, 1>(params, kCluster, stream);
  if (params.hidden_size <= 4096) return launch_gate<8, 2, 1>(params, kCluster, stream);
  return launch_gate<8, 4, 1>(params, kCluster, stream);
}

// --- gate and selection in two kernels: the gate's blocks sum up slices of K, the selection's add up the slices

namespace {

// A block has 8 experts. sums [slices][num_tokens][num_experts]
template <int kWarps, int kSteps, int kTokenTiles>
__global__ void __launch_bounds__(32 * kWarps, 2) gate_slices_kernel(const __grid_constant__ GateParams p, float* sums,
                                                                 const int slice) {
  constexpr int kOutputs = 128 * kTokenTiles, kWarpK = kSteps * kStepK;
  __shared__ float partial[kWarps * kOutputs];
  pdl_trigger();
  const int first_expert = blockIdx.x * 8, end = min(p.hidden_size, static_cast<int>(blockIdx.y + 1) * slice);
  int k = blockIdx.y * slice + threadIdx.x / 32 * kWarpK;

  GateWeights<1, kSteps> weights;
  weights.load(p, first_expert, k, end);
  pdl_wait();
  float sum[kTokenTiles][1][4] = {};
  gate_product(p, weights, k, end, sum);
  for (k += kWarps * kWarpK; k < end; k += kWarps * kWarpK) {
    weights.load(p, first_expert, k, end);
    gate_product(p, weights, k, end, sum);
  }
  store_partial(partial, sum);
  __syncthreads();

  sums += static_cast<int64_t>(blockIdx.y) * p.num_tokens * p.num_experts + first_expert;
  for (int i = threadIdx.x; i < min(kOutputs, p.num_tokens * 8); i += 32 * kWarps) {
    sums[i / 8 * p.num_experts + i % 8] = sum_partials<kWarps>(partial, i, kOutputs);
  }
}

template <Scoring kScoring>
__global__ void __launch_bounds__(32 * kMaxLists) select_slices_kernel(const __grid_constant__ GateParams p,
                                                                      const __grid_constant__ SelectParams select,
                                                                      const __grid_constant__ SelectOutputs out,
                                                                      const float* sums, const int slices) {
  pdl_trigger();
  const int token = blockIdx.x, expert = expert_of_thread(select);
  const float bias = load_bias(select, expert);
  pdl_wait();
  float logit = 0.0f;
  if (expert >= 0) {
    const float* mine = sums + token * p.num_experts + expert;
    float part[kMaxGateSlices];
#pragma unroll
    for (int s = 0; s < kMaxGateSlices; ++s) {
      part[s] = s < slices ? mine[static_cast<int64_t>(s) * p.num_tokens * p.num_experts] : 0.0f;
    }
#pragma unroll
    for (int s = 0; s < kMaxGateSlices; ++s) logit += part[s];
    logit = store_logit(p, token, expert, logit);
  }
  select_row_by_block<kScoring>(select, out, token, expert, bias, logit);
}

template <int kWarps, int kSteps, int kTokenTiles>
cudaError_t launch_gate_slices(const GateParams& p, float* sums, int& slices, cudaStream_t stream) {
  constexpr int kBlockK = kWarps * kSteps * kStepK;
  const int wanted = min((p.hidden_size + kBlockK - 1) / kBlockK, kMaxGateSlices);
  const int slice = ((p.hidden_size + wanted - 1) / wanted + kStepK - 1) / kStepK * kStepK;
  slices = (p.hidden_size + slice - 1) / slice;
  return launch_kernel(gate_slices_kernel<kWarps, kSteps, kTokenTiles>, dim3((p.num_experts + 7) / 8, slices),
                       dim3(32 * kWarps), 0, stream, p.pdl, p, sums, slice);
}

template <Scoring kScoring>
cudaError_t launch_select_slices(const GateParams& p, const SelectParams& select, const SelectOutputs& out,
                                 const float* sums, int slices, cudaStream_t stream) {
  constexpr bool kPdl = true;  // the gate lets it start early
  return launch_kernel(select_slices_kernel<kScoring>, dim3(p.num_tokens), dim3(32 * block_select_warps(select)), 0,
                       stream, kPdl, p, select, out, sums, slices);
}

}  // namespace

// On an H200 the best, or within 0.3 us of it, of six layouts from 2 to 16 warps for 256 and 384 experts of 7168.
cudaError_t split_router(const GateParams& p, const SelectParams& select, const SelectOutputs& out, float* sums,
                         cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  if (!block_selects(select)) return cudaErrorInvalidValue;
  int slices = 0;
  const cudaError_t error = p.num_tokens > 16 ? launch_gate_slices<16, 2, 2>(p, sums, slices, stream)
                                              : launch_gate_slices<4, 4, 1>(p, sums, slices, stream);
  if (error != cudaSuccess) return error;
  switch (select.scoring) {
    case Scoring::kSigmoid: return launch_select_slices<Scoring::kSigmoid>(p, select, out, sums, slices, stream);
    case Scoring::kTanhSigmoid: return launch_select_slices<Scoring::kTanhSigmoid>(p, select, out, sums, slices, stream);
    case Scoring::kNone: return launch_select_slices<Scoring::kNone>(p, select, out, sums, slices, stream);
    default: return cudaErrorInvalidValue;
  }
}

// --- gate and selection: one cluster, every block has all of K for some of the experts

namespace {

// Every block adds up 8 * kTiles experts for all tokens and hands each token's
// logits to the block that selects for it.
template <Scoring kScoring, int kWarps, int kTiles, int kSteps, int kTokenTiles, int kQuads>
__global__ void __launch_bounds__(32 * kWarps, 1) router_kernel(const __grid_constant__ GateParams p,
                                                            const __grid_constant__ SelectParams select,
                                                            const __grid_constant__ SelectOutputs out) {
  constexpr int kColumns = 8 * kTiles, kOutputs = 16 * kTokenTiles * kColumns, kWarpK = kSteps * kStepK;
  constexpr int kMaxTokens = 16 * kTokenTiles, kMinBlocks = kMinFusedExperts / kColumns;
  static_assert(kMaxTokens / kMinBlocks <= kWarps);
  extern __shared__ float partial[];  // [kWarps][kOutputs]
  __shared__ __align__(16) float logits[kMaxTokens / kMinBlocks * 128 * kQuads];  // [tokens of this block][128 * kQuads]
  pdl_trigger();
  cg::cluster_group cluster = cg::this_cluster();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;");
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first_expert = rank * kColumns;
  int k = warp * kWarpK;

  GateWeights<kTiles, kSteps> weights;
  weights.load(p, first_expert, k, p.hidden_size);
  float bias[4 * kQuads];
  load_bias<kQuads>(select, bias);
  pdl_wait();
  float sum[kTokenTiles][kTiles][4] = {};
  gate_product(p, weights, k, p.hidden_size, sum);
  for (k += kWarps * kWarpK; k < p.hidden_size; k += kWarps * kWarpK) {
    weights.load(p, first_expert, k, p.hidden_size);
    gate_product(p, weights, k, p.hidden_size, sum);
  }
  store_partial(partial, sum);
  __syncthreads();
  asm volatile("barrier.cluster.wait.aligned;");  // all blocks run: their shared memory may be written

  for (int i = threadIdx.x; i < min(kOutputs, p.num_tokens * kColumns); i += 32 * kWarps) {
    const int token = i / kColumns, expert = first_expert + i % kColumns;
    if (expert >= p.num_experts) continue;
    const float value = store_logit(p, token, expert, sum_partials<kWarps>(partial, i, kOutputs));
    *cluster.map_shared_rank(logits + token / blocks * 128 * kQuads + expert, token % blocks) = value;
  }
  cluster.sync();

  const int token = warp * blocks + rank;
  if (token >= p.num_tokens) return;
  float x[4 * kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const float4 v = *reinterpret_cast<const float4*>(logits + warp * 128 * kQuads + 128 * q + 4 * lane);
    x[4 * q] = v.x, x[4 * q + 1] = v.y, x[4 * q + 2] = v.z, x[4 * q + 3] = v.w;
  }
#pragma unroll
  for (int j = 0; j < 4 * kQuads; ++j) {
    if (expert_of(lane, j) >= p.num_experts) x[j] = kBeyond<kScoring>;
  }
  select_row<kScoring, kQuads>(select, out, token, bias, x);
}

template <Scoring kScoring, int kWarps, int kTiles, int kSteps, int kTokenTiles, int kQuads>
cudaError_t launch_router(const GateParams& p, const SelectParams& select, const SelectOutputs& out,
                          cudaStream_t stream) {
  const auto kernel = router_kernel<kScoring, kWarps, kTiles, kSteps, kTokenTiles, kQuads>;
  constexpr size_t kBytes = kWarps * 16 * kTokenTiles * 8 * kTiles * sizeof(float);
  const int cluster = (p.num_experts + 8 * kTiles - 1) / (8 * kTiles);
  if (cluster > 8) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
  }
  if (kBytes > 32 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
    if (error != cudaSuccess) return error;
  }
  return launch_clusters(kernel, dim3(cluster), dim3(32 * kWarps), cluster, kBytes, stream, p.pdl, p, select, out);
}

}  // namespace

namespace {

template <Scoring kScoring>
cudaError_t choose_router(const GateParams& p, const SelectParams& select, const SelectOutputs& out,
                          cudaStream_t stream) {
  const bool two = p.num_tokens > 16;  // tiles of 16 tokens
  if (p.num_experts > 128) {
    return two ? launch_router<kScoring, 16, 2, 4, 2, 2>(p, select, out, stream)
               : launch_router<kScoring, 16, 2, 4, 1, 2>(p, select, out, stream);
  }
  return two ? launch_router<kScoring, 16, 1, 4, 2, 1>(p, select, out, stream)
             : launch_router<kScoring, 16, 1, 4, 1, 1>(p, select, out, stream);
}

}  // namespace

cudaError_t router(const GateParams& gate, const SelectParams& select, const SelectOutputs& out, cudaStream_t stream) {
  if (gate.num_tokens == 0) return cudaSuccess;
  if (gate.num_experts < kMinFusedExperts || gate.num_experts > kMaxFusedExperts) return cudaErrorInvalidValue;
  switch (select.scoring) {
    case Scoring::kSoftmax: return choose_router<Scoring::kSoftmax>(gate, select, out, stream);
    case Scoring::kSigmoid: return choose_router<Scoring::kSigmoid>(gate, select, out, stream);
    default: return cudaErrorInvalidValue;
  }
}

}  // namespace vllm_b200
