#pragma once

#include "few_tokens.h"

namespace vllm_b200 {

constexpr int kTileTokens = 8;  // columns of an mma

// Up to kTileTokens of the assignments (token, slot) of one expert.
struct Entry {
  int expert;  // -1: none, with one token only
  int first;   // index into the assignments in order of their experts
  int count;
};

// The assignments in order of their experts, in shared memory. Every block finds it from topk_ids by itself.
struct alignas(16) Routing {
  int num_entries;
  uint32_t entries[kMaxAssignments];  // expert | first << 16 | (count - 1) << 28
  uint32_t assigned[kMaxAssignments]; // by assignment: expert | rank << 16, kNobody where the expert is not here
  uint16_t order[kMaxAssignments];    // by place in the order: assignment
  int32_t places[kMaxExperts];        // first counts, then first places, by expert

  static constexpr uint32_t kNobody = 0xffffffffu;

  __device__ __forceinline__ Entry entry(int index) const {
    const uint32_t word = entries[index];
    return {static_cast<int>(word & 0xffffu), static_cast<int>(word >> 16 & 0xfffu), static_cast<int>(word >> 28) + 1};
  }
};

// The expert of an assignment, or -1 where it is not here.
__device__ __forceinline__ int local_expert(const FewTokensMoeParams& p, int assignment) {
  const int64_t id = p.ids_are_int64 ? static_cast<const int64_t*>(p.topk_ids)[assignment]
                                     : static_cast<const int32_t*>(p.topk_ids)[assignment];
  if (id < 0 || id >= p.num_global_experts) return -1;
  const int expert = p.expert_map == nullptr ? static_cast<int>(id) : p.expert_map[id];
  return expert < p.num_experts ? expert : -1;
}

// A counting sort. An assignment's rank within its expert is by its index, so that all blocks find the same entries.
__device__ __forceinline__ void sort_assignments(Routing& r, const FewTokensMoeParams& p) {
  const int assignments = p.num_tokens * p.top_k;
  for (int i = threadIdx.x; i < p.num_experts; i += blockDim.x) r.places[i] = 0;
  for (int i = threadIdx.x; i < assignments; i += blockDim.x) r.assigned[i] = local_expert(p, i);
  __syncthreads();
  if (threadIdx.x < 32) {
    const uint32_t lower_lanes = (1u << threadIdx.x) - 1;
    for (int first = 0; first < assignments; first += 32) {
      const int i = first + threadIdx.x;
      const uint32_t expert = i < assignments ? r.assigned[i] : Routing::kNobody;
      const uint32_t peers = __match_any_sync(0xffffffffu, expert);
      const int rank = __popc(peers & lower_lanes);
      if (expert != Routing::kNobody) {
        const int before = r.places[expert];
        r.assigned[i] = expert | (before + rank) << 16;
        __syncwarp(peers);
        if (rank == 0) r.places[expert] = before + __popc(peers);
      }
      __syncwarp();
    }
    // Each lane takes consecutive experts. Low half: assignments; high half: entries.
    const int lane = threadIdx.x, per_lane = (p.num_experts + 31) / 32;
    const int begin = lane * per_lane, end = min(begin + per_lane, p.num_experts);
    uint32_t total = 0;
    for (int e = begin; e < end; ++e) total += r.places[e] + (((r.places[e] + kTileTokens - 1) / kTileTokens) << 16);
    uint32_t inclusive = total;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
      const uint32_t other = __shfl_up_sync(0xffffffffu, inclusive, distance);
      if (lane >= distance) inclusive += other;
    }
    if (lane == 31) r.num_entries = inclusive >> 16;
    int place = (inclusive - total) & 0xffff, entry = (inclusive - total) >> 16;
    for (int e = begin; e < end; ++e) {
      const int count = r.places[e];
      r.places[e] = place;
      for (int first = 0; first < count; first += kTileTokens) {
        r.entries[entry++] = e | (place + first) << 16 | (min(count - first, kTileTokens) - 1) << 28;
      }
      place += count;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < assignments; i += blockDim.x) {
    const uint32_t word = r.assigned[i];
    if (word != Routing::kNobody) r.order[r.places[word & 0xffff] + (word >> 16)] = i;
  }
  __syncthreads();
}

}  // namespace vllm_b200
