#include "cache_write.h"

#include <algorithm>

#include "../common/launch.cuh"
#include "../quant/quantizers.cuh"

// A thread takes 16 elements of one part. Its load does not wait for the slot: only the address of the store does.

namespace vllm_b200 {
namespace {

struct Divider {
  uint32_t divisor, magic;

  explicit Divider(uint32_t d) : divisor(d), magic(d == 1 ? 0 : static_cast<uint32_t>(((uint64_t{1} << 32) + d - 1) / d)) {}
  // Right while x * divisor < 2^32.
  __device__ __forceinline__ uint32_t operator()(uint32_t x) const { return divisor == 1 ? x : __umulhi(x, magic); }
};

struct LaunchParams {
  CacheWriteParams p;
  uint32_t first_chunks, chunks;  // of a token: of its first part, of both
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

template <typename In, bool kE4M3>
__global__ void __launch_bounds__(256) cache_write_kernel(const __grid_constant__ LaunchParams launch) {
  pdl_trigger();
  const CacheWriteParams& p = launch.p;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t* slot_address = p.slots + token;
  asm volatile("" ::"l"(slot_address));
  pdl_wait();
  if (token >= p.tokens) return;
  const int64_t slot = *slot_address;

  for (uint32_t index = blockIdx.y * blockDim.x + threadIdx.x; index < launch.chunks; index += gridDim.y * blockDim.x) {
    const bool second = index >= launch.first_chunks;
    const CachePart& part = p.parts[second];
    const uint32_t chunk_index = second ? index - launch.first_chunks : index;
    const Divider& per_head = launch.per_head[second];
    const uint32_t head = per_head(chunk_index), column = (chunk_index - head * per_head.divisor) * kChunk;
    Chunk<In> chunk;
    load_chunk<In, true>(chunk, static_cast<const In*>(part.source) + token * part.source_stride_token +
                                    head * part.source_stride_head + column);
    const float scale = kE4M3 ? part.scale[head * part.scale_stride_head] : 1.0f;
    if (slot < 0) return;
    int64_t block, place;
    split_slot(launch, slot, block, place);
    const int64_t offset =
        block * part.cache_stride_block + place * part.cache_stride_slot + head * part.cache_stride_head + column;
    if constexpr (kE4M3) {
      quantize_chunk(chunk, Divisor(scale), static_cast<__nv_fp8_e4m3*>(part.cache) + offset);
    } else {
      store_chunk(static_cast<In*>(part.cache) + offset, chunk);
    }
  }
}

}  // namespace

cudaError_t cache_write(const CacheWriteParams& p, InputType input, bool e4m3, cudaStream_t stream) {
  const uint32_t first = p.parts[0].heads * (p.parts[0].head_size / kChunk);
  const uint32_t second = p.parts[1].heads * (p.parts[1].head_size / kChunk);
  if (p.tokens == 0 || first + second == 0) return cudaSuccess;
  const bool power = (p.block_size & (p.block_size - 1)) == 0;
  const LaunchParams launch = {p,
                               first,
                               first + second,
                               {Divider(p.parts[0].head_size / kChunk), Divider(p.parts[1].head_size / kChunk)},
                               power ? __builtin_ctz(p.block_size) : -1};
  const uint32_t threads = std::min<uint32_t>((launch.chunks + 31) / 32 * 32, 256);
  const uint32_t tokens = p.tokens < 264 ? 1 : std::max<uint32_t>(1, 256 / threads);
  const dim3 grid((p.tokens + tokens - 1) / tokens, p.tokens < 264 ? (launch.chunks + threads - 1) / threads : 1);
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
