#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "topk.h"

// Selection of experts by one warp, all in registers. A lane holds quads of four
// consecutive experts, the quads of the lanes side by side: element j of lane l
// is expert 128 * (j / 4) + 4 * l + j % 4. That is also the order in which
// vLLM's kernel for fp32 adds up a softmax, so that its last bits are the same.

namespace vllm_b200 {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kInfinity = __builtin_huge_valf();

// Floats as unsigned numbers of the same order; positive NaN above Inf.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ float from_ordered(uint32_t key) {
  return __uint_as_float(key ^ (static_cast<uint32_t>(static_cast<int32_t>(~key) >> 31) | 0x80000000u));
}

__device__ __forceinline__ int expert_of(int lane, int element) { return 128 * (element / 4) + 4 * lane + element % 4; }

// 1 / x as the division rounds it, for 1 <= x < 2^126.
__device__ __forceinline__ float reciprocal(float x) {
  float estimate;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(estimate) : "f"(x));
  return fmaf(fmaf(-x, estimate, 1.0f), estimate, estimate);
}

// Elements [4 * q, 4 * q + 4) of the row in x[4 * q], from one vector where `aligned`. Those beyond `size` are `beyond`.
template <typename T, int kQuads>
__device__ __forceinline__ void load_quads(const T* row, int size, bool aligned, float beyond, float (&x)[4 * kQuads]) {
  const int lane = threadIdx.x % 32;
  struct alignas(4 * sizeof(T)) Quad {
    T element[4];
  };
  Quad quad[kQuads] = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    const int first = expert_of(lane, 4 * q);
    if (aligned) {  // so is the size: a quad is whole or not there
      if (first < size) quad[q] = *reinterpret_cast<const Quad*>(row + first);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < size) quad[q].element[i] = row[first + i];
      }
    }
  }
#pragma unroll
  for (int j = 0; j < 4 * kQuads; ++j) {
    x[j] = expert_of(lane, j) < size ? static_cast<float>(quad[j / 4].element[j % 4]) : beyond;
  }
}

template <int kQuads>
__device__ __forceinline__ void load_quads(const void* row, FloatType type, int size, float beyond,
                                           float (&x)[4 * kQuads]) {
  const bool whole = size % 4 == 0;
  const uintptr_t address = reinterpret_cast<uintptr_t>(row);
  if (type == FloatType::kFloat) {
    load_quads<float, kQuads>(static_cast<const float*>(row), size, whole && address % 16 == 0, beyond, x);
  } else if (type == FloatType::kBFloat16) {
    load_quads<__nv_bfloat16, kQuads>(static_cast<const __nv_bfloat16*>(row), size, whole && address % 8 == 0, beyond, x);
  } else {
    load_quads<__half, kQuads>(static_cast<const __half*>(row), size, whole && address % 8 == 0, beyond, x);
  }
}

// The experts a lane may still choose from: (ordered value, ~expert) in one
// number, the larger the better, every quad in descending order. 0 is none.
template <int kQuads>
struct Candidates {
  uint64_t entry[kQuads][4];

  __device__ __forceinline__ void set(int element, float value, int expert) {
    entry[element / 4][element % 4] = static_cast<uint64_t>(ordered(value)) << 32 | ~static_cast<uint32_t>(expert);
  }
  __device__ __forceinline__ void remove(int element) { entry[element / 4][element % 4] = 0; }

  __device__ __forceinline__ void sort() {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      auto order = [&](int a, int b) {
        const uint64_t high = max(entry[q][a], entry[q][b]), low = min(entry[q][a], entry[q][b]);
        entry[q][a] = high, entry[q][b] = low;
      };
      order(0, 2), order(1, 3), order(0, 1), order(2, 3), order(1, 2);
    }
  }

  // Takes out the best that any lane of the warp holds, and returns it.
  __device__ __forceinline__ uint64_t pop() {
    uint64_t mine = entry[0][0];
#pragma unroll
    for (int q = 1; q < kQuads; ++q) mine = max(mine, entry[q][0]);
    const uint32_t value = static_cast<uint32_t>(mine >> 32);
    const uint32_t best = __reduce_max_sync(kAllLanes, value);
    const uint32_t id = __reduce_max_sync(kAllLanes, value == best ? static_cast<uint32_t>(mine) : 0);
    const uint64_t won = static_cast<uint64_t>(best) << 32 | id;
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      if (entry[q][0] == won) entry[q][0] = entry[q][1], entry[q][1] = entry[q][2], entry[q][2] = entry[q][3], entry[q][3] = 0;
    }
    return won;
  }
};

