#pragma once

#include "../quant/quantizers.cuh"
#include "few_tokens.h"

namespace vllm_b200 {

constexpr int kMaxTokens = 16;  // of a launch

// An expert that the batch asks for, and its tokens. Every pair of an expert and a token of it has a place: they are
// counted in the order of entries, then tokens.
struct Entry {
  int expert, first;  // first: place of its first token
  uint32_t tokens;    // bit t: token t

  __device__ __forceinline__ bool has(int token) const { return tokens >> token & 1; }
  __device__ __forceinline__ int place(int token) const { return first + __popc(tokens & ((1u << token) - 1)); }
  __device__ __forceinline__ int end() const { return first + __popc(tokens); }
};

// The experts that the batch asks for, in shared memory: those of even numbers in order, then those of odd ones. Every
// block finds them from topk_ids by itself.
class Assignments {
 public:
  static __host__ __device__ int bytes(const FewTokensMoeParams& p) {
    const int count = padded_count(p);
    return 8 * max_entries(p) + 2 * count + 4 * (p.num_experts + kWords + 1) + 8 * count;
  }

  // shared: at a multiple of 16 bytes.
  __device__ Assignments(uint8_t* shared, const FewTokensMoeParams& p) {
    keys_ = reinterpret_cast<uint16_t*>(shared);
    entries_ = reinterpret_cast<uint2*>(keys_ + padded_count(p));
    tokens_ = reinterpret_cast<uint32_t*>(entries_ + max_entries(p));
    asked_ = tokens_ + p.num_experts;
    repeated_ = asked_ + kWords;
    weights_ = reinterpret_cast<float*>(repeated_ + 1);
    given_ = weights_ + padded_count(p);
  }

  // Before collect(), with a barrier of the block between the two.
  __device__ __forceinline__ void clear(const FewTokensMoeParams& p) {
    for (int i = threadIdx.x; i < p.num_experts + kWords + 1; i += blockDim.x) tokens_[i] = 0;
  }

  // All threads of the block, which are whole warps; ends with a barrier. kWeights: weight() will be asked for.
  template <bool kWeights>
  __device__ __forceinline__ void collect(const FewTokensMoeParams& p) {
    const int count = padded_count(p), lane = threadIdx.x % 32;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
      const int expert = i < p.num_tokens * p.top_k ? local_expert(p, i) : -1;
      keys_[i] = kNobody;
      if (kWeights && expert >= 0) given_[i] = p.topk_weights == nullptr ? 1.0f : p.topk_weights[i];
      if (expert < 0) continue;
      const int token = i / p.top_k;
      // Where a token asks for an expert twice, one of its assignments (token, slot) stands for both.
      const int rank = rank_of(p, expert);
      const uint32_t bit = 1u << token, before = atomicOr(tokens_ + rank, bit);
      if (before & bit) {
        *repeated_ = 1;
      } else {
        keys_[i] = rank * kMaxTokens + token;
        atomicOr(asked_ + rank / 32, 1u << rank % 32);
      }
    }
    __syncthreads();
    // Lane i: how many experts are asked for of the ranks up to word i's last.
    const int words = (p.num_experts + 31) / 32;
    const uint32_t own_word = lane < words ? asked_[lane] : 0;
    int up_to = __popc(own_word);
    for (int distance = 1; distance < words; distance *= 2) {
      const int other = __shfl_up_sync(kFullWarp, up_to, distance);
      if (lane >= distance) up_to += other;
    }
    size_ = __shfl_sync(kFullWarp, up_to, words - 1);
    const int first_odd = (p.num_experts + 1) / 2;
    even_ = __shfl_sync(kFullWarp, up_to - __popc(own_word & ~((1u << first_odd % 32) - 1)), first_odd / 32 % 32);
    for (int first = threadIdx.x - lane; first < count; first += blockDim.x) {
      const int i = first + lane;
      const uint32_t key = i < count ? keys_[i] : kNobody;
      const int rank = key == kNobody ? 0 : key / kMaxTokens, token = key % kMaxTokens;
      const int end = __shfl_sync(kFullWarp, up_to, rank / 32);
      if (key == kNobody) continue;
      int place = 0;
      for (int j = 0; j < count / 8; ++j) {
        const uint4 eight = reinterpret_cast<const uint4*>(keys_)[j];
        place += below(eight.x, key) + below(eight.y, key) + below(eight.z, key) + below(eight.w, key);
      }
      const uint32_t tokens = tokens_[rank];
      const int expert = rank < first_odd ? 2 * rank : 2 * (rank - first_odd) + 1;
      if ((tokens & ((1u << token) - 1)) == 0) {
        entries_[end - __popc(asked_[rank / 32] >> rank % 32)] = make_uint2(expert | place << 16, tokens);
      }
      if (kWeights) weights_[place] = weight_of(p, i, expert, token);
    }
    __syncthreads();
  }

  __device__ __forceinline__ int size() const { return size_; }
  __device__ __forceinline__ int even() const { return even_; }  // how many have even numbers
  __device__ __forceinline__ Entry operator[](int index) const {
    const uint2 words = entries_[index];
    return {static_cast<int>(words.x & 0xffff), static_cast<int>(words.x >> 16), words.y};
  }
  __device__ __forceinline__ float weight(int place) const { return weights_[place]; }

 private:
  static constexpr int kWords = kMaxExperts / 32;
  static constexpr uint32_t kNobody = 0xffff;

  static __host__ __device__ int padded_count(const FewTokensMoeParams& p) {
    return (p.num_tokens * p.top_k + 7) / 8 * 8;
  }
  static __host__ __device__ int max_entries(const FewTokensMoeParams& p) {
    return p.num_experts < p.num_tokens * p.top_k ? p.num_experts : p.num_tokens * p.top_k;
  }
  static __device__ __forceinline__ int rank_of(const FewTokensMoeParams& p, int expert) {
    return expert / 2 + expert % 2 * ((p.num_experts + 1) / 2);
  }
  // The expert of an assignment, or -1 where it is not here.
  static __device__ __forceinline__ int local_expert(const FewTokensMoeParams& p, int assignment) {
    const int64_t id = p.ids_are_int64 ? static_cast<const int64_t*>(p.topk_ids)[assignment]
                                       : static_cast<const int32_t*>(p.topk_ids)[assignment];
    if (id < 0 || id >= p.num_global_experts) return -1;
    const int expert = p.expert_map == nullptr ? static_cast<int>(id) : p.expert_map[id];
    return expert < p.num_experts ? max(expert, -1) : -1;
  }
  // How many of two keys are below `key`.
  static __device__ __forceinline__ int below(uint32_t two, uint32_t key) {
    return ((two & 0xffff) < key) + ((two >> 16) < key);
  }
  // All that the token gives to the expert, in the order of its slots.
  __device__ __forceinline__ float weight_of(const FewTokensMoeParams& p, int assignment, int expert, int token) const {
    if (*repeated_ == 0) return given_[assignment];
    float weight = 0.0f;
    for (int slot = token * p.top_k; slot < (token + 1) * p.top_k; ++slot) {
      if (local_expert(p, slot) == expert) weight += given_[slot];
    }
    return weight;
  }

  uint16_t* keys_;     // by assignment: rank and token of one that counts
  uint2* entries_;     // expert | first place << 16, tokens
  uint32_t* tokens_;   // by rank of the expert
  uint32_t* asked_;    // bit r % 32 of word r / 32: the expert of rank r
  uint32_t* repeated_; // whether a token asks for an expert twice
  float* weights_;     // by place
  float* given_;       // by assignment
  int size_ = 0, even_ = 0;
};

}  // namespace vllm_b200
