#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "../quant/token_quant.cuh"
#include "rms_norm_quant.h"

// A block takes a row, a thread one or two chunks of it, 512 columns a warp as in the other quantisers. The row is read
// once: its sums wait in registers while the block adds up the squares.

namespace vllm_b200 {
namespace {

// The sum of the squares of elements kFirst to kFirst + kCount - 1 as a tree of neighbours, without fused multiply-adds:
// PyTorch can do the same.
template <int kFirst = 0, int kCount = kChunk>
__device__ __forceinline__ float sum_of_squares(const Chunk<float>& chunk) {
  if constexpr (kCount == 1) {
    const float value = __uint_as_float(chunk.word[kFirst]);
    return __fmul_rn(value, value);
  } else {
    return __fadd_rn(sum_of_squares<kFirst, kCount / 2>(chunk), sum_of_squares<kFirst + kCount / 2, kCount / 2>(chunk));
  }
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) value = __fadd_rn(value, __shfl_xor_sync(kFullWarp, value, lanes));
  return value;
}

// How a normalised row ends. Each has quantize(p, chunks, columns, row, lane), called by all threads of the block.
template <typename In, typename Out, int kGroupSize, ScaleType kScale>
struct GroupEnd {
  static constexpr int kLanesPerGroup = kGroupSize / kChunk;
  static constexpr bool kPow2 = kScale != ScaleType::kFloat;
  static constexpr int kLanesPerScale = kScale == ScaleType::kPackedUE8M0 ? 4 * kLanesPerGroup : kLanesPerGroup;
  using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, Divisor>;

  template <int kChunks>
  static __device__ __forceinline__ void quantize(const RmsNormQuantParams& p, const Chunk<In> (&chunk)[kChunks],
                                                  int64_t row) {
    const int lane = threadIdx.x % 32;
    const bool valid_row = row < p.rows;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = (threadIdx.x + i * blockDim.x) * kChunk;
      const bool in_row = column < p.hidden_size;
      const float scale = group_scale<Out, kGroupSize, kPow2>(absmax_bits(chunk[i]), p.eps);
      if (in_row && valid_row) {
        quantize_chunk(chunk[i], Divide(scale), static_cast<Out*>(p.q) + row * p.q_stride_row + column);
      }
      const uint32_t word = scale_word<kScale, kLanesPerGroup>(scale, in_row && valid_row, lane);
      const int64_t offset =
          row * p.scale_stride_row + column / (kChunk * kLanesPerScale) * p.scale_stride_column;
      if (in_row && lane % kLanesPerScale == 0 && offset < p.scale_capacity) {
        static_cast<uint32_t*>(p.scale)[offset] = word;
      }
    }
  }
};

template <typename In, TokenQuant kKind, bool kPerTensor>
struct RowEnd {
  template <int kChunks>
  static __device__ __forceinline__ void quantize(const RmsNormQuantParams& p, const Chunk<In> (&chunk)[kChunks],
                                                  int64_t row) {
    void* destination[kChunks];
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = (threadIdx.x + i * blockDim.x) * kChunk;
      destination[i] = column < p.hidden_size ? static_cast<uint8_t*>(p.q) + row * p.q_stride_row + column : nullptr;
    }
    float* scale = static_cast<float*>(p.scale);
    if constexpr (kPerTensor) {
      const float given = *scale;
#pragma unroll
      for (int i = 0; i < kChunks; ++i) {
        if (destination[i] != nullptr) quantize_with<kKind, Divisor>(chunk[i], given, 0, destination[i]);
      }
    } else {
      quantize_row<kKind, Divisor>(chunk, destination, scale + row, nullptr, p.scale_ub);
    }
  }
};

