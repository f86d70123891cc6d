#pragma once

#include <type_traits>

#include "../common/async_copy.cuh"
#include "../common/launch.cuh"
#include "../quant/quantizers.cuh"
#include "gemm_common.cuh"
#include "mma.cuh"
#include "nvfp4.cuh"

// y = x w^T for few rows of x: the time is that of reading w once, so everything else is kept short.
//
// A block computes 16, 32 or 64 rows of w; its warps, and the blocks of a cluster, split K. It asks for all it needs of w
// before it waits for the kernel before; then each warp takes (or quantises) its slice of x, multiplies, and meets the
// others only to add up.

namespace vllm_b200 {

constexpr int kRowPadding = 64;   // between rows in shared memory: the 16-byte reads of two rows meet no bank twice
constexpr int kWidePadding = 16;  // the same for x in fp16, of which a lane reads 32 bytes

// What a launch is made of, worked out on the host: divisions cost a warp as much as the products of a step.
struct GemmPlan {
  int warps, cluster, pieces, steps;    // pieces: of a row; steps: of a warp
  int chunks, warps_per_chunk;          // of the bulk copies of a row
  int w_row, x_row;                     // bytes from one row to the next in shared memory
  int x, x_warp, x_scale, scale_warp;   // of a quantised x: byte offsets, and bytes from one warp's part to the next's
  int inverse_m;                        // 65536 / m, rounded up
  int w_scale, w_scale_row;             // of NVFP4's: byte offset, and bytes from one row of a warp's part to the next
  int sums, sums_warp, partial;         // the warps' sums, and those of the cluster's other blocks
  int barriers, size;                   // a barrier a chunk and one for the cluster; size of it all
};

inline GemmPlan make_gemm_plan(const GemmConfig& config, bool quantize, bool nvfp4, int m, int k_bytes) {
  GemmPlan plan = {};
  const int rows = 16 * config.row_tiles, splits = config.warps * config.cluster;
  plan.warps = config.warps;
  plan.cluster = config.cluster;
  plan.pieces = (k_bytes + kPiece - 1) / kPiece;
  plan.steps = (plan.pieces + splits - 1) / splits;
  plan.chunks = config.chunks;
  plan.warps_per_chunk = config.chunks > 0 ? config.warps / config.chunks : 0;
  plan.w_row = plan.warps * plan.steps * kPiece + kRowPadding;
  plan.x_row = 2 * plan.steps * kPiece + kWidePadding;
  plan.x = rows * plan.w_row;
  plan.x_warp = quantize ? m * plan.x_row : 0;
  plan.x_scale = plan.x + plan.warps * plan.x_warp;
  plan.scale_warp = quantize ? plan.steps * 8 * 4 : 0;
  plan.inverse_m = (65536 + m - 1) / m;
  plan.w_scale = plan.x_scale + plan.warps * plan.scale_warp;
  plan.w_scale_row = nvfp4 ? 16 * (plan.steps | 1) : 0;  // odd: eight rows meet no bank twice
  plan.sums = plan.w_scale + plan.warps * rows * plan.w_scale_row;
  plan.sums_warp = m * (rows + 4) * 4;
  plan.partial = plan.sums + plan.warps * plan.sums_warp;
  plan.barriers = plan.partial + (config.cluster - 1) * m * rows * 4;
  plan.barriers = (plan.barriers + 7) / 8 * 8;
  plan.size = plan.barriers + 8 * (config.chunks + 1);
  return plan;
}

// One lane's 16 elements of a group of x: to e4m3 by the arithmetic of group_quant.cu, widened to fp16. The eight lanes of
// a group call it together; returns the group's scale.
__device__ __forceinline__ float quantize_widened(const Chunk<__nv_bfloat16>& chunk, float eps, bool ue8m0, bool store,
                                                  uint8_t* destination) {
  float scale = group_scale<__nv_fp8_e4m3, kPiece, false>(absmax_bits(chunk), eps);
  if (ue8m0) scale = round_up_to_pow2(__uint_as_float(max(__float_as_uint(scale), __float_as_uint(1e-10f))));
  const Divisor divide(scale);  // for a power of two, too: its reciprocal is exact
  uint32_t wide[kChunk / 2];
#pragma unroll
  for (int i = 0; i < kChunk / 4; ++i) {
    const float2 low = unpack_pair(chunk, 2 * i), high = unpack_pair(chunk, 2 * i + 1);
    const uint2 halves = e4m3_to_f16(pack_bytes(static_cast<__nv_fp8_e4m3*>(nullptr), divide(low.x), divide(low.y),
                                                divide(high.x), divide(high.y)));
    wide[2 * i] = halves.x, wide[2 * i + 1] = halves.y;
  }
  if (store) {
    reinterpret_cast<uint4*>(destination)[0] = make_uint4(wide[0], wide[1], wide[2], wide[3]);
    reinterpret_cast<uint4*>(destination)[1] = make_uint4(wide[4], wide[5], wide[6], wide[7]);
  }
  return scale;
}

// One step: sum += scale * (w x^T) over a piece. w: the lane's first 16 bytes of it. x_fragment(half, token tile) is the
// lane's part of x, scale_of(token tile) the scales of columns 2 t and 2 t + 1 for lane 4 g + t.
template <GemmFormat kFormat, int kRowTiles, int kTokenTiles, typename Accumulator, typename XFragment, typename Scale>
__device__ __forceinline__ void multiply_piece(Accumulator (&sum)[kRowTiles][kTokenTiles][4], const uint8_t* w,
                                               int eight_rows, const XFragment& x_fragment, const Scale& scale_of) {
  using Multiply = Mma<kFormat>;
  // The products of a step are kept apart only where they have a scale of their own. One tile alone would be a chain of
  // dependent products: two accumulators halve it.
  constexpr bool kBlockScaled = kFormat == GemmFormat::kE4M3Block;
  constexpr int kChains = kRowTiles * kTokenTiles == 1 ? 2 : 1;
  Accumulator product[kChains][kRowTiles][kTokenTiles][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    typename Multiply::XFragment fragment[kTokenTiles];
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) fragment[t] = x_fragment(half, t);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const uint4 top = *reinterpret_cast<const uint4*>(w + 2 * r * eight_rows + half * 64);
      const uint4 bottom = *reinterpret_cast<const uint4*>(w + (2 * r + 1) * eight_rows + half * 64);
      Multiply::template multiply<kTokenTiles>(kBlockScaled ? product[half % kChains][r] : sum[r], top, bottom, fragment);
    }
  }
  if constexpr (kBlockScaled) {
#pragma unroll
    for (int t = 0; t < kTokenTiles; ++t) {
      const float2 scales = scale_of(t);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float value = product[0][r][t][i];
          if constexpr (kChains == 2) value += product[1][r][t][i];
          sum[r][t][i] = fmaf(value, i % 2 == 0 ? scales.x : scales.y, sum[r][t][i]);
        }
      }
    }
  }
}

