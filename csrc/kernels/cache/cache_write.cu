#include "cache_write.h"

#include <algorithm>

#include "../common/launch.cuh"
#include "../quant/quantizers.cuh"

// A thread takes 16 elements of one part. Its load does not wait for the slot: only the address of the store does.

namespace vllm_b200 {
namespace {

constexpr int64_t kFewTokens = 264;

struct Divider {
  uint32_t divisor, magic;

  explicit Divider(uint32_t d) : divisor(d), magic(d == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d)) {}
  // Right while x * divisor < 2^32.
  __device__ __forceinline__ uint32_t operator()(uint32_t x) const { return divisor == 1 ? x : __umulhi(x, magic); }
};

struct LaunchParams {
  CacheWriteParams p;
  uint32_t chunks[2];  // of a token, of each part
  Divider per_head[2];
  int32_t block_shift;  // log2 of block_size, or -1
};

__device__ __forceinline__ void split_slot(const LaunchParams& launch, int64_t slot, int64_t& block, int64_t& place) {
  if (launch.block_shift >= 0) {
    block = slot >> launch.block_shift;
    place = slot & (launch.p.block_size - 1);
  } else if (slot < int64_t{1} << 32) {
    block = static_cast<uint32_t>(slot) / static_cast<uint32_t>(launch.p.block_size);
    place = slot - block * launch.p.block_size;
  } else {
    block = slot / launch.p.block_size;
    place = slot - block * launch.p.block_size;
  }
}

// blockIdx.z is the part: what a block needs to know of it comes from one place of the launch's parameters.
template <typename In, bool kE4M3>
__global__ void __launch_bounds__(256) cache_write_kernel(const __grid_constant__ LaunchParams launch) {
  pdl_trigger();
  const CachePart& part = launch.p.parts[blockIdx.z];
  const Divider per_head = launch.per_head[blockIdx.z];
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  uint32_t index = blockIdx.y * blockDim.x + threadIdx.x;
  const int64_t* slot_address = launch.p.slots + token;
  asm volatile("" ::"l"(slot_address), "l"(part.source), "l"(part.source_stride_token));
  pdl_wait();
  if (token >= launch.p.tokens) return;
  const int64_t slot = *slot_address;

  for (; index < launch.chunks[blockIdx.z]; index += gridDim.y * blockDim.x) {
    const uint32_t head = per_head(index), column = (index - head * per_head.divisor) * kChunk;
    Chunk<In> chunk;
    load_chunk<In, true>(chunk, static_cast<const In*>(part.source) + token * part.source_stride_token +
                                    head * part.source_stride_head + column);
    const float scale = kE4M3 ? part.scale[head * part.scale_stride_head] : 1.0f;
    // While the loads are under way: what the slot is needed for, and where in its place the chunk goes.
    const int64_t within = head * part.cache_stride_head + column;
    asm volatile("" ::"l"(within), "l"(part.cache), "l"(part.cache_stride_block), "l"(part.cache_stride_slot),
                 "r"(launch.block_shift), "r"(launch.p.block_size));
    if (slot < 0) return;
    int64_t block, place;
    split_slot(launch, slot, block, place);
    const int64_t offset = block * part.cache_stride_block + place * part.cache_stride_slot + within;
    if constexpr (kE4M3) {
      quantize_chunk(chunk, Divisor(scale), static_cast<__nv_fp8_e4m3*>(part.cache) + offset);
    } else {
      store_chunk(static_cast<In*>(part.cache) + offset, chunk);
    }
  }
}

}  // namespace

cudaError_t cache_write(const CacheWriteParams& p, InputType input, bool e4m3, cudaStream_t stream) {
  const CachePart &first = p.parts[0], &second = p.parts[1];
  const LaunchParams launch = {p,
                               {static_cast<uint32_t>(first.heads * (first.head_size / kChunk)),
                                static_cast<uint32_t>(second.heads * (second.head_size / kChunk))},
                               {Divider(first.head_size / kChunk), Divider(second.head_size / kChunk)},
                               (p.block_size & (p.block_size - 1)) == 0 ? __builtin_ctz(p.block_size) : -1};
  const uint32_t chunks = std::max(launch.chunks[0], launch.chunks[1]);
  if (p.tokens == 0 || chunks == 0) return cudaSuccess;
  // Few tokens want small blocks on many SMs.
  const uint32_t threads = std::min<uint32_t>((chunks + 31) / 32 * 32, p.tokens < kFewTokens ? 64 : 256);
  const uint32_t tokens = p.tokens < kFewTokens ? 1 : std::max<uint32_t>(1, 128 / threads);
  const dim3 grid((p.tokens + tokens - 1) / tokens, p.tokens < kFewTokens ? (chunks + threads - 1) / threads : 1, 2);
  const dim3 block(threads, tokens);
  if (!e4m3) {  // a copy: the bits are all that counts
    return launch_kernel(cache_write_kernel<__half, false>, grid, block, 0, stream, p.pdl, launch);
  }
  if (input == InputType::kBFloat16) {
    return launch_kernel(cache_write_kernel<__nv_bfloat16, true>, grid, block, 0, stream, p.pdl, launch);
  }
  return launch_kernel(cache_write_kernel<__half, true>, grid, block, 0, stream, p.pdl, launch);
}

}  // namespace vllm_b200
