#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "row_source.cuh"

// One scale for a row of one or several warps, whose numbers stay in registers between its maximum and its bytes; or
// one given scale for everything.

namespace vllm_b200 {
namespace {

constexpr int kRowsPerBlock = 4;  // where a row is a warp

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200
constexpr int kThreadsOfSm = 1536;
#else
constexpr int kThreadsOfSm = 2048;
#endif

// Fp32 as an int that orders alike; NaN lies beyond the infinity of its sign.
__device__ __forceinline__ int ordered(float x) {
  const int bits = __float_as_int(x);
  return bits ^ (bits >> 31 & 0x7fffffff);
}
__device__ __forceinline__ float from_ordered(int bits) { return __int_as_float(bits ^ (bits >> 31 & 0x7fffffff)); }

// The smallest and the largest of some numbers, ordered.
struct Range {
  int low = 0x7fffffff, high = -0x7fffffff - 1;
};

__device__ __forceinline__ void widen(Range& range, float low, float high) {
  range.low = min(range.low, ordered(low)), range.high = max(range.high, ordered(high));
}

template <typename T, int kSize>
__device__ __forceinline__ void widen(Range& range, const Chunk<T, kSize>& chunk) {
  constexpr int kWords = Chunk<T, kSize>::kWords;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) widen(range, __uint_as_float(chunk.word[i]), __uint_as_float(chunk.word[i]));
  } else {
    using Pair = std::conditional_t<std::is_same_v<T, __nv_bfloat16>, __nv_bfloat162, __half2>;
    Pair low[kWords], high[kWords];
#pragma unroll
    for (int i = 0; i < kWords; ++i) low[i] = high[i] = reinterpret_cast<const Pair&>(chunk.word[i]);
#pragma unroll
    for (int half = kWords / 2; half > 0; half /= 2) {
#pragma unroll
      for (int i = 0; i < half; ++i) {
        low[i] = __hmin2_nan(low[i], low[i + half]), high[i] = __hmax2_nan(high[i], high[i + half]);
      }
    }
    Chunk<T, 4> ends;
    ends.word[0] = reinterpret_cast<const uint32_t&>(low[0]), ends.word[1] = reinterpret_cast<const uint32_t&>(high[0]);
    const float2 lows = unpack_pair(ends, 0), highs = unpack_pair(ends, 1);
    widen(range, lows.x, highs.x), widen(range, lows.y, highs.y);
  }
}

// The maximum over the warps of a row. A block of several rows has one warp for each.
__device__ __forceinline__ uint32_t row_max(uint32_t value) {
  __shared__ uint32_t warps[32];
  value = __reduce_max_sync(kFullWarp, value);
  if (blockDim.x > 32) {
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
    __syncthreads();
    value = __reduce_max_sync(kFullWarp, warps[min(threadIdx.x % 32, blockDim.x / 32 - 1)]);
  }
  return value;
}

__device__ __forceinline__ Range row_range(Range range) {
  __shared__ int2 warps[32];
  range = {__reduce_min_sync(kFullWarp, range.low), __reduce_max_sync(kFullWarp, range.high)};
  if (blockDim.x > 32) {
    if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = make_int2(range.low, range.high);
    __syncthreads();
    const int2 other = warps[min(threadIdx.x % 32, blockDim.x / 32 - 1)];
    range = {__reduce_min_sync(kFullWarp, other.x), __reduce_max_sync(kFullWarp, other.y)};
  }
  return range;
}

template <typename T, int kSize>
__device__ __forceinline__ void quantize_asymmetric(const Chunk<T, kSize>& chunk, float reciprocal, int azp,
                                                    void* destination) {
  uint32_t packed[kSize / 4];
#pragma unroll
  for (int i = 0; i < kSize / 4; ++i) {
    const float2 low = unpack_pair(chunk, 2 * i), high = unpack_pair(chunk, 2 * i + 1);
    const auto to_int = [&](float x) { return __float2int_rn(__fmul_rn(x, reciprocal)) + azp; };
    packed[i] = pack_int8(to_int(low.x), to_int(low.y), to_int(high.x), to_int(high.y));
  }
  store_words(destination, packed);
}

// Quantises the row of the calling warps from its chunks in registers: chunk i goes to destination[i], or nowhere if null.
template <TokenQuant kKind, typename Divide, int kChunks, typename Values>
__device__ __forceinline__ void quantize_row(const Values (&chunk)[kChunks], void* const (&destination)[kChunks],
                                             float* scale_out, int32_t* azp_out, const float* scale_ub) {
  if constexpr (kKind == TokenQuant::kInt8Asymmetric) {
    Range range;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (destination[i] != nullptr) widen(range, chunk[i]);
    }
    range = row_range(range);
    const float smallest = from_ordered(range.low), largest = from_ordered(range.high);
    const float scale = __fdiv_rn(largest - smallest, 255.0f);
    const bool flat = scale == 0.0f;  // a row of one value stands for 0, whatever its bytes
    const int azp = flat ? 0 : __float2int_rn(-128.0f - __fdiv_rn(smallest, scale));
    const float reciprocal = flat ? 0.0f : __frcp_rn(scale);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      if (destination[i] != nullptr) quantize_asymmetric(chunk[i], reciprocal, azp, destination[i]);
    }
    if (threadIdx.x == 0) *scale_out = scale, *azp_out = azp;
  } else {
    uint32_t amax = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) amax = max(amax, absmax_bits(chunk[i]));
    amax = row_max(amax);
    float scale;
    if constexpr (kKind == TokenQuant::kE4M3) {
      scale = token_scale_e4m3(amax, scale_ub);
      const Divide divide(scale);
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (destination[i] != nullptr) quantize_chunk(chunk[i], divide, static_cast<__nv_fp8_e4m3*>(destination[i]));
      }
    } else {
      scale = divide_by<127>(__uint_as_float(amax));
      const Multiplier multiply(amax == 0 ? 0.0f : __fdiv_rn(127.0f, __uint_as_float(amax)));
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (destination[i] != nullptr) quantize_chunk(chunk[i], multiply, static_cast<NearestInt8*>(destination[i]));
      }
    }
    if (threadIdx.x == 0) *scale_out = scale;
  }
}

