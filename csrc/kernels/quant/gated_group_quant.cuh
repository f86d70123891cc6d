#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "gated_quant.h"
#include "row_source.cuh"

namespace vllm_b200 {
namespace {

// What the lanes of a warp do with 32 * kSize columns of a row: with kSize 16 as in group_quant_kernel.
template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale, int kSize>
struct GatedTile {
  static constexpr int kColumns = 32 * kSize;
  static constexpr int kLanesPerGroup = kGroupSize / kSize;
  static constexpr bool kPacked = kScale == ScaleType::kPackedUE8M0, kPow2 = kScale != ScaleType::kFloat;
  static constexpr bool kWords = kSize == kChunk;  // else the four groups of a packed scale may be those of several warps
  static constexpr int kLanesPerScale = kPacked && kWords ? 4 * kLanesPerGroup : kLanesPerGroup;
  using Source = GatedRow<In, kActivation, kSize>;
  using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, Divisor>;
  static_assert(kLanesPerGroup <= 32);

  // The columns of a row that have a scale: those that fill up a packed one have zeros.
  static __device__ __host__ __forceinline__ int scaled_columns(int hidden_size) {
    return kPacked && !kWords ? (hidden_size + 4 * kGroupSize - 1) / (4 * kGroupSize) * (4 * kGroupSize) : hidden_size;
  }

  static __device__ __forceinline__ Tile<In, Out> tile(const GatedGroupQuantParams& p, int64_t batch, int64_t row,
                                                       int column) {
    return {p, batch, row, column, column / (kPacked ? 4 * kGroupSize : kGroupSize)};
  }

  // The whole warp calls it. scaled: the lane's columns have a scale; valid: they and the row exist, else it is padding.
  static __device__ __forceinline__ void quantize(const GatedGroupQuantParams& p, const Tile<In, Out>& tile, int column,
                                                  bool scaled, bool valid) {
    const int lane = threadIdx.x % 32;
    typename Source::Raw raw = {};
    if (valid) Source::load(raw, tile.x, p.hidden_size);
    const auto chunk = Source::finish(raw, p.activation);
    const float scale = group_scale<Out, kGroupSize, kPow2, kSize>(absmax_bits(chunk), p.eps);
    if (valid) quantize_chunk(chunk, Divide(scale), tile.q);
    if constexpr (kPacked && !kWords) {
      const uint8_t byte = valid ? exponent_byte(scale) : 0;
      if (scaled && lane % kLanesPerScale == 0 && tile.scale_exists) {
        reinterpret_cast<uint8_t*>(tile.scale)[column / kGroupSize % 4] = byte;
      }
    } else {
      const uint32_t word = scale_word<kScale, kLanesPerGroup>(scale, valid, lane);
      if (scaled && lane % kLanesPerScale == 0 && tile.scale_exists) *tile.scale = word;
    }
  }
};

constexpr int kWarps = 4;

// The warps of a block take neighbouring rows, for column-major scales, or with kSize 4 neighbouring columns.
template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale, int kSize>
__global__ void __launch_bounds__(32 * kWarps, 10)
gated_group_quant_kernel(const __grid_constant__ GatedGroupQuantParams p) {
  using Quant = GatedTile<In, Out, kActivation, kGroupSize, kScale, kSize>;
  constexpr int kRows = kSize == kChunk ? kWarps : 1;
  pdl_trigger();
  const int warp = threadIdx.x / 32;
  const int column = (kRows == 1 ? blockIdx.x * kWarps + warp : blockIdx.x) * Quant::kColumns + threadIdx.x % 32 * kSize;
  const bool in_row = column < p.hidden_size, scaled = column < Quant::scaled_columns(p.hidden_size);
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows + (kRows == 1 ? 0 : warp);
  int64_t batch = blockIdx.z, row = first_row;
  auto tile = Quant::tile(p, batch, row, column);
  asm volatile("" ::"l"(tile.x), "l"(tile.q), "l"(tile.scale));
  touch(p);
  pdl_wait();

  while (row < p.padded_rows) {
    Quant::quantize(p, tile, column, scaled, in_row && row < p.rows);
    // More rows only where the grid's limit of 65535 blocks cuts it.
    row += static_cast<int64_t>(gridDim.y) * kRows;
    if (row >= p.padded_rows) {
      batch += gridDim.z;
      if (batch >= p.batches) break;
      row = first_row;
    }
    tile = Quant::tile(p, batch, row, column);
  }
}

template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale, int kSize>
cudaError_t launch_gated_group_quant(const GatedGroupQuantParams& p, cudaStream_t stream) {
  using Quant = GatedTile<In, Out, kActivation, kGroupSize, kScale, kSize>;
  constexpr int64_t kMaxGridYZ = 65535, kRows = kSize == kChunk ? kWarps : 1;
  constexpr int kColumns = Quant::kColumns * kWarps / kRows;
  const dim3 grid((Quant::scaled_columns(p.hidden_size) + kColumns - 1) / kColumns,
                  std::min((p.padded_rows + kRows - 1) / kRows, kMaxGridYZ), std::min(p.batches, kMaxGridYZ));
  return launch_kernel(gated_group_quant_kernel<In, Out, kActivation, kGroupSize, kScale, kSize>, grid, dim3(32 * kWarps),
                       0, stream, p.pdl, p);
}

// Few elements are cut finer: the hardware's exponentials and reciprocals of sixteen, one after another, take longer than
// the loads (measured on an H200 up to 2^18 elements, and not to pay with 2^21).
template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale>
cudaError_t choose_size(const GatedGroupQuantParams& p, cudaStream_t stream) {
  return p.batches * p.padded_rows * p.hidden_size <= 1 << 19
             ? launch_gated_group_quant<In, Out, kActivation, kGroupSize, kScale, 4>(p, stream)
             : launch_gated_group_quant<In, Out, kActivation, kGroupSize, kScale, kChunk>(p, stream);
}

template <typename In, typename Out, Activation kActivation, int kGroupSize>
cudaError_t choose_scale(const GatedGroupQuantParams& p, ScaleType scale, cudaStream_t stream) {
  if (scale == ScaleType::kFloat) {
    return choose_size<In, Out, kActivation, kGroupSize, ScaleType::kFloat>(p, stream);
  }
  if constexpr (std::is_same_v<Out, __nv_fp8_e4m3>) {
    return scale == ScaleType::kFloatPow2
               ? choose_size<In, Out, kActivation, kGroupSize, ScaleType::kFloatPow2>(p, stream)
               : choose_size<In, Out, kActivation, kGroupSize, ScaleType::kPackedUE8M0>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename In, Activation kActivation>
cudaError_t choose_output(const GatedGroupQuantParams& p, OutputType output, ScaleType scale, cudaStream_t stream) {
  if (output == OutputType::kE4M3) {
    return p.group_size == 128  ? choose_scale<In, __nv_fp8_e4m3, kActivation, 128>(p, scale, stream)
           : p.group_size == 64 ? choose_scale<In, __nv_fp8_e4m3, kActivation, 64>(p, scale, stream)
                                : cudaErrorInvalidValue;
  }
  return p.group_size == 128  ? choose_scale<In, NearestInt8, kActivation, 128>(p, scale, stream)
         : p.group_size == 64 ? choose_scale<In, NearestInt8, kActivation, 64>(p, scale, stream)
                              : cudaErrorInvalidValue;
}

}  // namespace
}  // namespace vllm_b200
