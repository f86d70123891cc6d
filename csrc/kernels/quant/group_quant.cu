#include <algorithm>
#include <type_traits>

#include "../common/launch.cuh"
#include "group_quant.h"
#include "quantizers.cuh"

// A warp takes 512 columns of a row, a lane 16 of them, so that group_size / 16
// lanes share a group and everything between the load and the store stays in
// registers. The warps of a block take consecutive rows: column-major scales
// of a block then lie side by side.

namespace vllm_b200 {
namespace {

constexpr int kMaxWarps = 8;

template <typename In, typename Out, int kGroupSize, ScaleType kScale, bool kAligned>
__global__ void __launch_bounds__(32 * kMaxWarps) group_quant_kernel(const __grid_constant__ GroupQuantParams p) {
  static_assert(kGroupSize % kChunk == 0 && kGroupSize <= 128);
  constexpr bool kPow2 = kScale != ScaleType::kFloat;
  constexpr bool kPacked = kScale == ScaleType::kPackedUE8M0;
  constexpr int kLanesPerGroup = kGroupSize / kChunk;
  constexpr int kLanesPerScale = kPacked ? 4 * kLanesPerGroup : kLanesPerGroup;
  using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, std::conditional_t<sizeof(In) == 4, ExactDivisor, Divisor>>;

  pdl_trigger();
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int column = blockIdx.x * kWarpColumns + lane * kChunk;
  const int scale_column = column / (kChunk * kLanesPerScale);
  const bool in_row = column < p.hidden_size;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * warps + threadIdx.x / 32;
  int64_t batch = blockIdx.z, row = first_row;

  // The addresses before the wait: reading the launch's parameters takes as long as the work.
  Tile<In, Out> tile(p, batch, row, column, scale_column);
  asm volatile("" ::"l"(tile.x), "l"(tile.q), "l"(tile.scale), "l"(p.rows), "f"(p.eps));
  pdl_wait();

  while (row < p.padded_rows) {
    const bool valid = in_row && row < p.rows;
    Chunk<In> chunk = {};
    if (valid) load_chunk<In, kAligned>(chunk, tile.x);
    const float scale = group_scale<Out, kGroupSize, kPow2>(absmax_bits(chunk), p.eps);
    if (valid) quantize_chunk(chunk, Divide(scale), tile.q);

    const uint32_t word = scale_word<kScale, kLanesPerGroup>(scale, valid, lane);  // padding rows get 0
    if (in_row && lane % kLanesPerScale == 0 && tile.scale_exists) *tile.scale = word;

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

template <typename In, typename Out, int kGroupSize, ScaleType kScale, bool kAligned>
cudaError_t launch(const GroupQuantParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxGridYZ = 65535;
  // Measured on an H200: few rows want small blocks on many SMs, many rows large ones.
  const int warps = p.padded_rows < 4 ? 1 : p.padded_rows < 256 ? 4 : kMaxWarps;
  const dim3 grid((p.hidden_size + kWarpColumns - 1) / kWarpColumns,
                  std::min((p.padded_rows + warps - 1) / warps, kMaxGridYZ), std::min(p.batches, kMaxGridYZ));
  return launch_kernel(group_quant_kernel<In, Out, kGroupSize, kScale, kAligned>, grid, dim3(32 * warps), 0, stream,
                       p.pdl, p);
}

template <typename In, typename Out, int kGroupSize, ScaleType kScale>
cudaError_t choose_alignment(const GroupQuantParams& p, cudaStream_t stream) {
  constexpr int64_t kVector = 16 / sizeof(In);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride_row % kVector == 0 &&
                       (p.batches == 1 || p.x_stride_batch % kVector == 0);
  return aligned ? launch<In, Out, kGroupSize, kScale, true>(p, stream)
                 : launch<In, Out, kGroupSize, kScale, false>(p, stream);
}

template <typename In, typename Out, int kGroupSize>
cudaError_t choose_scale(const GroupQuantParams& p, ScaleType scale, cudaStream_t stream) {
  switch (scale) {
    case ScaleType::kFloat: return choose_alignment<In, Out, kGroupSize, ScaleType::kFloat>(p, stream);
    case ScaleType::kFloatPow2: return choose_alignment<In, Out, kGroupSize, ScaleType::kFloatPow2>(p, stream);
    case ScaleType::kPackedUE8M0: return choose_alignment<In, Out, kGroupSize, ScaleType::kPackedUE8M0>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename In, typename Out>
cudaError_t choose_group_size(const GroupQuantParams& p, ScaleType scale, cudaStream_t stream) {
  switch (p.group_size) {
    case 32: return choose_scale<In, Out, 32>(p, scale, stream);
    case 64: return choose_scale<In, Out, 64>(p, scale, stream);
    case 128: return choose_scale<In, Out, 128>(p, scale, stream);
  }
  return cudaErrorInvalidValue;
}

template <typename In>
cudaError_t choose_output(const GroupQuantParams& p, OutputType output, ScaleType scale, cudaStream_t stream) {
  return output == OutputType::kE4M3 ? choose_group_size<In, __nv_fp8_e4m3>(p, scale, stream)
                                     : choose_group_size<In, int8_t>(p, scale, stream);
}

}  // namespace

cudaError_t group_quant(const GroupQuantParams& params, InputType input, OutputType output, ScaleType scale,
                        cudaStream_t stream) {
  if (params.batches == 0 || params.padded_rows == 0 || params.hidden_size == 0) return cudaSuccess;
  switch (input) {
    case InputType::kBFloat16: return choose_output<__nv_bfloat16>(params, output, scale, stream);
    case InputType::kHalf: return choose_output<__half>(params, output, scale, stream);
    case InputType::kFloat: return choose_output<float>(params, output, scale, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
