#include <algorithm>
#include <type_traits>

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "group_quant.h"

// A warp takes kRows rows by 512 columns; a lane takes 16 consecutive columns
// of each row, so group_size / 16 lanes share a group and everything between
// the load and the store stays in registers. kRows = 4 keeps eight 16-byte
// loads of a lane in flight and writes column-major scales 16 bytes at a time;
// kRows = 1 spreads few rows over many SMs.

namespace vllm_b200 {
namespace {

constexpr int kWarpColumns = 32 * kChunk;
constexpr uint32_t kFullWarp = 0xffffffffu;

template <typename Out>
constexpr float kQuantMax = std::is_same_v<Out, int8_t> ? 127.0f : 448.0f;

// The smallest power of two not below y; Inf and NaN stay what they are.
__device__ __forceinline__ float round_up_to_pow2(float y) {
  const uint32_t bits = __float_as_uint(y);
  return bits >= 0x7f800000u ? y : __uint_as_float((bits + 0x7fffffu) & 0x7f800000u);
}

// x / y correctly rounded, from the correctly rounded reciprocal of y: one
// residual step, as in Markstein, "IA-64 and Elementary Functions", section 8.
struct Divisor {
  float y, reciprocal;

  // y >= 1e-20 / 448. x / Inf is 0 for finite x and NaN for Inf: with y = 0 the residual of the product is x itself.
  __device__ explicit Divisor(float scale) {
    y = isinf(scale) ? 0.0f : scale;
    reciprocal = __frcp_rn(scale);
  }

