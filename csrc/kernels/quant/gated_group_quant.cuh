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

  Tile<In, Out> place;
  bool in_row, valid;  // the lane's columns exist; so does the row, otherwise it is padding

  __device__ __forceinline__ GatedTile(const GatedGroupQuantParams& p, int64_t batch, int64_t row, int column, bool exists)
      : place(p, batch, row, column, column / (kChunk * kLanesPerScale)),
        in_row(exists && column < p.hidden_size),
        valid(in_row && row < p.rows) {}

  __device__ __forceinline__ void load(const GatedGroupQuantParams& p, typename Source::Raw& raw) const {
    if (valid) Source::load(raw, place.x, p.hidden_size);
  }

  // The whole warp calls it.
  __device__ __forceinline__ void quantize(const GatedGroupQuantParams& p, const typename Source::Raw& raw, int lane) const {
    const auto chunk = Source::finish(raw, p.activation);
    const float scale = group_scale<Out, kGroupSize, kPow2>(absmax_bits(chunk), p.eps);
    if (valid) quantize_chunk(chunk, Divide(scale), place.q);
    const uint32_t word = scale_word<kScale, kLanesPerGroup>(scale, valid, lane);
    if (in_row && lane % kLanesPerScale == 0 && place.scale_exists) *place.scale = word;
  }
};

constexpr int kMaxWarps = 8;
constexpr int kBlocksPerSm = 4;

// Where a block is in the launch's tiles of 512 columns of as many rows as it has warps, and its way to the next one:
// so many columns, blocks of rows and batches on, with carries.
struct TileStep {
  int32_t columns, blocks;  // tiles of a row, blocks of rows of a batch
  int32_t column, block;
  int64_t batch;
};

template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerSm)
gated_group_quant_kernel(const __grid_constant__ GatedGroupQuantParams p, const __grid_constant__ TileStep step) {
  using Quant = GatedTile<In, Out, kActivation, kGroupSize, kScale>;
  pdl_trigger();
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  int column = blockIdx.x % step.columns;
  int64_t batch = blockIdx.x / step.columns / step.blocks;
  int block = blockIdx.x / step.columns - static_cast<int>(batch) * step.blocks;
  const auto tile_here = [&] {
    const int64_t row = static_cast<int64_t>(block) * warps + threadIdx.x / 32;
    return Quant(p, batch, row, column * kWarpColumns + lane * kChunk, batch < p.batches && row < p.padded_rows);
  };
  Quant tile = tile_here();
  asm volatile("" ::"l"(tile.place.x), "l"(tile.place.q), "l"(tile.place.scale), "l"(p.rows), "f"(p.eps));
  pdl_wait();

  typename Quant::Source::Raw raw = {};
  tile.load(p, raw);
  while (true) {  // the loads of the next tile are under way while one is quantised
    column += step.column, block += step.block, batch += step.batch;
    if (column >= step.columns) column -= step.columns, ++block;
    if (block >= step.blocks) block -= step.blocks, ++batch;
    const Quant next = tile_here();
    typename Quant::Source::Raw ahead = {};
    next.load(p, ahead);
    tile.quantize(p, raw, lane);
    if (batch >= p.batches) break;
    tile = next, raw = ahead;
  }
}

template <typename In, typename Out, Activation kActivation, int kGroupSize, ScaleType kScale>
cudaError_t launch_gated_group_quant(const GatedGroupQuantParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t error = count_sms(sms); error != cudaSuccess) return error;
  const int warps = p.padded_rows < 4 ? 1 : p.padded_rows < 256 ? 4 : kMaxWarps;
  const int64_t columns = (p.hidden_size + kWarpColumns - 1) / kWarpColumns, blocks = (p.padded_rows + warps - 1) / warps;
  const int64_t resident = int64_t{sms} * kBlocksPerSm * (kMaxWarps / warps);
  const int64_t grid = std::min(columns * blocks * p.batches, resident);
  const TileStep step = {static_cast<int32_t>(columns), static_cast<int32_t>(blocks), static_cast<int32_t>(grid % columns),
                         static_cast<int32_t>(grid / columns % blocks), grid / columns / blocks};
  return launch_kernel(gated_group_quant_kernel<In, Out, kActivation, kGroupSize, kScale>, dim3(grid), dim3(32 * warps), 0,
                       stream, p.pdl, p, step);
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