template <GemmFormat kFormat, bool kQuantize, int kRowTiles, int kTokenTiles>
__global__ void __launch_bounds__(kRowTiles * kTokenTiles > 4 ? 256 : 512, 1)
    small_m_gemm_kernel(const __grid_constant__ SmallMGemmParams p, const __grid_constant__ GemmPlan plan) {
  constexpr int kRows = 16 * kRowTiles, kTokens = 8 * kTokenTiles, kSumRow = kRows + 4;
  constexpr bool kBlockScaled = kFormat == GemmFormat::kE4M3Block;
  constexpr bool kNvFp4 = kFormat == GemmFormat::kNvFp4;
  constexpr int kSize = kNvFp4 ? 1 : kElementBits<kFormat> / 8;
  using Multiply = Mma<kFormat>;
  using Accumulator = typename Multiply::Accumulator;

  pdl_trigger();
  extern __shared__ __align__(128) uint8_t smem[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int first_row = blockIdx.y * kRows, rank = blockIdx.x;
  const int block_first = rank * plan.warps * plan.steps, first = block_first + warp * plan.steps;
  const int steps = min(plan.steps, plan.pieces - first);
  const int k_bytes = kNvFp4 ? p.k / 2 : p.k * kSize, block_column = block_first * kPiece, column = first * kPiece;
  const int64_t w_stride = p.w_stride * kSize;
  const uint32_t barriers = shared_address(smem) + plan.barriers, cluster_barrier = barriers + 8 * plan.chunks;
  const uint8_t* const w_tile = static_cast<const uint8_t*>(p.w) + first_row * w_stride;

  if (plan.chunks + plan.cluster > 1) {
    const int rows = min(kRows, p.n - first_row);
    const int chunk_bytes = plan.warps_per_chunk * plan.steps * kPiece;
    if (threadIdx.x == 0) {
#pragma unroll 1
      for (int i = 0; i <= plan.chunks; ++i) barrier_init(barriers + 8 * i, 1);
      barrier_init_fence();
      if (plan.cluster > 1 && rank == 0) {
        barrier_expect(cluster_barrier, (plan.cluster - 1) * p.m * kRows * sizeof(Accumulator));
      }
#pragma unroll 1
      for (int i = 0; i < plan.chunks; ++i) {
        const int bytes = min(chunk_bytes, k_bytes - block_column - i * chunk_bytes);
        if (bytes > 0) barrier_expect(barriers + 8 * i, rows * bytes);
      }
    }
    if (plan.cluster > 1) cluster_arrive();
    if (plan.chunks > 0) {
      __syncthreads();
#pragma unroll 1
      for (int i = 0; i < plan.chunks; ++i) {
        const int offset = i * chunk_bytes, bytes = min(chunk_bytes, k_bytes - block_column - offset);
        if (bytes <= 0) break;
        if (lane == 0) {
          for (int row = warp; row < rows; row += plan.warps) {
            bulk_copy(shared_address(smem) + row * plan.w_row + offset, w_tile + row * w_stride + block_column + offset,
                      bytes, barriers + 8 * i);
          }
        }
      }
    }
  }

  Accumulator sum[kRowTiles][kTokenTiles][4] = {};
  if (steps > 0) {
    uint8_t* const w_own = smem + warp * plan.steps * kPiece;
    // cp.async: eight lanes to a row's piece, four rows at a time.
    const int copy_row = lane / 8, copy_column = lane % 8 * 16;
    if (plan.chunks == 0) {
      const uint8_t* source = w_tile + copy_row * w_stride + column + copy_column;
      uint32_t destination = shared_address(w_own) + copy_row * plan.w_row + copy_column;
      const int rows = p.n - first_row - copy_row;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const bool inside = column + step * kPiece + copy_column < k_bytes;
#pragma unroll
        for (int row = 0; row < kRows; row += 4) {
          copy_async_16(destination + row * plan.w_row, source + row * w_stride, inside && row < rows);
        }
        source += kPiece;
        destination += kPiece;
      }
    } else if (column + steps * kPiece > k_bytes) {
      // The row ends within the warp's last piece: zeros to the piece's end.
      const int rest = (column + steps * kPiece - k_bytes) / 16;
      for (int row = copy_row; row < kRows; row += 4) {
        if (lane % 8 < rest) {
          *reinterpret_cast<uint4*>(w_own + row * plan.w_row + steps * kPiece - 16 * (lane % 8 + 1)) = {};
        }
      }
    }
    float w_scale = 0.0f;
    if (kBlockScaled && lane < steps) {
      w_scale = load_scale(p.w_scale, p.w_scale_packed, (first_row >> p.w_scale_shift) * p.w_scale_stride_row, first + lane,
                           p.w_scale_stride_group);
    }

    uint8_t* const w_scale_own = smem + plan.w_scale + warp * kRows * plan.w_scale_row;
    if constexpr (kNvFp4) {
      // Four scales at a time: four lanes to a row's piece, eight rows at a time.
      const int four = lane % 4, groups_end = p.k / 16;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const int fours = (first + step) * 4 + four;
#pragma unroll
        for (int row = lane / 4; row < kRows; row += 8) {
          const int64_t r = first_row + row;
          const int64_t offset =
              p.w_group_tiled ? r / 128 * p.w_group_stride_row + int64_t{512} * fours + r % 32 * 16 + r % 128 / 32 * 4
                              : r * p.w_group_stride_row + 4 * fours;
          copy_async_4(shared_address(w_scale_own) + row * plan.w_scale_row + step * 16 + four * 4,
                       static_cast<const uint8_t*>(p.w_group_scale) + offset, r < p.n && 4 * fours < groups_end);
        }
      }
    }

    const auto wait_for_w = [&] {
      copy_async_wait_all();
      if (plan.chunks > 0) {
        int chunk = 0;
        for (int w = plan.warps_per_chunk; w <= warp; w += plan.warps_per_chunk) ++chunk;
        barrier_wait(barriers + 8 * chunk, 0);
      }
      __syncwarp();
    };
    const int row = lane / 4, part = lane % 4;
    const uint8_t* w = w_own + row * plan.w_row + part * 16;
    const int eight_rows = 8 * plan.w_row;

    pdl_wait();
    if constexpr (kQuantize) {
      uint8_t* const x_own = smem + plan.x + warp * plan.x_warp;
      float* const x_scale = reinterpret_cast<float*>(smem + plan.x_scale + warp * plan.scale_warp);
      // Pairs of a step and a token, four at a time, of which two times four are asked for before the first is used.
      constexpr int kBatch = 2;
      const int pairs = steps * p.m;
#pragma unroll 1
      for (int base = lane / 8; base - lane / 8 < pairs; base += 4 * kBatch) {
        Chunk<__nv_bfloat16> chunk[kBatch];
        int step[kBatch], token[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          const int pair = base + 4 * i;
          step[i] = pair * plan.inverse_m >> 16;
          token[i] = pair - step[i] * p.m;
          chunk[i] = {};
          if (pair < pairs) {
            load_chunk<__nv_bfloat16, true>(chunk[i], static_cast<const __nv_bfloat16*>(p.x) + token[i] * p.x_stride +
                                                          column + step[i] * kPiece + lane % 8 * kChunk);
          }
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
          if (base - lane / 8 + 4 * i >= pairs) break;
          const bool valid = base + 4 * i < pairs;
          const float scale =
              quantize_widened(chunk[i], p.eps, p.ue8m0, valid,
                               x_own + token[i] * plan.x_row + 2 * (step[i] * kPiece + lane % 8 * kChunk));
          if (valid && lane % 8 == 0) x_scale[step[i] * kTokens + token[i]] = scale;
        }
      }
      wait_for_w();
      const uint8_t* x = x_own + min(row, p.m - 1) * plan.x_row + part * 32;
      const float* scale = x_scale + 2 * part;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const float step_scale = __shfl_sync(kFullWarp, w_scale, step);
        multiply_piece<kFormat>(
            sum, w, eight_rows,
            [&](int half, int) {
              const auto* wide = reinterpret_cast<const uint4*>(x + half * 128);
              return typename Multiply::XFragment(wide[0], wide[1]);
            },
            [&](int) {
              const float2 pair = *reinterpret_cast<const float2*>(scale);
              return make_float2(pair.x * step_scale, pair.y * step_scale);
            });
        w += kPiece;
        x += 2 * kPiece;
        scale += kTokens;
      }
    } else if constexpr (kNvFp4) {
      // As below, but half a step of w is 32 elements of each lane, 64 bytes of x.
      constexpr int kAhead = 4 / kTokenTiles;
      const uint4* x[kTokenTiles];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        x[t] = reinterpret_cast<const uint4*>(static_cast<const __nv_bfloat16*>(p.x) +
                                              min(8 * t + row, p.m - 1) * p.x_stride) +
               (column + part * 16) / 4;
      }
      const int rest = k_bytes - column - part * 16;
      const uint8_t* w_scale_row = w_scale_own + row * plan.w_scale_row + part * 2;
      constexpr int kChains = kRowTiles * kTokenTiles == 1 ? 2 : 1;
      float odd[kRowTiles][kTokenTiles][4] = {};  // a second chain of dependent products
      bool waited = false;
