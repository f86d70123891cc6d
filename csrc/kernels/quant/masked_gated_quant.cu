#include <algorithm>

#include "gated_group_quant.cuh"

// Experts get few or many rows, and only the device knows how many. So a fixed grid: the valid rows of all batches are
// numbered through, and the warps take (row, 512 columns) in turns, neighbours the rows that follow each other, for
// column-major scales.

namespace vllm_b200 {
namespace {

// The valid rows of up to 32 * kPerLane batches, kPerLane consecutive ones a lane.
template <int kPerLane>
struct ValidRows {
  int count[kPerLane];
  int before;  // rows of the batches of lower lanes
  int total;

  __device__ __forceinline__ ValidRows(const GatedGroupQuantParams& p, int lane) {
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int64_t batch = lane * kPerLane + i;
      const int64_t valid = batch < p.batches ? p.valid_rows[batch * p.valid_rows_stride] : 0;
      count[i] = static_cast<int>(max(int64_t{0}, min(valid, p.rows)));
      sum += count[i];
    }
    int through = sum;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(kFullWarp, through, step);
      if (lane >= step) through += other;
    }
    before = through - sum;
    total = __shfl_sync(kFullWarp, through, 31);
  }

  // The batch and the row in it of the valid row `index`.
  __device__ __forceinline__ void find(int index, int lane, int64_t& batch, int64_t& row) const {
    const uint32_t begun = __ballot_sync(kFullWarp, before <= index);
    const int owner = 31 - __clz(begun);  // lanes without rows begin where the next one does
    int rest = index - before, place = 0;
#pragma unroll
    for (int i = 0; i < kPerLane - 1; ++i) {
      if (place == i && rest >= count[i]) rest -= count[i], place = i + 1;
    }
    batch = owner * kPerLane + __shfl_sync(kFullWarp, place, owner);
    row = __shfl_sync(kFullWarp, rest, owner);
  }
};

template <typename In, typename Out, int kGroupSize, ScaleType kScale, int kPerLane>
__global__ void __launch_bounds__(32 * kMaxWarps, kBlocksPerSm)
masked_gated_group_quant_kernel(const __grid_constant__ GatedGroupQuantParams p) {
  using Quant = GatedTile<In, Out, Activation::kSilu, kGroupSize, kScale>;
  pdl_trigger();
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kMaxWarps + threadIdx.x / 32;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kMaxWarps;
  const int tiles = (p.hidden_size + kWarpColumns - 1) / kWarpColumns;
  pdl_wait();

  const ValidRows<kPerLane> valid(p, lane);
  const int64_t work = static_cast<int64_t>(valid.total) * tiles;
  if (warp >= work) return;
  const auto tile_of = [&](int64_t item) {
    const int column_tile = static_cast<int>(item / valid.total);
    int64_t batch, row;
    valid.find(static_cast<int>(item - static_cast<int64_t>(column_tile) * valid.total), lane, batch, row);
    return Quant(p, batch, row, column_tile * kWarpColumns + lane * kChunk, true);
  };
  Quant tile = tile_of(warp);
  typename Quant::Source::Raw raw = {};
  tile.load(p, raw);
  for (int64_t item = warp; ; item += warps) {  // the loads of the next tile are under way while one is quantised
    const bool more = item + warps < work;
    const Quant next = tile_of(more ? item + warps : item);
    typename Quant::Source::Raw ahead = {};
    if (more) next.load(p, ahead);
    tile.quantize(p, raw, lane);
    if (!more) break;
    tile = next, raw = ahead;
  }
}

template <typename In, typename Out, int kGroupSize, ScaleType kScale, int kPerLane>
cudaError_t launch(const GatedGroupQuantParams& p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t error = count_sms(sms); error != cudaSuccess) return error;
  const int64_t most = p.batches * p.rows * ((p.hidden_size + kWarpColumns - 1) / kWarpColumns);
  const dim3 grid(std::min<int64_t>((most + kMaxWarps - 1) / kMaxWarps, int64_t{sms} * kBlocksPerSm));
  return launch_kernel(masked_gated_group_quant_kernel<In, Out, kGroupSize, kScale, kPerLane>, grid, dim3(32 * kMaxWarps),
                       0, stream, p.pdl, p);
}

template <typename In, int kGroupSize, ScaleType kScale>
cudaError_t choose_batches(const GatedGroupQuantParams& p, cudaStream_t stream) {
  if (p.batches <= 32) return launch<In, __nv_fp8_e4m3, kGroupSize, kScale, 1>(p, stream);
  if (p.batches <= 256) return launch<In, __nv_fp8_e4m3, kGroupSize, kScale, 8>(p, stream);
  if (p.batches <= 1024) return launch<In, __nv_fp8_e4m3, kGroupSize, kScale, 32>(p, stream);
  return cudaErrorInvalidValue;
}

template <typename In>
cudaError_t choose_masked_scale(const GatedGroupQuantParams& p, ScaleType scale, cudaStream_t stream) {
  switch (scale) {
    case ScaleType::kFloat: return choose_batches<In, 128, ScaleType::kFloat>(p, stream);
    case ScaleType::kFloatPow2: return choose_batches<In, 128, ScaleType::kFloatPow2>(p, stream);
    case ScaleType::kPackedUE8M0: return choose_batches<In, 128, ScaleType::kPackedUE8M0>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t masked_gated_group_quant(const GatedGroupQuantParams& params, InputType input, OutputType output,
                                     ScaleType scale, cudaStream_t stream) {
  if (params.batches == 0 || params.rows == 0 || params.hidden_size == 0) return cudaSuccess;
  if (output != OutputType::kE4M3 || params.group_size != 128) return cudaErrorInvalidValue;
  if (input == InputType::kBFloat16) return choose_masked_scale<__nv_bfloat16>(params, scale, stream);
  if (input == InputType::kHalf) return choose_masked_scale<__half>(params, scale, stream);
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
