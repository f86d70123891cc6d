#pragma once

#include "../common/bulk_copy.cuh"
#include "../common/launch.cuh"
#include "../quant/quantizers.cuh"
#include "assignments.cuh"
#include "few_tokens.h"

// What the two kernels of few_tokens.cu share: the stream of weights, the quantised activations, the product.
//
// A tile is 16 rows of one expert's weights times all tokens of the batch, which are the columns of mma.m16n8k32. In a
// 64-byte half of a block of 128 columns the k index is permuted alike in A and B, so that a lane's 16 contiguous bytes
// feed two of them.

namespace vllm_b200 {

constexpr int kRows = 16;
constexpr int kBlock = 128;        // columns that share a scale
constexpr int kTileTokens = 8;     // columns of an mma
constexpr float kEps = 1e-10f;
constexpr int kTeams = 2;  // of the warps that multiply
// Of a thread, for the 18 warps that rows of w2 of 1024 and more bytes take.
constexpr int kRegisters = 96;

using Fp8 = __nv_fp8_e4m3;
using Bf16 = __nv_bfloat16;

__host__ __device__ constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// How rows of weights are cut: into chunks of kChunkBlocks blocks, and the rest.
template <int kChunkBlocks>
struct RowChunks {
  int blocks;  // of a row
  int chunks;

  __host__ __device__ explicit RowChunks(int columns)
      : blocks(columns / kBlock), chunks((blocks + kChunkBlocks - 1) / kChunkBlocks) {}
  __host__ __device__ int largest() const { return blocks < kChunkBlocks ? blocks : kChunkBlocks; }
  __host__ __device__ int blocks_of(int chunk) const {
    return blocks - chunk * kChunkBlocks < kChunkBlocks ? blocks - chunk * kChunkBlocks : kChunkBlocks;
  }
  __host__ __device__ int stage_bytes() const { return kRows * kBlock * largest(); }
};

// Buffers of 16 rows by a chunk in shared memory, filled in turn by one thread and emptied by others.
struct Ring {
  uint32_t data, barriers;
  int stages, stage_bytes;
  int slot = 0;
  uint32_t parity = 0;

  static __host__ __device__ constexpr int barrier_bytes(int stages) { return 16 * stages; }
  __device__ __forceinline__ uint32_t full(int i) const { return barriers + 16 * i; }
  __device__ __forceinline__ uint32_t empty(int i) const { return barriers + 16 * i + 8; }

  // One thread; the block's barrier follows. releases: of a buffer, before it is filled again.
  __device__ __forceinline__ void init(int releases) const {
    for (int i = 0; i < stages; ++i) {
      barrier_init(full(i), 1);
      barrier_init(empty(i), releases);
    }
    barrier_init_fence();
  }
  __device__ __forceinline__ void advance() {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
  // `upper` and `lower`: the first of eight rows each, of `pitch` bytes, of which `bytes` from `column` on are fetched.
  __device__ __forceinline__ void fetch(const uint8_t* upper, const uint8_t* lower, int column, int bytes, int pitch,
                                        uint64_t policy) {
    barrier_wait(empty(slot), parity ^ 1);
    const uint32_t barrier = full(slot), to = data + slot * stage_bytes;
    barrier_expect(barrier, kRows * bytes);
    if (bytes == pitch) {
      bulk_copy(to, upper, kRows / 2 * bytes, barrier, policy);
      bulk_copy(to + kRows / 2 * bytes, lower, kRows / 2 * bytes, barrier, policy);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / 2; ++i) {
        bulk_copy(to + i * bytes, upper + int64_t{i} * pitch + column, bytes, barrier, policy);
        bulk_copy(to + (i + kRows / 2) * bytes, lower + int64_t{i} * pitch + column, bytes, barrier, policy);
      }
    }
    advance();
  }
  // The address of the current buffer, once it is full. The whole warp calls it.
  __device__ __forceinline__ uint32_t wait() const {
    barrier_wait(full(slot), parity);
    __syncwarp();
    return data + slot * stage_bytes;
  }
  // After the last read of the current buffer.
  __device__ __forceinline__ void release() const { barrier_arrive(empty(slot)); }
};

// Quantised activations in shared memory: 128 bytes for each block of a row, its halves swapped in every other row, so
// that the 16-byte reads of two neighbours meet no bank twice.
__device__ __forceinline__ uint32_t quantised_half(int row, int half) { return ((half ^ row) & 1) * (kBlock / 2); }

// A block of a row of activations, 32 of its elements in each of four lanes.
template <bool kPow2>
struct Group {
  Chunk<Bf16> low = {}, high = {};

  __device__ __forceinline__ void load(const Bf16* block) {
    const int quad = threadIdx.x % 4;
    load_chunk<Bf16, true>(low, block + quad * kChunk);
    load_chunk<Bf16, true>(high, block + kBlock / 2 + quad * kChunk);
  }
  // To `destination`, 128 bytes of a row of this number; returns the scale. The whole warp calls it.
  __device__ __forceinline__ float quantize(uint8_t* destination, int row, bool store) const {
    using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, Divisor>;
    // Four lanes hold a group as they would one of 64 elements.
    const float scale = group_scale<Fp8, 4 * kChunk, kPow2>(max(absmax_bits(low), absmax_bits(high)), kEps);
    if (!store) return scale;
    const Divide divide(scale);
    destination += threadIdx.x % 4 * kChunk;
    quantize_chunk(low, divide, reinterpret_cast<Fp8*>(destination + quantised_half(row, 0)));
    quantize_chunk(high, divide, reinterpret_cast<Fp8*>(destination + quantised_half(row, 1)));
    return scale;
  }
};

// The index of the calling warp, as a value that the compiler knows to be the same in all lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0); }

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// One lane's part of 16 rows by a block of weights.
struct WeightBlock {
  uint4 upper[2], lower[2];

  // Of a block in a buffer of the ring with rows of `pitch` bytes: where the calling lane's part is.
  static __device__ __forceinline__ int lane_offset(int pitch) {
    return threadIdx.x % 32 / 4 * pitch + threadIdx.x % 4 * 16;
  }
  __device__ __forceinline__ void load(uint32_t address, int pitch) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      upper[half] = load_shared(address + half * (kBlock / 2));
      lower[half] = load_shared(address + kRows / 2 * pitch + half * (kBlock / 2));
    }
  }
  // product[0], product[1]: row lane / 4, columns lane % 4 * 2 and the one after; product[2], product[3]: 8 rows on.
  // x: both halves of the block in the row of activations that is column lane / 4.
  __device__ __forceinline__ void multiply(float (&product)[4], const uint4 (&x)[2]) const {
    float other[4] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) product[i] = 0.0f;
    mma(product, upper[0].x, lower[0].x, upper[0].y, lower[0].y, x[0].x, x[0].y);
    mma(other, upper[1].x, lower[1].x, upper[1].y, lower[1].y, x[1].x, x[1].y);
    mma(product, upper[0].z, lower[0].z, upper[0].w, lower[0].w, x[0].z, x[0].w);
    mma(other, upper[1].z, lower[1].z, upper[1].w, lower[1].w, x[1].z, x[1].w);
#pragma unroll
    for (int i = 0; i < 4; ++i) product[i] += other[i];
  }
};

// A barrier of some of a block's threads; 0 is the whole block's.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace vllm_b200