#pragma unroll 1
      for (int base = 0; base < 2 * steps; base += kAhead) {
        uint4 eights[kAhead][kTokenTiles][4];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const bool inside = base + i < 2 * steps && (base + i) * 64 < rest;
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
            for (int j = 0; j < 4; ++j) eights[i][t][j] = inside ? x[t][(base + i) * 16 + j] : uint4{};
          }
        }
        if (!waited) wait_for_w();
        waited = true;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (base + i >= 2 * steps) break;
          NvFp4XFragment fragment[kTokenTiles];
#pragma unroll
          for (int t = 0; t < kTokenTiles; ++t) fragment[t] = NvFp4XFragment(eights[i][t]);
          const uint8_t* w_half = w + (base + i) * 64;
          const uint8_t* scale = w_scale_row + (base + i) * 8;
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) {
            multiply_nvfp4<kTokenTiles>(
                kChains == 2 && i % 2 == 1 ? odd[r] : sum[r],
                *reinterpret_cast<const uint4*>(w_half + 2 * r * eight_rows),
                *reinterpret_cast<const uint4*>(w_half + (2 * r + 1) * eight_rows),
                *reinterpret_cast<const uint16_t*>(scale + 16 * r * plan.w_scale_row),
                *reinterpret_cast<const uint16_t*>(scale + (16 * r + 8) * plan.w_scale_row), fragment);
          }
        }
      }
      if constexpr (kChains == 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[0][0][i] += odd[0][0][i];
      }
    } else {
      // Straight from global memory to registers, some steps at once: every byte is used by one lane only.
      constexpr int kAhead = kTokenTiles == 1 ? 4 : kTokenTiles == 2 ? 2 : 1;
      const uint8_t* x[kTokenTiles];
#pragma unroll
      for (int t = 0; t < kTokenTiles; ++t) {
        x[t] = static_cast<const uint8_t*>(p.x) + min(8 * t + row, p.m - 1) * p.x_stride * kSize + column + part * 16;
      }
      const int rest = k_bytes - column - part * 16;
      const int64_t scale_row = min(lane, p.m - 1) * p.x_scale_stride_row;
      bool waited = false;
#pragma unroll 1
      for (int base = 0; base < steps; base += kAhead) {
        uint4 bytes[kAhead][kTokenTiles][2];
        float x_scale[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const int offset = (base + i) * kPiece + half * 64;
            const bool inside = base + i < steps && offset < rest;
#pragma unroll
            for (int t = 0; t < kTokenTiles; ++t) {
              bytes[i][t][half] = inside ? *reinterpret_cast<const uint4*>(x[t] + offset) : uint4{};
            }
          }
          if (kBlockScaled && base + i < steps) {
            x_scale[i] =
                load_scale(p.x_scale, p.x_scale_packed, scale_row, first + base + i, p.x_scale_stride_group);
          }
        }
        if (!waited) wait_for_w();
        waited = true;
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          if (base + i >= steps) break;
          float step_scale = 0.0f;
          if constexpr (kBlockScaled) step_scale = x_scale[i] * __shfl_sync(kFullWarp, w_scale, base + i);
          multiply_piece<kFormat>(
              sum, w, eight_rows,
              [&](int half, int t) { return typename Multiply::XFragment(bytes[i][t][half]); },
              [&](int t) {
                return make_float2(__shfl_sync(kFullWarp, step_scale, 8 * t + 2 * part),
                                   __shfl_sync(kFullWarp, step_scale, 8 * t + 2 * part + 1));
              });
          w += kPiece;
        }
      }
    }
  } else {
    pdl_wait();
  }

  // The warp's sums [token][row].
  Accumulator* const sums = reinterpret_cast<Accumulator*>(smem + plan.sums + warp * plan.sums_warp);
