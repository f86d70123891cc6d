#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../quant/types.h"

namespace vllm_b200 {

// One of the two things that a token puts into the cache: [tokens, heads, head_size] to
// [blocks, block_size, heads, head_size]. Strides in elements of the tensor they belong to.
struct CachePart {
  const void* source;
  void* cache;
  const float* scale;  // e4m3: [1] or [heads]
  int32_t heads, head_size;
  int64_t source_stride_token, source_stride_head;
  int64_t cache_stride_block, cache_stride_slot, cache_stride_head;
  int32_t scale_stride_head;  // 0 or 1
};

struct CacheWriteParams {
  CachePart parts[2];    // keys and values, or latents and rotary parts
  const int64_t* slots;  // [tokens]: block * block_size + place in it; a negative one is skipped
  int64_t tokens;
  int32_t block_size;
  bool pdl;  // launch with programmatic stream serialization
};

// Copies 16-bit elements, or writes e4m3(x / scale). Head sizes are multiples of 16, and every head of source and cache
// begins at a multiple of 16 bytes; heads * head_size < 2^20.
cudaError_t cache_write(const CacheWriteParams& params, InputType input, bool e4m3, cudaStream_t stream);

}  // namespace vllm_b200
