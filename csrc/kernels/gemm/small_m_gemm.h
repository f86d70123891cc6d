#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace vllm_b200 {

enum class GemmFormat {
  kE4M3Block,  // e4m3 x e4m3, a scale for each 1x128 group of x and for each 128x128 block of w
  kE4M3,       // e4m3 x e4m3, a scale for each row of x or one for all, and for each row of w or one for all
  kInt8,       // int8 x int8, the same
  kBFloat16,
  kHalf,
  kNvFp4,  // bf16 x e2m1, an e4m3 scale for each 16 columns of a row of w, and an fp32 scale for each row or for all
};

enum class GemmOutput { kBFloat16, kHalf, kFloat };

// How the work is cut. Every combination gives the right result; which is fast
// depends on the shape.
struct GemmConfig {
  int row_tiles = 1;  // 16 rows of w each, 1, 2 or 4: what one block of threads computes at a time
  int warps = 8;      // of a block; they split K
  int cluster = 1;    // blocks that split K
  int chunks = 0;     // copies that a row of w comes in, through the bulk copy engine; 0: cp.async
  // Not 0: stream_gemm.cuh with so many buffers, from 2 on. warps is 8, or 16 with fewer than 4 row_tiles; cluster and
  // chunks have no meaning.
  int stages = 0;
};

// y [m, n] = x [m, k] w [n, k]^T, scaled, + bias [n]. Strides in elements.
// The rows of x and w start at multiples of 16 bytes and are a multiple of 16 bytes long.
struct SmallMGemmParams {
  const void* x;  // of w's format or, with `quantize`, bf16
  const void* w;
  void* y;
  const void* bias;  // of y's type, or null
  const void* x_scale;
  const void* w_scale;
  const void* w_group_scale;            // of kNvFp4
  int64_t x_stride, w_stride, y_stride;  // of kNvFp4's w in bytes, two elements each
  // Scale of row r and group g of 128 columns at r * stride_row + g * stride_group; of a packed one, at g / 4.
  int64_t x_scale_stride_row, x_scale_stride_group;
  int64_t w_scale_stride_row, w_scale_stride_group;
  // Of kNvFp4: four groups of row r at r * stride_row, and from four to the next; or in tiles of 128 rows x 4 groups, as
  // tensor cores from Blackwell on take them.
  int64_t w_group_stride_row;
  bool w_group_tiled;
  int32_t m, n, k;
  int32_t w_scale_shift;  // log2 of the rows of w that share a row of w_scale
  bool x_scale_packed;   // four UE8M0 exponents to an int32
  bool w_scale_packed;
  bool ue8m0;  // with `quantize`: round x's scales up to powers of two
  float eps;   // with `quantize`: lower bound of a group's maximum
  bool pdl;    // launch with programmatic stream serialization
  GemmOutput output;
};

constexpr int kSmallGemmMaxTokens = 32;
constexpr int kStreamGemmMaxTokens = 16;
constexpr int kSmallGemmMaxQuantizedTokens = 8;

// quantize: x is bf16 and quantised on the way, for kE4M3Block and m up to kSmallGemmMaxQuantizedTokens.
cudaError_t small_m_gemm(const SmallMGemmParams& params, GemmFormat format, bool quantize, const GemmConfig& config,
                         cudaStream_t stream);

}  // namespace vllm_b200
