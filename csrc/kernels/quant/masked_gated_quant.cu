#include <algorithm>

#include "gated_group_quant.cuh"

// Experts get few or many rows, and only the device knows how many. So a fixed grid: the valid rows of all batches are
// numbered through, and the warps take eight rows of 512 columns, the next 512 columns of these, and so on; neighbours
// the rows that follow each other, for column-major scales. Where there is a warp or two for every 128 columns, each takes
// so few, the neighbours on different SMs.

namespace vllm_b200 {
namespace {

constexpr int kBlockWarps = 8, kBlocksPerSm = 4, kRowsTogether = 8;

// The valid rows of up to 32 * kPerLane batches, kPerLane consecutive ones a lane.
template <int kPerLane>
struct ValidRows {
  int count[kPerLane];
  int before;  // rows of the batches of lower lanes
  int total;

  __device__ __forceinline__ ValidRows(const GatedGroupQuantParams& p, int lane) {
    const int64_t first = lane * kPerLane;
    if (kPerLane % 4 == 0 && p.valid_rows_are_vectors) {
#pragma unroll
      for (int i = 0; i < kPerLane / 4; ++i) {
        int4 four = {};
        if (first + 4 * i < p.batches) four = *reinterpret_cast<const int4*>(p.valid_rows + first + 4 * i);
        count[4 * i] = four.x, count[4 * i + 1] = four.y, count[4 * i + 2] = four.z, count[4 * i + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        count[i] = first + i < p.batches ? p.valid_rows[(first + i) * p.valid_rows_stride] : 0;
      }
    }
    int sum = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      count[i] = static_cast<int>(max(int64_t{0}, min(int64_t{count[i]}, p.rows)));
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

template <typename Quant, int kPerLane>
__device__ __forceinline__ void quantize_valid(const GatedGroupQuantParams& p, const ValidRows<kPerLane>& valid,
                                               int64_t first, int64_t step) {
  const int lane = threadIdx.x % 32;
  const int scaled_columns = Quant::scaled_columns(p.hidden_size);
  const int64_t tiles = (scaled_columns + Quant::kColumns - 1) / Quant::kColumns;
  const int64_t work = (valid.total + kRowsTogether - 1) / kRowsTogether * kRowsTogether * tiles;
  for (int64_t item = first; item < work; item += step) {
    const int64_t rows = item / kRowsTogether / tiles;
    const int64_t index = rows * kRowsTogether + item % kRowsTogether;
    if (index >= valid.total) continue;
    int64_t batch, row;
    valid.find(static_cast<int>(index), lane, batch, row);
    const int column = static_cast<int>(item / kRowsTogether - rows * tiles) * Quant::kColumns + lane * Quant::Source::kSize;
    const bool in_row = column < p.hidden_size;
    Quant::quantize(p, Quant::tile(p, batch, row, column), column, column < scaled_columns, in_row);
  }
}

template <typename In, typename Out, int kGroupSize, ScaleType kScale, int kPerLane>
__global__ void __launch_bounds__(32 * kBlockWarps, kBlocksPerSm)
masked_gated_group_quant_kernel(const __grid_constant__ GatedGroupQuantParams p) {
  pdl_trigger();
  const int64_t warp = threadIdx.x / 32, warps = int64_t{gridDim.x} * kBlockWarps;
  touch(p);
  pdl_wait();

  const ValidRows<kPerLane> valid(p, threadIdx.x % 32);
  if (int64_t{valid.total} * p.hidden_size <= 2 * warps * 128) {
    using Fine = GatedTile<In, Out, Activation::kSilu, kGroupSize, kScale, 4>;
    quantize_valid<Fine>(p, valid, warp * gridDim.x + blockIdx.x, warps);
  } else {
    using Coarse = GatedTile<In, Out, Activation::kSilu, kGroupSize, kScale, kChunk>;
    quantize_valid<Coarse>(p, valid, int64_t{blockIdx.x} * kBlockWarps + warp, warps);
  }
}

template <typename In, typename Out, int kGroupSize, ScaleType kScale, int kPerLane>
cudaError_t launch(GatedGroupQuantParams p, cudaStream_t stream) {
  int sms = 0;
  if (const cudaError_t error = count_sms(sms); error != cudaSuccess) return error;
  p.valid_rows_are_vectors = p.valid_rows_stride == 1 && p.batches % 4 == 0 &&
                             reinterpret_cast<uintptr_t>(p.valid_rows) % sizeof(int4) == 0;
  const int64_t most = p.batches * p.rows * ((p.hidden_size + 127) / 128);
  const dim3 grid(std::min<int64_t>((most + kBlockWarps - 1) / kBlockWarps, int64_t{sms} * kBlocksPerSm));
  return launch_kernel(masked_gated_group_quant_kernel<In, Out, kGroupSize, kScale, kPerLane>, grid, dim3(32 * kBlockWarps),
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
