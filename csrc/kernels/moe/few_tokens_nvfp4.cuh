#pragma once

#include "../gemm/nvfp4.cuh"
#include "few_tokens.cuh"

// NVFP4 weights of few_tokens.cu. A tile, 16 rows by 128 columns, is 1152 contiguous bytes, in the order in which the
// lanes of a warp take them: 16 bytes of row lane / 4 and columns lane % 4 * 32 on for each lane; the same of the rows
// 8 on; then four scales for each lane, of two groups of the one row and of two of the other. Tiles of the same rows
// are contiguous, too. e2m1_times_scale leaves the columns of 8 in the order 0 4 1 5 2 6 3 7, to which activations are
// brought when they are stored.

namespace vllm_b200 {

__device__ __forceinline__ uint4 in_e2m1_order(uint4 eight) {
  return make_uint4(__byte_perm(eight.x, eight.z, 0x5410), __byte_perm(eight.x, eight.z, 0x7632),
                    __byte_perm(eight.y, eight.w, 0x5410), __byte_perm(eight.y, eight.w, 0x7632));
}

// Where a column of the hidden activations is in memory: in that order, the eights such that lanes which are neighbours
// read neighbours. column_tile: of 8 columns.
__device__ __forceinline__ int nvfp4_hidden_column(int column_tile, int column) {
  const int eight = (column_tile & ~15) + column_tile % 4 * 4 + column_tile / 4 % 4;
  return 8 * eight + column % 4 * 2 + column / 4;
}

// 32 of 128 elements in each lane.
template <> struct Group<Scales::kNvFp4> {
  uint4 eights[4] = {};

  __device__ __forceinline__ void load(const Bf16* block) {
    const uint4* const own = reinterpret_cast<const uint4*>(block) + threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) eights[i] = own[4 * i];
  }
  // Word j of the weights of lane q goes with the eight 4 q + j.
  __device__ __forceinline__ void store(uint8_t* destination, int row) const {
    const int word = threadIdx.x % 4;
    destination += word / 2 * kBlockBytes + shared_half(row, word % 2);
#pragma unroll
    for (int i = 0; i < 4; ++i) *reinterpret_cast<uint4*>(destination + 16 * i) = in_e2m1_order(eights[i]);
  }
};

// One lane's part of a tile, times its scales.
template <>
struct WeightBlock<E2m1Pair> {
  static constexpr int kStep = Format<Scales::kNvFp4>::kTileBytes;
  uint32_t upper[4][4], lower[4][4];  // words, then pairs of columns

  static __device__ __forceinline__ int lane_offset(int) { return threadIdx.x % 32 * 16; }
  __device__ __forceinline__ void load(uint32_t address, int) {
    constexpr int kHalf = 32 * 16;
    const uint4 top = load_shared(address), bottom = load_shared(address + kHalf);
    uint32_t scales, upper_scale[2], lower_scale[2];
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(scales) : "r"(address + 2 * kHalf - threadIdx.x % 32 * 12));
    e4m3_scales(scales & 0xffff, upper_scale);
    e4m3_scales(scales >> 16, lower_scale);
    const uint32_t top_words[4] = {top.x, top.y, top.z, top.w};
    const uint32_t bottom_words[4] = {bottom.x, bottom.y, bottom.z, bottom.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      e2m1_times_scale(top_words[i], upper_scale[i / 2], upper[i]);
      e2m1_times_scale(bottom_words[i], lower_scale[i / 2], lower[i]);
    }
  }
  // In two sums, which do not wait for each other.
  __device__ __forceinline__ void add_product(float (&sum)[4], float (&other)[4], const uint4 (&x)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      mma<Bf16>(sum, upper[i][0], lower[i][0], upper[i][1], lower[i][1], x[i].x, x[i].y);
      mma<Bf16>(other, upper[i][2], lower[i][2], upper[i][3], lower[i][3], x[i].z, x[i].w);
    }
  }
};

// What the sums of an expert's products are short of.
__device__ __forceinline__ float nvfp4_factor(const float* global_scales, int expert) {
  return __ldg(global_scales + expert) * kNvFp4Unit;
}

}  // namespace vllm_b200
