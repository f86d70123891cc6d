#include <algorithm>

#include "../common/launch.cuh"
#include "quantizers.cuh"
#include "token_quant.h"

// A thread takes the same 16 columns of several rows, whose loads are all under way before the first is used.

namespace vllm_b200 {
namespace {

constexpr int kRows = 4;

// kEveryColumn: a scale for each of the 16 columns, otherwise one for all of them.
template <typename In, bool kEveryColumn>
__global__ void __launch_bounds__(256) static_group_quant_kernel(const __grid_constant__ StaticGroupQuantParams p) {
  constexpr int kScales = kEveryColumn ? kChunk : 1;
  pdl_trigger();
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * kChunk;
  const int64_t step = static_cast<int64_t>(gridDim.y) * blockDim.y;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
  const float* scale = p.scale + (kEveryColumn ? column : column / p.group_columns) * p.scale_stride_column;
  const In* x = static_cast<const In*>(p.x) + column;
  auto* q = static_cast<__nv_fp8_e4m3*>(p.q) + column;
  asm volatile("" ::"l"(x), "l"(q), "l"(scale), "l"(step), "l"(first_row));
  pdl_wait();
  if (column >= p.hidden_size) return;

  int64_t group = -1;
  float reciprocal[kScales];
  for (int64_t rows = first_row; rows < p.rows; rows += kRows * step) {
    Chunk<In> chunk[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = rows + i * step;
      if (row < p.rows) load_chunk<In, true>(chunk[i], x + row * p.x_stride_row);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = rows + i * step;
      if (row >= p.rows) break;
      if (const int64_t group_here = row / p.group_rows; group_here != group) {
        group = group_here;
#pragma unroll
        for (int j = 0; j < kScales; ++j) {
          reciprocal[j] = __frcp_rn(scale[group * p.scale_stride_row + j * p.scale_stride_column]);
        }
      }
      uint32_t packed[kChunk / 4];
#pragma unroll
      for (int j = 0; j < kChunk / 4; ++j) {
        const float2 low = unpack_pair(chunk[i], 2 * j), high = unpack_pair(chunk[i], 2 * j + 1);
        const auto by = [&](int element) { return reciprocal[kEveryColumn ? 4 * j + element : 0]; };
        packed[j] = pack_bytes(static_cast<__nv_fp8_e4m3*>(nullptr), __fmul_rn(low.x, by(0)), __fmul_rn(low.y, by(1)),
                               __fmul_rn(high.x, by(2)), __fmul_rn(high.y, by(3)));
      }
      *reinterpret_cast<uint4*>(q + row * p.q_stride_row) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
    }
  }
}

template <typename In>
cudaError_t choose_columns(const StaticGroupQuantParams& p, cudaStream_t stream) {
  const int64_t chunks = p.hidden_size / kChunk;
  const int threads = static_cast<int>(std::min<int64_t>((chunks + 31) / 32 * 32, p.rows * chunks < 64 * 132 ? 64 : 256));
  const dim3 block(threads, std::min<int64_t>(256 / threads, p.rows));
  // Blocks of one row until they fill the GPU, then rows enough for all loads of a thread.
  const int64_t columns = (chunks + threads - 1) / threads, rows = (p.rows + block.y - 1) / block.y;
  const int64_t most = std::max<int64_t>((rows + kRows - 1) / kRows, std::min<int64_t>(rows, 8 * 132 / columns + 1));
  const dim3 grid(columns, std::min<int64_t>(most, 65535));
  const auto kernel = p.group_columns == 1 ? static_group_quant_kernel<In, true> : static_group_quant_kernel<In, false>;
  return launch_kernel(kernel, grid, block, 0, stream, p.pdl, p);
}

}  // namespace

cudaError_t static_group_quant(const StaticGroupQuantParams& p, InputType input, cudaStream_t stream) {
  if (p.rows == 0 || p.hidden_size == 0) return cudaSuccess;
  switch (input) {
    case InputType::kBFloat16: return choose_columns<__nv_bfloat16>(p, stream);
    case InputType::kHalf: return choose_columns<__half>(p, stream);
    case InputType::kFloat: return choose_columns<float>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
