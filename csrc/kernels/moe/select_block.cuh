#pragma once

#include "select.cuh"

// Selection of a token's experts by a block, for few tokens: a warp has a group of
// experts, or 32 where there are no groups, one a lane. Every lane counts how many
// experts of its warp are better than its own, the best eight of every warp go into
// a list, and the lists that may supply experts are ranked once more in the same
// way. That takes two barriers and no loop over the experts to be chosen.

namespace vllm_b200 {

// The expert of this thread, or -1.
__device__ __forceinline__ int expert_of_thread(const SelectParams& p) {
  const int lane = threadIdx.x % 32, size = p.num_groups > 1 ? 4 * p.group_quads : 32;
  const int expert = static_cast<int>(threadIdx.x) / 32 * size + lane;
  return lane < size && expert < p.num_experts ? expert : -1;
}

__device__ __forceinline__ float load_float(const void* source, FloatType type, int64_t at) {
  if (type == FloatType::kFloat) return static_cast<const float*>(source)[at];
  if (type == FloatType::kBFloat16) return __bfloat162float(static_cast<const __nv_bfloat16*>(source)[at]);
  return __half2float(static_cast<const __half*>(source)[at]);
}

// Of this thread's expert, for the choice alone. It may be read before the wait for the kernel before.
__device__ __forceinline__ float load_bias(const SelectParams& p, int expert) {
  return p.bias && expert >= 0 ? load_float(p.bias, p.bias_type, expert) : 0.0f;
}

// The groups that may supply experts, one bit each: the topk_group best by the sum of their two largest choices.
__device__ __forceinline__ uint32_t best_groups(const SelectParams& p, const uint64_t (&lists)[kMaxLists][kListSize]) {
  const int lane = threadIdx.x % 32;
  uint32_t score = 0;
  if (lane < p.num_groups) {
    score = ordered(from_ordered(lists[lane][0] >> 32) + from_ordered(lists[lane][1] >> 32));
  }
  int better = 0;
#pragma unroll
  for (int g = 0; g < kMaxLists; ++g) {
    const uint32_t other = __shfl_sync(kAllLanes, score, g);
    better += other > score || (other == score && g < lane);
  }
  return __ballot_sync(kAllLanes, lane < p.num_groups && better < p.topk_group);
}

// One row. expert: of this thread, logit: its logit, bias: its bias. All threads of block_select_warps() warps take part.
template <Scoring kScoring>
__device__ __forceinline__ void select_row_by_block(const SelectParams& p, const SelectOutputs& out, int64_t token,
                                                    int expert, float bias, float logit) {
  static_assert(kScoring != Scoring::kSoftmax);
  __shared__ __align__(16) uint32_t choices[kMaxLists][32];
  __shared__ __align__(16) uint64_t lists[kMaxLists][kListSize];  // as in Candidates, 0 for none
  __shared__ float list_scores[kMaxLists][kListSize];
  __shared__ int chosen[kListSize];
  __shared__ float chosen_scores[kListSize];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;

  float score[1] = {logit};
  make_scores<kScoring>(score);
  pass_over_nan<kScoring>(p, score);
  const uint32_t choice = expert >= 0 ? ordered(score[0] + bias) : 0;
  choices[warp][lane] = choice;
  __syncwarp();
  int better = 0;
#pragma unroll
  for (int j = 0; j < 32; j += 4) {
    const uint4 others = *reinterpret_cast<const uint4*>(&choices[warp][j]);
    const uint32_t other[4] = {others.x, others.y, others.z, others.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) better += other[i] > (j + i < lane ? choice - 1 : choice);  // ties to the lower expert
  }
  if (expert >= 0) {
    if (better < kListSize) {
      lists[warp][better] = static_cast<uint64_t>(choice) << 32 | ~static_cast<uint32_t>(expert);
      list_scores[warp][better] = score[0];
    }
  } else if (lane < kListSize) {
    lists[warp][lane] = 0;  // a warp with fewer experts than the list has places
  }
  __syncthreads();

  // Four lanes count for every entry of the warp's list, if that is kept.
  const uint32_t kept = p.num_groups > 1 ? best_groups(p, lists) : (1u << blockDim.x / 32) - 1;
  if (kept >> warp & 1) {
    const uint64_t mine = lists[warp][lane / 4];
    int rank = 0;
#pragma unroll
    for (int i = 0; i < kMaxLists; i += 4) {
      const int list = i + lane % 4;
      if (kept >> list & 1) {
        const ulonglong2* pairs = reinterpret_cast<const ulonglong2*>(lists[list]);
#pragma unroll
        for (int j = 0; j < kListSize / 2; ++j) {
          const ulonglong2 pair = pairs[j];
          rank += (pair.x > mine) + (pair.y > mine);
        }
      }
    }
    rank += __shfl_xor_sync(kAllLanes, rank, 1);
    rank += __shfl_xor_sync(kAllLanes, rank, 2);
    if (lane % 4 == 0 && mine && rank < p.topk) {
      chosen[rank] = ~static_cast<uint32_t>(mine);
      chosen_scores[rank] = list_scores[warp][lane / 4];
    }
  }
  __syncthreads();
  if (warp > 0) return;
  const int k = min(lane, p.topk - 1);
  write_row<kScoring>(p, out, token, chosen[k], lane < p.topk ? chosen_scores[k] : 0.0f);
}

}  // namespace vllm_b200
