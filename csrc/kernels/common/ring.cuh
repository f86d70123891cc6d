#pragma once

#include "bulk_copy.cuh"

namespace vllm_b200 {

// Buffers in shared memory that one warp, or one thread, fills by bulk copies in turn and other warps empty. Each has a
// barrier that says that it is full and one that says that it is empty.
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
  // By `buffers`, no more than there are.
  __device__ __forceinline__ void advance(int buffers) {
    slot += buffers;
    if (slot >= stages) slot -= stages, parity ^= 1;
  }
  // Until the current buffer may be filled.
  __device__ __forceinline__ void wait_empty() const { barrier_wait(empty(slot), parity ^ 1); }
  // The address of the current buffer, once it is full. The whole warp calls it.
  __device__ __forceinline__ uint32_t wait() const {
    barrier_wait(full(slot), parity);
    __syncwarp();
    return data + slot * stage_bytes;
  }
  // After the last read of the current buffer.
  __device__ __forceinline__ void release() const { barrier_arrive(empty(slot)); }
};

// A barrier of some of a block's threads; 0 is the whole block's.
__device__ __forceinline__ void sync_threads(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// To arrive there and go on.
__device__ __forceinline__ void arrive_threads(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace vllm_b200
