#include <algorithm>
#include <type_traits>

#include "../common/launch.cuh"
#include "../common/vec.cuh"
#include "group_quant.h"

// A warp takes 512 columns of a row, a lane 16 of them, so that group_size / 16
// lanes share a group and everything between the load and the store stays in
// registers. The warps of a block take consecutive rows: column-major scales
// of a block then lie side by side.

namespace vllm_b200 {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kWarpColumns = 32 * kChunk;
constexpr uint32_t kFullWarp = 0xffffffffu;

template <typename Out>
constexpr int kQuantMax = std::is_same_v<Out, int8_t> ? 127 : 448;

// The smallest power of two not below y; Inf and NaN stay what they are.
__device__ __forceinline__ float round_up_to_pow2(float y) {
  const uint32_t bits = __float_as_uint(y);
  return bits >= 0x7f800000u ? y : __uint_as_float((bits + 0x7fffffu) & 0x7f800000u);
}

// a / kDivisor correctly rounded: one residual step (Markstein, "IA-64 and
// Elementary Functions", section 8). Right for every fp32 mantissa under 448 and
// 127, and for Inf and NaN; tests/test_quant.py goes through all of them.
template <int kDivisor>
__device__ __forceinline__ float divide_by(float a) {
  constexpr float kReciprocal = 1.0f / kDivisor;
  const float estimate = a * kReciprocal;
  const float quotient = fmaf(fmaf(-estimate, kDivisor, a), kReciprocal, estimate);
  return __float_as_uint(a) < 0x7f800000u ? quotient : a;
}

// x / y for x of 11 significant bits at most, as x * high + x * low with high +
// low = 1 / y to some 47 bits: rounded once, so equal to the true quotient
// wherever that decides about the 8-bit result (tests/test_quant.py goes
// through all pairs). low >= 0 keeps the sign of -0.
struct Divisor {
  float high, low;

  __device__ explicit Divisor(float y) {
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(high) : "f"(y));
    if (fmaf(-high, y, 1.0f) < 0.0f) high = __uint_as_float(__float_as_uint(high) - 1);
    low = fmaf(-high, y, 1.0f) * high;
    if (isinf(y)) low = 0.0f;
  }
  __device__ float operator()(float x) const { return fmaf(x, high, x * low); }
};

// fp32 operands leave no spare bits: the full division.
struct ExactDivisor {
  float y;
  __device__ explicit ExactDivisor(float scale) { y = scale; }
  __device__ float operator()(float x) const { return __fdiv_rn(x, y); }
};

struct PowerOfTwoDivisor {
  float reciprocal;

  __device__ explicit PowerOfTwoDivisor(float y) {
    const uint32_t bits = __float_as_uint(y);
    reciprocal = bits < 0x7f800000u ? __uint_as_float(0x7f000000u - bits) : isinf(y) ? 0.0f : y;
  }
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
  float scale = divide_by<kQuantMax<Out>>(__uint_as_float(max(bits, __float_as_uint(eps))));
  if constexpr (kPow2) {
    // vLLM's floor for power-of-two scales; a NaN has to pass it.
    scale = round_up_to_pow2(__uint_as_float(max(__float_as_uint(scale), __float_as_uint(1e-10f))));
  }
  return scale;
}

// Where a lane's part of one row lies.
template <typename In, typename Out>
struct Tile {
  const In* x;
  Out* q;
  uint32_t* scale;
  bool scale_exists;  // padding rows of the last column may lie beyond the storage

  __device__ __forceinline__ Tile(const GroupQuantParams& p, int64_t batch, int64_t row, int column, int scale_column) {
    x = static_cast<const In*>(p.x) + batch * p.x_stride_batch + row * p.x_stride_row + column;
    q = static_cast<Out*>(p.q) + batch * p.q_stride_batch + row * p.q_stride_row + column;
    const int64_t offset =
        batch * p.scale_stride_batch + row * p.scale_stride_row + scale_column * p.scale_stride_column;
    scale = static_cast<uint32_t*>(p.scale) + offset;
    scale_exists = offset < p.scale_capacity;
  }
};

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
    if (valid) quantize_chunk<In, Out, Divide>(chunk, scale, tile.q);

    uint32_t word = valid ? __float_as_uint(scale) : 0;  // padding rows get 0
    if constexpr (kPacked) {
      // Biased exponents; Inf and NaN both become 255, which is NaN in UE8M0.
      word = (word & 0x7fffffffu) >> 23 << (lane / kLanesPerGroup % 4 * 8);
      word |= __shfl_xor_sync(kFullWarp, word, kLanesPerGroup);
      word |= __shfl_xor_sync(kFullWarp, word, 2 * kLanesPerGroup);
    }
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