#pragma unroll
  for (int t = 0; t < kTokenTiles; ++t) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * t + lane % 4 * 2 + i;
      if (token < p.m) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          sums[token * kSumRow + 16 * r + lane / 4] = sum[r][t][i];
          sums[token * kSumRow + 16 * r + lane / 4 + 8] = sum[r][t][i + 2];
        }
      }
    }
  }
  __syncthreads();

  // Four lanes to a result, each adding every fourth warp's sum.
  const int lanes_end = p.m * kRows * 4;
  const auto add_up = [&](int i) {
    Accumulator total = 0;
    const uint8_t* source = smem + plan.sums + (i / 4 / kRows * kSumRow + i / 4 % kRows) * 4;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int w = i % 4 + 4 * j;
      if (w < plan.warps) total += *reinterpret_cast<const Accumulator*>(source + w * plan.sums_warp);
    }
    total += __shfl_xor_sync(kFullWarp, total, 1);
    return total + __shfl_xor_sync(kFullWarp, total, 2);
  };
  const auto* partial = reinterpret_cast<const Accumulator*>(smem + plan.partial);
  if (plan.cluster > 1) {
    cluster_wait();  // the first block's barrier is there
    if (rank != 0) {
      const uint32_t remote = remote_address(shared_address(smem), 0);
      for (int i = threadIdx.x; i < lanes_end; i += blockDim.x) {
        const Accumulator total = add_up(i);
        if (i % 4 == 0) {
          store_remote(remote + plan.partial + ((rank - 1) * lanes_end + i) * static_cast<int>(sizeof(Accumulator)) / 4,
                       reinterpret_cast<const uint32_t&>(total), remote + plan.barriers + 8 * plan.chunks);
        }
      }
      return;
    }
    barrier_wait(cluster_barrier, 0);
  }
  for (int i = threadIdx.x; i < lanes_end; i += blockDim.x) {
    Accumulator total = add_up(i);
    const int token = i / 4 / kRows, row = first_row + i / 4 % kRows;
    if (i % 4 != 0 || row >= p.n) continue;
#pragma unroll 1
    for (int r = 0; r < plan.cluster - 1; ++r) total += partial[r * p.m * kRows + i / 4];
    ResultScale<kFormat> scale;
    scale.load(p, token, row);
    store_result(p, token, row, scale.apply(static_cast<float>(total)));
  }
}

