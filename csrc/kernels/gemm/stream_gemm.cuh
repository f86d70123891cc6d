#pragma once

#include "../common/launch.cuh"
#include "../common/ring.cuh"
#include "../quant/quantizers.cuh"
#include "gemm_common.cuh"
#include "mma.cuh"

// y = x w^T for few rows of x and many bytes of w: a block stays for the whole launch and streams its rows of w through a
// ring of buffers that one thread fills by bulk copies, from before the wait for the kernel before until the last byte.
//
// A buffer holds 2 KiB of each of 16 rows (copies of 1 KiB come a sixth slower: the engine takes so many in a second). The
// warps share its columns, each with its part of x in registers, straight from the L2 and one chunk ahead: so x is read
// once a turn, and only sums pass between warps.

namespace vllm_b200 {

constexpr int kStreamRows = 16;    // of a buffer
constexpr int kStreamPieces = 16;  // of a row in a buffer
constexpr int kStreamChunk = kStreamPieces * kPiece;
constexpr int kStreamPitch = kStreamChunk + 64;  // the 16-byte reads of two rows meet no bank twice
constexpr int kStreamStageBytes = kStreamRows * kStreamPitch;
// Buffers that are on their way at once: enough for the memory's rate, and what the loads of x wait behind.
constexpr int kStreamAhead = 2;

// Shared memory: buffers of w | sums of the warps | scales of x and of w's turn | barriers.
struct StreamPlan {
  int rows;     // of w in a block's turn, a multiple of 8
  int turns;    // of all blocks
  int pieces;   // of a row
  int stages;   // buffers
  int sums, x_scale, w_scale, barriers, size;  // byte offsets and the end
};

inline StreamPlan make_stream_plan(const GemmConfig& config, int token_tiles, bool block_scaled, int m, int n, int k_bytes,
                                   int sms) {
  StreamPlan plan = {};
  const int most = kStreamRows * config.row_tiles, waves = (n + most * sms - 1) / (most * sms);
  plan.rows = ((n + waves * sms - 1) / (waves * sms) + 7) / 8 * 8;
  plan.turns = (n + plan.rows - 1) / plan.rows;
  plan.pieces = k_bytes / kPiece;
  plan.stages = config.stages;
  plan.sums = plan.stages * kStreamStageBytes;
  plan.x_scale = plan.sums + config.warps * 512 * config.row_tiles * token_tiles;
  plan.w_scale = plan.x_scale + (block_scaled ? (4 * plan.pieces * m + 7) / 8 * 8 : 0);
  plan.barriers = plan.w_scale + (block_scaled ? 8 * plan.pieces * config.row_tiles : 0);
  plan.size = plan.barriers + Ring::barrier_bytes(plan.stages);
  return plan;
}

// One thread.
template <GemmFormat kFormat>
__device__ __forceinline__ void fetch_w(const SmallMGemmParams& p, const StreamPlan& plan, Ring ring) {
  const uint64_t policy = evict_first_policy();
  const int64_t stride = p.w_stride * (kElementBits<kFormat> / 8);
  Ring arrived = ring;  // kStreamAhead buffers behind
  int fetched = 0;
#pragma unroll 1
  for (int turn = blockIdx.x; turn < plan.turns; turn += gridDim.x) {
    const int first = turn * plan.rows, rows = min(plan.rows, p.n - first);
    const uint8_t* const w = static_cast<const uint8_t*>(p.w) + first * stride;
#pragma unroll 1
    for (int piece = 0; piece < plan.pieces; piece += kStreamPieces) {
      const int bytes = min(kStreamPieces, plan.pieces - piece) * kPiece;
#pragma unroll 1
      for (int tile = 0; tile < rows; tile += kStreamRows) {
        if (fetched++ >= kStreamAhead) {
          barrier_wait(arrived.full(arrived.slot), arrived.parity);
          arrived.advance();
        }
        ring.wait_empty();
        const uint32_t barrier = ring.full(ring.slot);
        uint32_t to = ring.data + ring.slot * ring.stage_bytes;
        const int count = min(kStreamRows, rows - tile);
        const uint8_t* from = w + tile * stride + piece * kPiece;
        barrier_expect(barrier, count * bytes);
#pragma unroll 1
        for (int row = 0; row < count; ++row, to += kStreamPitch, from += stride) {
          bulk_copy(to, from, bytes, barrier, policy);
        }
        ring.advance();
      }
    }
  }
}

template <GemmFormat kFormat, int kRowTiles, int kTokenTiles, int kWarps>
__global__ void __launch_bounds__(32 * kWarps + 32, 1)
    stream_gemm_kernel(const __grid_constant__ SmallMGemmParams p, const __grid_constant__ StreamPlan plan) {
  constexpr bool kBlockScaled = kFormat == GemmFormat::kE4M3Block;
  constexpr int kThreads = 32 * kWarps, kPieces = kStreamPieces / kWarps;
  constexpr int kTiles = kRowTiles * kTokenTiles;
  constexpr int kResults = (128 * kTiles + kThreads - 1) / kThreads;  // of a thread and a turn
  constexpr int kChains = kTokenTiles == 1 ? 2 : 1;  // of dependent products, where registers are left for a second
  using Multiply = Mma<kFormat>;
  using Accumulator = typename Multiply::Accumulator;

  extern __shared__ __align__(128) uint8_t smem[];
  const int lane = threadIdx.x % 32, warp = __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0);
  Ring ring = {shared_address(smem), shared_address(smem) + plan.barriers, plan.stages, kStreamStageBytes};
  pdl_trigger();
  if (warp == kWarps) {
    if (elect_lane()) ring.init(kThreads);
    __syncwarp();
    arrive_threads(2, kThreads + 32);
    if (elect_lane()) fetch_w<kFormat>(p, plan, ring);
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
  const int group = lane / 4, part = lane % 4;
  const int w_lane = group * kStreamPitch + warp * kPiece + part * 16;
  const uint8_t* x_lane[kTokenTiles];
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
    x_lane[t] = static_cast<const uint8_t*>(p.x) +
                min(8 * t + group, p.m - 1) * p.x_stride * (kElementBits<kFormat> / 8) + warp * kPiece + part * 16;
  }
  uint4 next[kPieces][kTokenTiles][2];
  auto load_x = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      if (chunk + i * kWarps + warp >= plan.pieces) return;
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          next[i][t][half] =
              *reinterpret_cast<const uint4*>(x_lane[t] + (chunk + i * kWarps) * kPiece + half * 64);
        }
      }
    }
  };
  Accumulator* const sums = reinterpret_cast<Accumulator*>(smem + plan.sums);
  // Of block scales: those of x, by piece and token, and those of w, by piece and eight rows.
  float* const x_scales = reinterpret_cast<float*>(smem + plan.x_scale);
  float* const w_scales = reinterpret_cast<float*>(smem + plan.w_scale);
  auto load_w_scales = [&](int first) {
    for (int i = threadIdx.x; i < plan.pieces * 2 * kRowTiles; i += kThreads) {
      const int row = min(first + i % (2 * kRowTiles) * 8, p.n - 1);
      w_scales[i] = load_scale(p.w_scale, p.w_scale_packed, (row >> p.w_scale_shift) * p.w_scale_stride_row,
                               i / (2 * kRowTiles), p.w_scale_stride_group);
    }
  };
  if constexpr (kBlockScaled) load_w_scales(blockIdx.x * plan.rows);

  pdl_wait();
  load_x(0);
  if constexpr (kBlockScaled) {
    for (int i = threadIdx.x; i < plan.pieces * p.m; i += kThreads) {
      const int piece = i / p.m;
      x_scales[i] = load_scale(p.x_scale, p.x_scale_packed, (i - piece * p.m) * p.x_scale_stride_row, piece,
                               p.x_scale_stride_group);
    }
  }
  sync_threads(2, kThreads + 32);
