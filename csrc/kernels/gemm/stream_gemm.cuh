#pragma once

#include "../common/launch.cuh"
#include "../common/ring.cuh"
#include "../quant/quantizers.cuh"
#include "gemm_common.cuh"
#include "mma.cuh"

// y = x w^T for few rows of x and many bytes of w: a block stays for the whole launch and streams its rows of w through a
// ring of buffers that one thread fills by bulk copies, from before the wait for the kernel before until the last byte.
//
// A buffer holds 2 KiB of each of 16 rows (copies of 1 KiB come a sixth slower: the engine takes so many in a second). Of
// each row a warp multiplies two pieces, with its part of x straight from the L2, one chunk ahead: so x is read once a
// block, and only sums pass between warps.

namespace vllm_b200 {

constexpr int kStreamRows = 16;                  // of a buffer
constexpr int kStreamPieces = 16;                // of a row in a buffer
constexpr int kStreamChunk = kStreamPieces * kPiece;
constexpr int kStreamPitch = kStreamChunk + 64;  // the 16-byte reads of two rows meet no bank twice
constexpr int kStreamStageBytes = kStreamRows * kStreamPitch;

struct StreamPlan {
  int rows;    // of w in a turn, a multiple of 8
  int turns;   // of all blocks
  int pieces;  // of a row
  int stages, sums, barriers, size;  // byte offsets of the warps' sums and of the barriers, and the end
};

inline StreamPlan make_stream_plan(const GemmConfig& config, int token_tiles, int n, int k_bytes, int sms) {
  StreamPlan plan = {};
  const int most = kStreamRows * config.row_tiles, waves = (n + most * sms - 1) / (most * sms);
  plan.rows = ((n + waves * sms - 1) / (waves * sms) + 7) / 8 * 8;
  plan.turns = (n + plan.rows - 1) / plan.rows;
  plan.pieces = k_bytes / kPiece;
  plan.stages = config.stages;
  plan.sums = plan.stages * kStreamStageBytes;
  plan.barriers = plan.sums + 2 * config.warps * 512 * config.row_tiles * token_tiles;  // two turns'
  plan.size = plan.barriers + Ring::barrier_bytes(plan.stages);
  return plan;
}

// One thread.
template <GemmFormat kFormat>
__device__ __forceinline__ void fetch_stream(const SmallMGemmParams& p, const StreamPlan& plan, Ring ring) {
  const uint64_t policy = evict_first_policy();
  const int64_t w_stride = p.w_stride * (kElementBits<kFormat> / 8);
#pragma unroll 1
  for (int turn = blockIdx.x; turn < plan.turns; turn += gridDim.x) {
    const int first = turn * plan.rows, rows = min(plan.rows, p.n - first);
    const uint8_t* const w = static_cast<const uint8_t*>(p.w) + first * w_stride;
#pragma unroll 1
    for (int piece = 0; piece < plan.pieces; piece += kStreamPieces) {
      const int bytes = min(kStreamPieces, plan.pieces - piece) * kPiece;
#pragma unroll 1
      for (int tile = 0; tile < rows; tile += kStreamRows) {
        ring.wait_empty();
        const uint32_t barrier = ring.full(ring.slot);
        uint32_t to = ring.data + ring.slot * kStreamStageBytes;
        const int count = min(kStreamRows, rows - tile);
        barrier_expect(barrier, count * bytes);
        const uint8_t* from = w + tile * w_stride + piece * kPiece;
#pragma unroll 1
        for (int row = 0; row < count; ++row, to += kStreamPitch, from += w_stride) {
          bulk_copy(to, from, bytes, barrier, policy);
        }
        ring.advance();
      }
    }
  }
}

// What a lane takes besides w for a warp's pieces of a chunk: x and, of block scales, those of x for its two columns and
// those of w, one for eight rows in each lane.
template <GemmFormat kFormat, int kRowTiles, int kTokenTiles, int kWarps>
struct StreamOperands {
  static constexpr bool kBlockScaled = kFormat == GemmFormat::kE4M3Block;
  static constexpr int kSize = kElementBits<kFormat> / 8, kPieces = kStreamPieces / kWarps;

  uint4 x[kPieces][kTokenTiles][2];
  float x_scale[kPieces][kTokenTiles][2], w_scale[kPieces];