// The logit of an expert that does not exist: nothing in the sum of a softmax.
template <Scoring kScoring>
constexpr float kBeyond = kScoring == Scoring::kSoftmax ? -kInfinity : 0.0f;

// Scores in place of a lane's kSize logits, which are kBeyond beyond num_experts.
// A softmax is that of all logits in the warp.
template <Scoring kScoring, int kSize>
__device__ __forceinline__ void make_scores(float (&x)[kSize]) {
  if constexpr (kScoring == Scoring::kSoftmax) {
    float largest = x[0];
#pragma unroll
    for (int j = 1; j < kSize; ++j) largest = fmaxf(largest, x[j]);
    largest = from_ordered(__reduce_max_sync(kAllLanes, ordered(largest)));
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      x[j] = expf(x[j] - largest);
      sum += x[j];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    const float factor = reciprocal(sum);  // at least 1, or NaN
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] *= factor;
  } else if constexpr (kScoring == Scoring::kSigmoid) {
    float most = 0.0f;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      x[j] = 1.0f + __expf(-x[j]);
      most = fmaxf(most, x[j]);
    }
    if (most < 0x1p126f) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = reciprocal(x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kSize; ++j) x[j] = 1.0f / x[j];
    }
  } else if constexpr (kScoring == Scoring::kTanhSigmoid) {
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = 0.5f * tanhf(0.5f * x[j]) + 0.5f;
  }
  if constexpr (!kIsGrouped<kScoring>) {
    // As in vLLM: rows of NaN, which come with padding, choose experts 0, 1, 2 and on.
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = fabsf(x[j]) < kInfinity ? x[j] : 0.0f;
  }
}

// As in vLLM: without groups grouped_topk passes over a NaN, with groups it is the largest choice there is.
template <Scoring kScoring, int kSize>
__device__ __forceinline__ void pass_over_nan(const SelectParams& p, float (&x)[kSize]) {
  if constexpr (kIsGrouped<kScoring>) {
    if (p.num_groups > 1) return;
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = x[j] == x[j] ? x[j] : -kInfinity;
  }
}

// Removes the experts outside of the topk_group best groups; a group is worth its two best candidates.
template <int kQuads>
__device__ __forceinline__ void keep_best_groups(const SelectParams& p, int lane, Candidates<kQuads>& candidates) {
  const int lanes = p.group_quads, groups_per_quad = 32 / lanes;
  const int shift = 31 - __clz(lanes), my_group = lane >> shift;
  uint32_t score[kQuads];
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
    uint32_t first = candidates.entry[q][0] >> 32, second = candidates.entry[q][1] >> 32;
#pragma unroll
    for (int step = 1; step < 8; step *= 2) {
      if (step < lanes) {
        const uint32_t other_first = __shfl_xor_sync(kAllLanes, first, step);
        const uint32_t other_second = __shfl_xor_sync(kAllLanes, second, step);
        second = max(min(first, other_first), max(second, other_second));
        first = max(first, other_first);
      }
    }
    // A group that does not exist has no candidates and is worth nothing.
    score[q] = second == 0 ? 0 : ordered(from_ordered(first) + from_ordered(second));
  }
  int better[kQuads] = {};
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll 4
    for (int g = 0; g < groups_per_quad; ++g) {
      const uint32_t other = __shfl_sync(kAllLanes, score[q], g << shift);
#pragma unroll
      for (int mine = 0; mine < kQuads; ++mine) {
        const bool before = q < mine || (q == mine && g < my_group);
        better[mine] += other > score[mine] || (before && other == score[mine]);
      }
    }
  }