#pragma unroll 1
  for (int turn = blockIdx.x; turn < plan.turns; turn += gridDim.x) {
    const int first = turn * plan.rows, rows = min(plan.rows, p.n - first);
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      if (result_row[i] < rows) result_scale[i].load(p, result_token[i], first + result_row[i]);
    }
    Accumulator sum[kChains][kRowTiles][kTokenTiles][4] = {};
#pragma unroll 1
    for (int chunk = 0; chunk < plan.pieces; chunk += kStreamPieces) {
      typename Multiply::XFragment fragment[kPieces][2][kTokenTiles];
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) {
            fragment[i][half][t] = typename Multiply::XFragment(next[i][t][half]);
          }
        }
      }
      if (chunk + kStreamPieces < plan.pieces) {
        load_x(chunk + kStreamPieces);
      } else if (turn + gridDim.x < plan.turns) {
        load_x(0);
      }
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        if (r * kStreamRows >= rows) break;
        const uint32_t w = ring.wait() + w_lane;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          const int piece = chunk + i * kWarps + warp;
          if (piece >= plan.pieces) break;
          Accumulator product[kChains][kTokenTiles][4] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const uint32_t source = w + i * kWarps * kPiece + half * 64;
            const uint4 top = load_shared(source), bottom = load_shared(source + 8 * kStreamPitch);
            Multiply::template multiply<kTokenTiles>(kBlockScaled ? product[half % kChains] : sum[half % kChains][r], top,
                                                     bottom, fragment[i][half]);
          }
          if constexpr (kBlockScaled) {
            const float2 w_scale = *reinterpret_cast<const float2*>(w_scales + (piece * kRowTiles + r) * 2);
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const float x_scale = x_scales[piece * p.m + min(8 * t + 2 * part + j % 2, p.m - 1)];
                const float value = product[0][t][j] + (kChains == 2 ? product[kChains - 1][t][j] : 0.0f);
                sum[0][r][t][j] = fmaf(value, x_scale * (j < 2 ? w_scale.x : w_scale.y), sum[0][r][t][j]);
              }
            }
          }
        }
        ring.release();
        ring.advance();
      }
    }

    if (turn != blockIdx.x) sync_threads(1, kThreads);  // the sums before have been read
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        Accumulator own[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          own[j] = sum[0][r][t][j] + (kChains == 2 && !kBlockScaled ? sum[kChains - 1][r][t][j] : 0);
        }
        *reinterpret_cast<uint4*>(sums + ((warp * kTiles + r * kTokenTiles + t) * 32 + lane) * 4) =
            reinterpret_cast<const uint4&>(own);
      }
    }
    sync_threads(1, kThreads);
    if (kBlockScaled && turn + gridDim.x < plan.turns) {
      load_w_scales(first + gridDim.x * plan.rows);
      sync_threads(1, kThreads);
    }