// kEarlyWeight: the weight before the sums, which is sooner but takes registers.
template <typename In, typename End, bool kResidual, int kChunks, bool kEarlyWeight, int kMaxThreads, int kMinBlocks>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
rms_norm_quant_kernel(const __grid_constant__ RmsNormQuantParams p) {
  __shared__ float4 warp_sums[kMaxNormHiddenSize / kWarpColumns / 4];
  pdl_trigger();
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const bool valid_row = row < p.rows;
  const In* x = static_cast<const In*>(p.x) + row * p.x_stride_row;
  const In* residual = static_cast<const In*>(p.residual) + row * p.residual_stride_row;
  In* total = static_cast<In*>(p.total) + row * p.total_stride_row;

  Chunk<In> weight[kChunks] = {};
  const auto load_weight = [&](int i) {
    const int column = (threadIdx.x + i * blockDim.x) * kChunk;
    if (column < p.hidden_size) load_chunk<In, true>(weight[i], static_cast<const In*>(p.weight) + column);
  };
  if constexpr (kEarlyWeight) {  // before the wait, too: no kernel of the stream writes it
#pragma unroll
    for (int i = 0; i < kChunks; ++i) load_weight(i);
  }
  asm volatile("" ::"l"(x), "l"(residual), "l"(total));
  touch(p);
  pdl_wait();

  Chunk<In> added[kChunks] = {}, chunk[kChunks] = {};
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (threadIdx.x + i * blockDim.x) * kChunk;
    if (column < p.hidden_size && valid_row) {
      load_chunk<In, true>(chunk[i], x + column);
      if constexpr (kResidual) load_chunk<In, true>(added[i], residual + column);
    }
  }
  Chunk<float> sum[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int column = (threadIdx.x + i * blockDim.x) * kChunk;
#pragma unroll
    for (int j = 0; j < kChunk / 2; ++j) {
      const float2 a = unpack_pair(chunk[i], j), b = unpack_pair(added[i], j);
      const float2 both = kResidual ? float2{a.x + b.x, a.y + b.y} : a;
      pack_pair(sum[i], j, both.x, both.y);
      if constexpr (kResidual) pack_pair(chunk[i], j, both.x, both.y);
    }
    if constexpr (kResidual) {
      if (column < p.hidden_size && valid_row) store_chunk(total + column, chunk[i]);
    }
    const float squares = warp_sum(sum_of_squares(sum[i]));
    if (lane == 0) reinterpret_cast<float*>(warp_sums)[warp + i * warps] = squares;
  }
  // The chains read whole float4s.
  if (threadIdx.x < 3) {
    const int slots = kChunks * warps + static_cast<int>(threadIdx.x);
    if (slots < (kChunks * warps + 3) / 4 * 4) reinterpret_cast<float*>(warp_sums)[slots] = 0.0f;
  }
  __syncthreads();
  float4 chains = warp_sums[0];
  for (int i = 1; i < (kChunks * warps + 3) / 4; ++i) {
    const float4 next = warp_sums[i];
    chains.x = __fadd_rn(chains.x, next.x), chains.y = __fadd_rn(chains.y, next.y);
    chains.z = __fadd_rn(chains.z, next.z), chains.w = __fadd_rn(chains.w, next.w);
  }
  const float squares = __fadd_rn(__fadd_rn(chains.x, chains.y), __fadd_rn(chains.z, chains.w));
  const float mean = __fdiv_rn(squares, static_cast<float>(p.hidden_size));
  const float rstd = __frcp_rn(__fsqrt_rn(__fadd_rn(mean, p.norm_eps)));

#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    if constexpr (!kEarlyWeight) load_weight(i);
#pragma unroll
    for (int j = 0; j < kChunk / 2; ++j) {
      const float2 w = unpack_pair(weight[i], j);
      const float a = __fmul_rn(__uint_as_float(sum[i].word[2 * j]), rstd);
      const float b = __fmul_rn(__uint_as_float(sum[i].word[2 * j + 1]), rstd);
      if (p.gemma) {
        pack_pair(chunk[i], j, __fmul_rn(a, __fadd_rn(1.0f, w.x)), __fmul_rn(b, __fadd_rn(1.0f, w.y)));
      } else {
        pack_pair(chunk[i], j, a, b);
        const float2 rounded = unpack_pair(chunk[i], j);
        pack_pair(chunk[i], j, __fmul_rn(rounded.x, w.x), __fmul_rn(rounded.y, w.y));
      }
    }
  }
  End::quantize(p, chunk, row);
}

template <typename In, typename End, bool kResidual, int kChunks, bool kEarlyWeight, int kMaxThreads, int kMinBlocks>
cudaError_t launch_rms_norm_quant(const RmsNormQuantParams& p, cudaStream_t stream) {
  const int64_t threads = round_up((p.hidden_size + kChunks * kChunk - 1) / (kChunks * kChunk), 32);
  if (threads > kMaxThreads) return cudaErrorInvalidValue;
  return launch_kernel(rms_norm_quant_kernel<In, End, kResidual, kChunks, kEarlyWeight, kMaxThreads, kMinBlocks>,
                       dim3(p.padded_rows), dim3(threads), 0, stream, p.pdl, p);
}

template <typename In, typename End, bool kResidual>
cudaError_t choose_threads(const RmsNormQuantParams& p, cudaStream_t stream) {
  if (p.rows <= 132) {
    // The registers that these bounds leave decide how early the loads are; measured on an H200.
    return p.hidden_size > 4096 && p.hidden_size <= 512 * kChunk
               ? launch_rms_norm_quant<In, End, kResidual, 1, true, 512, 1>(p, stream)
               : launch_rms_norm_quant<In, End, kResidual, 1, true, 1024, 1>(p, stream);
  }
  if (p.hidden_size <= 8192) return launch_rms_norm_quant<In, End, kResidual, 1, false, 512, 3>(p, stream);
  return launch_rms_norm_quant<In, End, kResidual, 2, false, 512, 2>(p, stream);
}

template <typename In, typename End>
cudaError_t choose_launch(const RmsNormQuantParams& p, cudaStream_t stream) {
  return p.residual != nullptr ? choose_threads<In, End, true>(p, stream) : choose_threads<In, End, false>(p, stream);
}

}  // namespace
}  // namespace vllm_b200
