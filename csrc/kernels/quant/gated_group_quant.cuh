#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "gated_quant.h"
#include "row_source.cuh"

namespace vllm_b200 {
namespace {

// What the lanes of a warp do with 512 columns of a row, in the layout of group_quant_kernel.
template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale>
struct GatedTile {
  static constexpr int kLanesPerGroup = kGroupSize / kChunk;
  static constexpr int kLanesPerScale = kScale == ScaleType::kPackedUE8M0 ? 4 * kLanesPerGroup : kLanesPerGroup;
  static constexpr bool kPow2 = kScale != ScaleType::kFloat;
  using Source = GatedRow<In, kActivation>;
  using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, Divisor>;

  // The whole warp calls it. in_row: the lane's columns exist; valid: so does the row, otherwise it is padding.
  static __device__ __forceinline__ void quantize(const GatedGroupQuantParams& p, const Tile<In, Out>& tile, bool in_row,
                                                  bool valid, int lane) {
    typename Source::Raw raw = {};
    if (valid) Source::load(raw, tile.x, p.hidden_size);
    const auto chunk = Source::finish(raw, p.activation);
    const float scale = group_scale<Out, kGroupSize, kPow2>(absmax_bits(chunk), p.eps);
    if (valid) quantize_chunk(chunk, Divide(scale), tile.q);
    const uint32_t word = scale_word<kScale, kLanesPerGroup>(scale, valid, lane);
    if (in_row && lane % kLanesPerScale == 0 && tile.scale_exists) *tile.scale = word;
  }
};

constexpr int kMaxWarps = 8;

template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale>
__global__ void __launch_bounds__(32 * kMaxWarps)
gated_group_quant_kernel(const __grid_constant__ GatedGroupQuantParams p) {
  using Quant = GatedTile<In, Out, kActivation, kGroupSize, kScale>;
  pdl_trigger();
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int column = blockIdx.x * kWarpColumns + lane * kChunk;
  const int scale_column = column / (kChunk * Quant::kLanesPerScale);
  const bool in_row = column < p.hidden_size;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * warps + threadIdx.x / 32;
  int64_t batch = blockIdx.z, row = first_row;
  Tile<In, Out> tile(p, batch, row, column, scale_column);
  asm volatile("" ::"l"(tile.x), "l"(tile.q), "l"(tile.scale), "l"(p.rows), "f"(p.eps));
  pdl_wait();

  while (row < p.padded_rows) {
    Quant::quantize(p, tile, in_row, in_row && row < p.rows, lane);
    // More rows only where the grid's limit of 65535 blocks cuts it.
    row += static_cast<int64_t>(gridDim.y) * warps;
    if (row >= p.padded_rows) {
      batch += gridDim.z;
      if (batch >= p.batches) break;
      row = first_row;
    }
    tile = Tile<In, Out>(p, batch, row, column, scale_column);
  }
}

template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale>
cudaError_t launch_gated_group_quant(const GatedGroupQuantParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxGridYZ = 65535;
  const int warps = p.padded_rows < 4 ? 1 : p.padded_rows < 256 ? 4 : kMaxWarps;
  const dim3 grid((p.hidden_size + kWarpColumns - 1) / kWarpColumns,
                  std::min((p.padded_rows + warps - 1) / warps, kMaxGridYZ), std::min(p.batches, kMaxGridYZ));
  return launch_kernel(gated_group_quant_kernel<In, Out, kActivation, kGroupSize, kScale>, grid, dim3(32 * warps), 0,
                       stream, p.pdl, p);
}

template <typename In, typename Out, Activation kActivation, int kGroupSize>
cudaError_t choose_scale(const GatedGroupQuantParams& p, ScaleType scale, cudaStream_t stream) {
  if (scale == ScaleType::kFloat) {
    return launch_gated_group_quant<In, Out, kActivation, kGroupSize, ScaleType::kFloat>(p, stream);
  }
  if constexpr (std::is_same_v<Out, __nv_fp8_e4m3>) {
    return scale == ScaleType::kFloatPow2
               ? launch_gated_group_quant<In, Out, kActivation, kGroupSize, ScaleType::kFloatPow2>(p, stream)
               : launch_gated_group_quant<In, Out, kActivation, kGroupSize, ScaleType::kPackedUE8M0>(p, stream);
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