template <GemmFormat kFormat, bool kQuantize, int kRowTiles, int kTokenTiles>
cudaError_t launch_small_m_gemm(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  constexpr int kMaxWarps = kRowTiles * kTokenTiles > 4 ? 8 : 16;
  const auto kernel = small_m_gemm_kernel<kFormat, kQuantize, kRowTiles, kTokenTiles>;
  const GemmPlan plan = make_gemm_plan(config, kQuantize, kFormat == GemmFormat::kNvFp4, p.m, p.k * kElementBits<kFormat> / 8);
  const int tiles = (p.n + 16 * kRowTiles - 1) / (16 * kRowTiles);
  if (config.warps > kMaxWarps || (config.chunks > 0 && config.warps % config.chunks != 0) || plan.steps > 32 ||
      plan.size > 227 * 1024 || tiles > 65535) return cudaErrorInvalidValue;
  if (plan.size > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.size);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (p.pdl) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (config.cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = config.cluster;
    attributes[count].val.clusterDim.y = 1;
    attributes[count++].val.clusterDim.z = 1;
  }
  cudaLaunchConfig_t launch = {};
  launch.gridDim = dim3(config.cluster, tiles);
  launch.blockDim = dim3(32 * config.warps);
  launch.dynamicSmemBytes = plan.size;
  launch.stream = stream;
  launch.attrs = attributes;
  launch.numAttrs = count;
  return cudaLaunchKernelEx(&launch, kernel, p, plan);
}

template <GemmFormat kFormat, bool kQuantize, int kRowTiles>
cudaError_t choose_token_tiles(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  if (p.m <= 8) return launch_small_m_gemm<kFormat, kQuantize, kRowTiles, 1>(p, config, stream);
  if constexpr (kQuantize) {
    return cudaErrorInvalidValue;
  } else {
    if (p.m <= 16) return launch_small_m_gemm<kFormat, kQuantize, kRowTiles, 2>(p, config, stream);
    return launch_small_m_gemm<kFormat, kQuantize, kRowTiles, 4>(p, config, stream);
  }
}

template <GemmFormat kFormat, bool kQuantize>
cudaError_t small_m_gemm_format(const SmallMGemmParams& p, const GemmConfig& config, cudaStream_t stream) {
  switch (config.row_tiles) {
    case 1: return choose_token_tiles<kFormat, kQuantize, 1>(p, config, stream);
    case 2: return choose_token_tiles<kFormat, kQuantize, 2>(p, config, stream);
    case 4: return choose_token_tiles<kFormat, kQuantize, 4>(p, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