#pragma unroll
  for (int q = 0; q < kQuads; ++q) {
#pragma unroll
    for (int i = 0; i < 4; ++i) candidates.entry[q][i] = better[q] < p.topk_group ? candidates.entry[q][i] : 0;
  }
}

// The bias of the lane's experts, for the choice alone. A parameter of the
// model: it may be read before the wait for the kernel before.
template <int kQuads>
__device__ __forceinline__ void load_bias(const SelectParams& p, float (&bias)[4 * kQuads]) {
  if (p.bias) {
    load_quads<kQuads>(p.bias, p.bias_type, p.num_experts, 0.0f, bias);
  } else {
#pragma unroll
    for (int j = 0; j < 4 * kQuads; ++j) bias[j] = 0.0f;
  }
}

// Lane k < topk of a warp has the k-th expert of a row and its score.
template <Scoring kScoring>
__device__ __forceinline__ void write_row(const SelectParams& p, const SelectOutputs& out, int64_t token, int expert,
                                          float weight) {
  const int lane = threadIdx.x % 32;
  if constexpr (kIsGrouped<kScoring>) {
    float sum = lane < p.topk ? weight : 0.0f;
    weight = static_cast<float>(weight * p.scale);
    if (p.renormalize) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
      // weight / (sum + 1e-20) in fp64, as vLLM has it: from 2^-10 on the 1e-20 is
      // nothing, and the quotient of two floats rounds the same from either type.
      weight = sum >= 0x1p-10f ? weight / sum : static_cast<float>(weight / (sum + 1e-20));
    }
  } else {
    float scale = static_cast<float>(p.scale);
    if (p.renormalize) {
      float sum = 0.0f;
      for (int k = 0; k < p.topk; ++k) sum += __shfl_sync(kAllLanes, weight, k);
      scale /= sum > 0.0f ? sum : 1.0f;
    }
    weight *= scale;
  }

  if (lane >= p.topk) return;
  const int64_t at = token * p.topk + lane;
  if (out.is_padding && out.is_padding[token]) {
    expert = -1;
    if constexpr (kIsGrouped<kScoring>) weight = 0.0f;
  }
  out.weights[at] = weight;
  if (out.id_type == IndexType::kInt64) {
    static_cast<int64_t*>(out.ids)[at] = expert;
  } else {
    static_cast<int32_t*>(out.ids)[at] = expert;
  }
  if (out.source_rows) out.source_rows[at] = static_cast<int32_t>(lane * out.num_tokens + token);
}

// One row: x are its logits, kBeyond beyond the last. Lane k < topk writes the k-th expert. All lanes take part.
template <Scoring kScoring, int kQuads>
__device__ __forceinline__ void select_row(const SelectParams& p, const SelectOutputs& out, int64_t token,
                                           const float (&bias)[4 * kQuads], float (&x)[4 * kQuads]) {
  const int lane = threadIdx.x % 32;
  make_scores<kScoring>(x);
  pass_over_nan<kScoring>(p, x);

  Candidates<kQuads> candidates;
#pragma unroll
  for (int j = 0; j < 4 * kQuads; ++j) {
    const int expert = expert_of(lane, j);
    candidates.set(j, x[j] + bias[j], expert);
    if (expert >= p.num_experts) candidates.remove(j);
  }
  candidates.sort();
  if constexpr (kIsGrouped<kScoring>) {
    if (p.num_groups > 1) keep_best_groups(p, lane, candidates);
  }

  int expert = 0;
  float weight = 0.0f;
  for (int k = 0; k < p.topk; ++k) {
    const uint64_t won = candidates.pop();
    if (lane == k) expert = ~static_cast<uint32_t>(won), weight = from_ordered(won >> 32);
  }

  if (p.bias) {
    // The weight is the score without the bias, which another lane holds.
    const int owner = expert / 4 % 32, element = expert / 128 * 4 + expert % 4;
#pragma unroll
    for (int j = 0; j < 4 * kQuads; ++j) {
      const float score = __shfl_sync(kAllLanes, x[j], owner);
      if (j == element) weight = score;
    }
  }
  write_row<kScoring>(p, out, token, expert, weight);
}

}  // namespace vllm_b200