// The same with one given scale.
template <TokenQuant kKind, typename Divide, typename Values>
__device__ __forceinline__ void quantize_with(const Values& chunk, float scale, int azp, void* destination) {
  if constexpr (kKind == TokenQuant::kE4M3) {
    quantize_chunk(chunk, Multiplier(__frcp_rn(scale)), static_cast<__nv_fp8_e4m3*>(destination));
  } else if constexpr (kKind == TokenQuant::kInt8) {
    quantize_chunk(chunk, Divide(scale), static_cast<NearestInt8*>(destination));
  } else {
    quantize_asymmetric(chunk, __frcp_rn(scale), azp, destination);
  }
}

// A block: one row of blockDim.x threads, or blockDim.y rows of a warp each.
template <typename Source, TokenQuant kKind, int kChunks, int kMaxThreads, int kMinBlocks>
__global__ void __launch_bounds__(kMaxThreads, std::min(kMinBlocks, kThreadsOfSm / kMaxThreads))
token_quant_kernel(const __grid_constant__ TokenQuantParams p) {
  pdl_trigger();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const auto* x = static_cast<const typename Source::Input*>(p.x) + row * p.x_stride_row;
  auto* q = static_cast<uint8_t*>(p.q) + row * p.q_stride_row;
  float* scale = p.scale + row;
  const int hidden_size = static_cast<int>(p.hidden_size);
  asm volatile("" ::"l"(x), "l"(q), "l"(scale), "r"(hidden_size));
  touch(p);
  pdl_wait();
  if (row >= p.rows) return;  // whole warps, of blocks with no barrier

  typename Source::Raw raw[kChunks] = {};
  void* destination[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (threadIdx.x + i * blockDim.x) * Source::kSize;
    destination[i] = column < hidden_size ? q + column : nullptr;
    if (column < hidden_size) Source::load(raw[i], x + column, hidden_size);
  }
  typename Source::Values chunk[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) chunk[i] = Source::finish(raw[i], p.activation);
  quantize_row<kKind, typename Source::Divide>(chunk, destination, scale, p.azp + row, p.scale_ub);
}

template <typename Source, TokenQuant kKind, int kMaxThreads, int kMinBlocks>
__global__ void __launch_bounds__(kMaxThreads, std::min(kMinBlocks, kThreadsOfSm / kMaxThreads))
tensor_quant_kernel(const __grid_constant__ TokenQuantParams p) {
  pdl_trigger();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * Source::kSize;
  int64_t row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  const auto* x = static_cast<const typename Source::Input*>(p.x) + row * p.x_stride_row + column;
  auto* q = static_cast<uint8_t*>(p.q) + row * p.q_stride_row + column;
  const int64_t rows = p.rows, step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  asm volatile("" ::"l"(x), "l"(q), "l"(rows));
  touch(p);
  pdl_wait();
  if (column >= p.hidden_size) return;

  // More rows only where the grid's limit of 65535 blocks cuts it.
  for (; row < rows; row += step, x += step * p.x_stride_row, q += step * p.q_stride_row) {
    typename Source::Raw raw;
    Source::load(raw, x, p.hidden_size);
    const float scale = *p.scale;
    const int azp = kKind == TokenQuant::kInt8Asymmetric ? *p.azp : 0;
    quantize_with<kKind, typename Source::Divide>(Source::finish(raw, p.activation), scale, azp, q);
  }
}

constexpr int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

template <typename Source, TokenQuant kKind, int kChunks, int kMaxThreads, int kMinBlocks>
cudaError_t launch_token_quant(const TokenQuantParams& p, cudaStream_t stream) {
  constexpr int kColumns = kChunks * Source::kSize;
  const int64_t threads = round_up((p.hidden_size + kColumns - 1) / kColumns, 32);
  const int rows = threads == 32 ? kRowsPerBlock : 1;
  if (threads * rows > kMaxThreads) return cudaErrorInvalidValue;
  const dim3 grid((p.rows + rows - 1) / rows), block(threads, rows);
  return launch_kernel(token_quant_kernel<Source, kKind, kChunks, kMaxThreads, kMinBlocks>, grid, block, 0, stream, p.pdl,
                       p);
}

// Blocks of `threads` threads, up to `width` of them along a row.
template <typename Source, TokenQuant kKind, int kMaxThreads, int kMinBlocks>
cudaError_t launch_tensor_quant(const TokenQuantParams& p, int threads, int64_t width, cudaStream_t stream) {
  const int64_t chunks = (p.hidden_size + Source::kSize - 1) / Source::kSize;
  width = std::min(width, round_up(chunks, 32));
  const dim3 block(width, std::min<int64_t>(threads / width, p.rows));
  const dim3 grid((chunks + width - 1) / width, std::min<int64_t>((p.rows + block.y - 1) / block.y, 65535));
  return launch_kernel(tensor_quant_kernel<Source, kKind, kMaxThreads, kMinBlocks>, grid, block, 0, stream, p.pdl, p);
}

}  // namespace
}  // namespace vllm_b200