#pragma unroll
    for (int i = 0; i < kResults; ++i) {
      const int row = result_row[i], token = result_token[i];
      if (row >= rows) continue;
      const int tile = row / 16 * kTokenTiles + token / 8, holder = row % 8 * 4 + token % 8 / 2;
      const Accumulator* const source = sums + (tile * 32 + holder) * 4 + row % 16 / 8 * 2 + token % 2;
      Accumulator total = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += source[w * kTiles * 128];
      store_result(p, token, first + row, result_scale[i].apply(static_cast<float>(total)));
    }
  }
}

template <GemmFormat kFormat, int kRowTiles, int kTokenTiles, int kWarps>
cudaError_t launch_stream_gemm(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  int sms;
  cudaError_t error = count_sms(sms);
  if (error != cudaSuccess) return error;
  const auto kernel = stream_gemm_kernel<kFormat, kRowTiles, kTokenTiles, kWarps>;
  const StreamPlan plan = make_stream_plan(config, kTokenTiles, kFormat == GemmFormat::kE4M3Block, p.m, p.n,
                                           p.k * kElementBits<kFormat> / 8, sms);
  if (plan.size > 227 * 1024) return cudaErrorInvalidValue;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.size);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(plan.turns < sms ? plan.turns : sms), dim3(32 * kWarps + 32), plan.size, stream, p.pdl,
                       p, plan);
}

template <GemmFormat kFormat, int kRowTiles>
cudaError_t choose_stream_gemm(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  if (config.warps == 8) {
    return p.m <= 8 ? launch_stream_gemm<kFormat, kRowTiles, 1, 8>(p, config, stream)
                    : launch_stream_gemm<kFormat, kRowTiles, 2, 8>(p, config, stream);
  }
  if constexpr (kRowTiles < 4) {  // sixteen warps have too few registers for four
    if (config.warps == 16) {
      return p.m <= 8 ? launch_stream_gemm<kFormat, kRowTiles, 1, 16>(p, config, stream)
                      : launch_stream_gemm<kFormat, kRowTiles, 2, 16>(p, config, stream);
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