  // piece: the warp's first of the chunk; end: of the row.
  __device__ __forceinline__ void load(const SmallMGemmParams& p, int first_row, int piece, int end) {
    const int lane = threadIdx.x % 32, group = lane / 4, part = lane % 4;
#pragma unroll
    for (int i = 0; i < kPieces; ++i, piece += kWarps) {
      if (piece >= end) return;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        const uint8_t* const row =
            static_cast<const uint8_t*>(p.x) + min(8 * t + group, p.m - 1) * p.x_stride * kSize + part * 16;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          x[i][t][half] = *reinterpret_cast<const uint4*>(row + piece * kPiece + half * 64);
        }
        if constexpr (kBlockScaled) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            x_scale[i][t][j] = load_scale(p.x_scale, p.x_scale_packed,
                                          min(8 * t + 2 * part + j, p.m - 1) * p.x_scale_stride_row, piece,
                                          p.x_scale_stride_group);
          }
        }
      }
      if constexpr (kBlockScaled) {
        const int row = min(first_row + lane % (2 * kRowTiles) * 8, p.n - 1);
        w_scale[i] = load_scale(p.w_scale, p.w_scale_packed, (row >> p.w_scale_shift) * p.w_scale_stride_row, piece,
                                p.w_scale_stride_group);
      }
    }
  }
};

template <GemmFormat kFormat, int kRowTiles, int kTokenTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps + 32, 1)
    stream_gemm_kernel(const __grid_constant__ SmallMGemmParams p, const __grid_constant__ StreamPlan plan) {
  constexpr bool kBlockScaled = kFormat == GemmFormat::kE4M3Block;
  constexpr int kThreads = 32 * kWarps, kPieces = kStreamPieces / kWarps;
  constexpr int kTiles = kRowTiles * kTokenTiles;
  constexpr int kResults = (128 * kTiles + kThreads - 1) / kThreads;  // of a thread and a turn
  constexpr int kChains = kTokenTiles == 1 ? 2 : 1;  // of dependent products, where registers are left for a second
  using Operands = StreamOperands<kFormat, kRowTiles, kTokenTiles, kWarps>;
  using Multiply = Mma<kFormat>;
  using Accumulator = typename Multiply::Accumulator;

  extern __shared__ __align__(128) uint8_t smem[];
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0);
  Ring ring = {shared_address(smem), shared_address(smem) + plan.barriers, plan.stages, kStreamStageBytes};
  pdl_trigger();
  if (warp == kWarps) {
    if (elect_lane()) ring.init(kWarps);
    __syncwarp();
    arrive_threads(2, kThreads + 32);
    if (elect_lane()) fetch_stream<kFormat>(p, plan, ring);
    return;
  }

  // A thread's results of a turn go from token to token, along the rows of w.
  int result_row[kResults], result_token[kResults];
  ResultScale<kFormat> result_scale[kResults];
#pragma unroll
  for (int i = 0; i < kResults; ++i) {
    const int index = threadIdx.x + i * kThreads;
    result_token[i] = index / plan.rows;
    result_row[i] = index - result_token[i] * plan.rows;
    if (result_token[i] >= p.m) result_row[i] = p.n;
  }
  const int w_lane = lane / 4 * kStreamPitch + warp * kPiece + lane % 4 * 16;
  float* const sums = reinterpret_cast<float*>(smem + plan.sums);

  pdl_wait();
  Operands next;
  next.load(p, blockIdx.x * plan.rows, warp, plan.pieces);
  sync_threads(2, kThreads + 32);