  __device__ float operator()(float x) const {
    const float estimate = x * reciprocal;
    const float quotient = fmaf(fmaf(-estimate, y, x), reciprocal, estimate);
    return copysignf(quotient, x);  // -0 / y is -0, which the residual step loses
  }
};

// fp32 operands leave too few spare bits for one step: the full division.
struct ExactDivisor {
  float y;
  __device__ explicit ExactDivisor(float scale) : y(scale) {}
  __device__ float operator()(float x) const { return __fdiv_rn(x, y); }
};

struct PowerOfTwoDivisor {
  float reciprocal;
  __device__ explicit PowerOfTwoDivisor(float scale) { reciprocal = __frcp_rn(scale); }
  __device__ float operator()(float x) const { return x * reciprocal; }
};

template <typename In, typename Out, typename Divide>
__device__ __forceinline__ void quantize_chunk(const Chunk<In>& chunk, float scale, Out* destination) {
  const Divide divide(scale);
  uint32_t packed[kChunk / 4];
#pragma unroll
  for (int i = 0; i < kChunk / 4; ++i) {
    const float2 low = unpack_pair(chunk, 2 * i), high = unpack_pair(chunk, 2 * i + 1);
    packed[i] =
        pack_bytes(static_cast<Out*>(nullptr), divide(low.x), divide(low.y), divide(high.x), divide(high.y));
  }
  *reinterpret_cast<uint4*>(destination) = make_uint4(packed[0], packed[1], packed[2], packed[3]);
}

// The scale of the calling lane's group, from the bits of its chunk's absolute maximum.
template <typename Out, int kGroupSize, bool kPow2>
__device__ __forceinline__ float group_scale(uint32_t bits, float eps) {
#pragma unroll
  for (int lanes = kGroupSize / kChunk / 2; lanes > 0; lanes /= 2) {
    bits = max(bits, __shfl_xor_sync(kFullWarp, bits, lanes));
  }
  const float amax = __uint_as_float(max(bits, __float_as_uint(eps)));
  float scale = __fdiv_rn(amax, kQuantMax<Out>);
  if constexpr (kPow2) {
    // vLLM's floor for power-of-two scales; a NaN has to pass it.
    scale = round_up_to_pow2(__uint_as_float(max(__float_as_uint(scale), __float_as_uint(1e-10f))));
  }
  return scale;
}

// Store value[i] at (row + i, column) for the rows that exist, padding included.
template <int kRows>
__device__ __forceinline__ void store_scales(const GroupQuantParams& p, int64_t batch, int64_t row, int column,
                                             const uint32_t (&value)[kRows]) {
  const int64_t offset = batch * p.scale_stride_batch + row * p.scale_stride_row + column * p.scale_stride_column;
  uint32_t* destination = static_cast<uint32_t*>(p.scale) + offset;
  if constexpr (kRows == 4) {
    const bool whole = row + kRows <= p.padded_rows && offset + kRows <= p.scale_capacity;
    if (whole && p.scale_stride_row == 1 && (reinterpret_cast<uintptr_t>(destination) & 15) == 0) {
      *reinterpret_cast<uint4*>(destination) = make_uint4(value[0], value[1], value[2], value[3]);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    if (row + i < p.padded_rows && offset + i * p.scale_stride_row < p.scale_capacity) {
      destination[i * p.scale_stride_row] = value[i];
    }
  }
}

template <typename In, typename Out, int kGroupSize, ScaleType kScale, int kRows, bool kAligned>
__global__ void __launch_bounds__(128) group_quant_kernel(const __grid_constant__ GroupQuantParams p) {
  static_assert(kGroupSize % kChunk == 0 && kGroupSize <= 128);
  constexpr bool kPow2 = kScale != ScaleType::kFloat;
  constexpr bool kPacked = kScale == ScaleType::kPackedUE8M0;
  constexpr int kLanesPerGroup = kGroupSize / kChunk;
  constexpr int kLanesPerColumn = kPacked ? 4 * kLanesPerGroup : kLanesPerGroup;
  using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, std::conditional_t<sizeof(In) == 4, ExactDivisor, Divisor>>;

  pdl_trigger();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * kWarpColumns + lane * kChunk;
  const bool in_row = column < p.hidden_size;
  const int64_t rows_per_block = static_cast<int64_t>(blockDim.x / 32) * kRows;
  pdl_wait();

  for (int64_t batch = blockIdx.z; batch < p.batches; batch += gridDim.z) {
    for (int64_t row = blockIdx.y * rows_per_block + warp * kRows; row < p.padded_rows;
         row += gridDim.y * rows_per_block) {
      const In* x = static_cast<const In*>(p.x) + batch * p.x_stride_batch + row * p.x_stride_row + column;
      Out* q = static_cast<Out*>(p.q) + batch * p.q_stride_batch + row * p.q_stride_row + column;

      Chunk<In> chunk[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        chunk[i] = {};
        if (in_row && row + i < p.rows) load_chunk<In, kAligned>(chunk[i], x + i * p.x_stride_row);
      }

      uint32_t scale_word[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        const bool valid = in_row && row + i < p.rows;
        const float scale = group_scale<Out, kGroupSize, kPow2>(absmax_bits(chunk[i]), p.eps);
        if (valid) quantize_chunk<In, Out, Divide>(chunk[i], scale, q + i * p.q_stride_row);
        if constexpr (kPacked) {
          // Biased exponent; Inf and NaN both become 255, which is NaN in UE8M0.
          uint32_t word = valid ? (__float_as_uint(scale) & 0x7fffffffu) >> 23 << (lane / kLanesPerGroup % 4 * 8) : 0;
          word |= __shfl_xor_sync(kFullWarp, word, kLanesPerGroup);
          word |= __shfl_xor_sync(kFullWarp, word, 2 * kLanesPerGroup);
          scale_word[i] = word;
        } else {
          scale_word[i] = valid ? __float_as_uint(scale) : 0;
        }
      }
      if (in_row && lane % kLanesPerColumn == 0) {
        store_scales<kRows>(p, batch, row, column / kChunk / kLanesPerColumn, scale_word);
      }
    }
  }
}

template <typename In, typename Out, int kGroupSize, ScaleType kScale, int kRows, bool kAligned>
cudaError_t launch(const GroupQuantParams& p, int warps, cudaStream_t stream) {
  constexpr int64_t kMaxGridYZ = 65535;
  const int64_t row_blocks = (p.padded_rows + warps * kRows - 1) / (warps * kRows);
  const dim3 grid((p.hidden_size + kWarpColumns - 1) / kWarpColumns, std::min(row_blocks, kMaxGridYZ),
                  std::min(p.batches, kMaxGridYZ));
  return launch_pdl(group_quant_kernel<In, Out, kGroupSize, kScale, kRows, kAligned>, grid, dim3(32 * warps), 0,
                    stream, p);
}

template <typename In, typename Out, int kGroupSize, ScaleType kScale>
cudaError_t choose_shape(const GroupQuantParams& p, cudaStream_t stream) {
  constexpr int64_t kVector = 16 / sizeof(In);
  const bool aligned = reinterpret_cast<uintptr_t>(p.x) % 16 == 0 && p.x_stride_row % kVector == 0 &&
                       (p.batches == 1 || p.x_stride_batch % kVector == 0);
  if (!aligned) return launch<In, Out, kGroupSize, kScale, 1, false>(p, 4, stream);

  const int64_t column_blocks = (p.hidden_size + kWarpColumns - 1) / kWarpColumns;
  const int64_t row_warps = p.batches * p.padded_rows * column_blocks;
  if (row_warps <= 2048) return launch<In, Out, kGroupSize, kScale, 1, true>(p, 1, stream);
  return launch<In, Out, kGroupSize, kScale, 4, true>(p, 4, stream);
}

template <typename In, typename Out, int kGroupSize>
cudaError_t choose_scale(const GroupQuantParams& p, ScaleType scale, cudaStream_t stream) {
  switch (scale) {
    case ScaleType::kFloat: return choose_shape<In, Out, kGroupSize, ScaleType::kFloat>(p, stream);
    case ScaleType::kFloatPow2: return choose_shape<In, Out, kGroupSize, ScaleType::kFloatPow2>(p, stream);
    case ScaleType::kPackedUE8M0: return choose_shape<In, Out, kGroupSize, ScaleType::kPackedUE8M0>(p, stream);
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