#pragma unroll 1
  for (int turn = blockIdx.x, parity = 0; turn < plan.turns; turn += gridDim.x, parity ^= 1) {
    const int first = turn * plan.rows, rows = min(plan.rows, p.n - first);
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      if (result_row[i] < rows) result_scale[i].load(p, result_token[i], first + result_row[i]);
    }
    Accumulator sum[kChains][kRowTiles][kTokenTiles][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < plan.pieces; chunk += kStreamPieces) {
      const Operands operands = next;
      if (chunk + kStreamPieces < plan.pieces) {
        next.load(p, first, chunk + kStreamPieces + warp, plan.pieces);
      } else if (turn + gridDim.x < plan.turns) {
        next.load(p, first + gridDim.x * plan.rows, warp, plan.pieces);
      }
      typename Multiply::XFragment fragment[kPieces][2][kTokenTiles];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) {
            fragment[i][half][t] = typename Multiply::XFragment(operands.x[i][t][half]);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if (r * kStreamRows >= rows) break;
        const uint32_t w = ring.wait() + w_lane;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          if (chunk + i * kWarps + warp >= plan.pieces) break;
          Accumulator product[kChains][kTokenTiles][4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t source = w + i * kWarps * kPiece + half * 64;
            const uint4 top = load_shared(source), bottom = load_shared(source + 8 * kStreamPitch);
            Multiply::template multiply<kTokenTiles>(kBlockScaled ? product[half % kChains] : sum[half % kChains][r], top,
                                                     bottom, fragment[i][half]);
          }
          if constexpr (kBlockScaled) {
            const float upper = __shfl_sync(kFullWarp, operands.w_scale[i], 2 * r);
            const float lower = __shfl_sync(kFullWarp, operands.w_scale[i], 2 * r + 1);
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const float scale = operands.x_scale[i][t][j % 2] * (j < 2 ? upper : lower);
                const float value = product[0][t][j] + (kChains == 2 ? product[kChains - 1][t][j] : 0.0f);
                sum[0][r][t][j] = fmaf(value, scale, sum[0][r][t][j]);
              }
            }
          }
        }
        __syncwarp();
        if (lane == 0) ring.release();
        ring.advance();
      }
    }

    Accumulator* const all = reinterpret_cast<Accumulator*>(sums) + parity * kTiles * kThreads * 4;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        Accumulator own[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) own[j] = sum[0][r][t][j] + (kChains == 2 && !kBlockScaled ? sum[kChains - 1][r][t][j] : 0);
        *reinterpret_cast<uint4*>(all + ((warp * kTiles + r * kTokenTiles + t) * 32 + lane) * 4) =
            reinterpret_cast<const uint4&>(own);
      }
    }
    sync_threads(1, kThreads);
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const int row = result_row[i], token = result_token[i];
      if (row >= rows) continue;
      const int tile = row / 16 * kTokenTiles + token / 8, holder = row % 8 * 4 + token % 8 / 2;
      const Accumulator* const source = all + (tile * 32 + holder) * 4 + row % 16 / 8 * 2 + token % 2;
      Accumulator total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += source[w * kTiles * 128];
      store_result(p, token, first + row, result_scale[i].apply(static_cast<float>(total)));
    }
  }
}

template <GemmFormat kFormat, int kRowTiles, int kTokenTiles, int kWarps>
cudaError_t launch_stream_gemm(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  int device, sms;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const auto kernel = stream_gemm_kernel<kFormat, kRowTiles, kTokenTiles, kWarps>;
  const StreamPlan plan = make_stream_plan(config, kTokenTiles, p.n, p.k * kElementBits<kFormat> / 8, sms);
  if (plan.size > 227 * 1024) return cudaErrorInvalidValue;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.size);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(plan.turns < sms ? plan.turns : sms), dim3(32 * kWarps + 32), plan.size, stream, p.pdl,
                       p, plan);
}

template <GemmFormat kFormat, int kRowTiles>
cudaError_t choose_stream_gemm(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  if (p.m <= 8) {
    if (config.warps == 8) return launch_stream_gemm<kFormat, kRowTiles, 1, 8>(p, config, stream);
    if (config.warps == 16) return launch_stream_gemm<kFormat, kRowTiles, 1, 16>(p, config, stream);
  } else {
    if (config.warps == 8) return launch_stream_gemm<kFormat, kRowTiles, 2, 8>(p, config, stream);
    if constexpr (kRowTiles < 4) {  // sixteen warps have too few registers for four
      if (config.warps == 16) return launch_stream_gemm<kFormat, kRowTiles, 2, 16>(p, config, stream);
    }
  }
  return cudaErrorInvalidValue;
}

template <GemmFormat kFormat>
cudaError_t stream_gemm_format(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  if (p.k * kElementBits<kFormat> / 8 % kPiece != 0) return cudaErrorInvalidValue;
  switch (config.row_tiles) {
    case 1: return choose_stream_gemm<kFormat, 1>(p, config, stream);
    case 2: return choose_stream_gemm<kFormat, 2>(p, config, stream);
    case 4: return choose_stream_gemm<kFormat, 4>(p, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
