#pragma once

#include <algorithm>

#include "../common/launch.cuh"
#include "nvfp4.cuh"
#include "nvfp4_quant.h"
#include "row_source.cuh"

// A lane takes 16 elements, a warp 512 columns of up to four rows that lie 32 apart: the scales of four groups of these
// rows are 16 bytes side by side in the swizzled layout.

namespace vllm_b200 {
namespace {

constexpr int kLineRows = 4, kLines = kTileRows / kLineRows;
constexpr int kNvfp4MaxWarps = 8;

// A row as it is, or the product of its halves rounded to its type.
template <typename In, bool kGated>
struct Nvfp4Source {
  using Row = std::conditional_t<kGated, GatedRow<In, Activation::kSilu>, PlainRow<In>>;
  using Raw = typename Row::Raw;
  static constexpr int kInFlight = sizeof(Raw) > 32 ? 2 : 4;  // rows that are loaded at once

  static __device__ __forceinline__ Chunk<In> finish(const Raw& raw) {
    if constexpr (kGated) {
      const Chunk<float> values = Row::finish(raw, {});
      Chunk<In> chunk;
#pragma unroll
      for (int i = 0; i < kChunk / 2; ++i) {
        const float2 pair = unpack_pair(values, i);
        pack_pair(chunk, i, pair.x, pair.y);
      }
      return chunk;
    } else {
      return raw;
    }
  }
};

// bytes: of four rows the scale of the lane's group. The lanes of four groups swap them: those of group g return the
// scales of row g.
template <int kLanesPerGroup>
__device__ __forceinline__ uint32_t gather_scales(uint32_t bytes, int lane) {
  const uint32_t next = __shfl_xor_sync(kFullWarp, bytes, kLanesPerGroup);
  const uint32_t pairs = __byte_perm(bytes, next, lane & kLanesPerGroup ? 0x3715 : 0x6240);
  const uint32_t others = __shfl_xor_sync(kFullWarp, pairs, 2 * kLanesPerGroup);
  return __byte_perm(pairs, others, lane & 2 * kLanesPerGroup ? 0x3276 : 0x5410);
}

// A tile of 128 rows of scales, and the rows of x that belong to it. The whole warp calls the constructor.
template <bool kExperts>
struct ScaleTile {
  int64_t first_row, rows;
  const float* global_scale;

  __device__ __forceinline__ ScaleTile(const Nvfp4QuantParams& p, int64_t tile, int lane) {
    first_row = tile * kTileRows, rows = p.rows, global_scale = p.global_scale;
    if constexpr (kExperts) {
      // The expert is as many as those whose scales end before the tile.
      int expert = 0;
      for (int first = 0; first < p.num_experts; first += 32) {
        const bool ended = first + lane < p.num_experts && p.scale_offsets[first + lane + 1] <= first_row;
        expert += __popc(__ballot_sync(kFullWarp, ended));
      }
      if (expert == p.num_experts) {  // behind all
        first_row = rows = -1;
      } else {
        first_row += p.expert_offsets[expert] - p.scale_offsets[expert];
        rows = min(p.rows, int64_t{p.expert_offsets[expert + 1]});
        global_scale += expert;
      }
    }
  }
  __device__ __forceinline__ bool exists() const { return !kExperts || first_row >= 0; }
};

template <typename Format, typename In, bool kGated, bool kSwizzled, bool kExperts>
__global__ void __launch_bounds__(32 * kNvfp4MaxWarps)
nvfp4_quant_kernel(const __grid_constant__ Nvfp4QuantParams p, int64_t lines) {
  using Source = Nvfp4Source<In, kGated>;
  using Packed = typename Format::Packed;
  constexpr int kInFlight = Source::kInFlight, kLanesPerGroup = Format::kLanesPerGroup;
  pdl_trigger();
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  const int column = blockIdx.x * kWarpColumns + lane * kChunk, group = column / (kChunk * kLanesPerGroup);
  const bool in_row = column < p.hidden_size, in_q = column < p.padded_size, stores_scale = lane % kLanesPerGroup == 0;
  int64_t line = static_cast<int64_t>(blockIdx.y) * warps + threadIdx.x / 32;
  pdl_wait();

  for (; line < lines; line += static_cast<int64_t>(gridDim.y) * warps) {
    const int64_t tile_index = line / kLines;
    const int place = static_cast<int>(line % kLines);
    const ScaleTile<kExperts> tile(p, tile_index, lane);
    if (!tile.exists()) return;
    const float global_scale = Format::kHasGlobalScale ? *tile.global_scale : 1.0f;
    const float global_reciprocal = __frcp_rn(global_scale);
    const int64_t first_row = tile.first_row + place;
    const int rows_left = static_cast<int>(min(tile.rows - first_row, int64_t{kTileRows}));
    const In* x = static_cast<const In*>(p.x) + first_row * p.x_stride_row + column;
    Packed* q = reinterpret_cast<Packed*>(p.q) + first_row * (p.padded_size / kChunk) + column / kChunk;
    uint8_t* linear_scale = p.scale + first_row * p.groups + group;

    uint32_t scales = 0;
#pragma unroll
    for (int part = 0; part < kLineRows; part += kInFlight) {
      typename Source::Raw raw[kInFlight] = {};
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (in_row && (part + i) * kLines < rows_left) Source::Row::load(raw[i], x, p.hidden_size);
        x += kLines * p.x_stride_row;
      }
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if ((part + i) * kLines >= rows_left) break;
        const Chunk<In> chunk = Source::finish(raw[i]);
        uint32_t amax = absmax_bits(chunk);
        if constexpr (kLanesPerGroup == 2) amax = max(amax, __shfl_xor_sync(kFullWarp, amax, 1));
        const GroupScale scale = Format::scale(amax, global_scale, global_reciprocal);
        if (in_q) {
          *q = Format::pack(chunk, scale.factor);
          if constexpr (kSwizzled) {
            scales |= scale.byte << 8 * (part + i);
          } else if (stores_scale) {
            *linear_scale = scale.byte;
          }
        }
        q += kLines * (p.padded_size / kChunk);
        linear_scale += kLines * p.groups;
      }
    }
    if constexpr (kSwizzled) {
      const uint32_t word = gather_scales<kLanesPerGroup>(scales, lane);
      if (group < p.groups && stores_scale) {
        const int64_t tile_across = tile_index * (p.groups / kTileGroups) + group / kTileGroups;
        const int row_in_tile = place + group % kTileGroups * kLines;
        reinterpret_cast<uint32_t*>(p.scale)[swizzled_offset(tile_across, row_in_tile)] = word;
      }
    }
  }
}

template <typename Format, typename In, bool kGated, bool kSwizzled, bool kExperts>
cudaError_t launch_nvfp4_quant(const Nvfp4QuantParams& p, cudaStream_t stream) {
  constexpr int64_t kMaxGridY = 65535;
  const int64_t whole_tiles = p.rows / kTileRows, rest = p.rows % kTileRows;
  const int64_t lines = kExperts    ? p.scale_tiles * kLines
                        : kSwizzled ? (p.rows + kTileRows - 1) / kTileRows * kLines
                                    : whole_tiles * kLines + std::min<int64_t>(rest, kLines);
  const int warps = lines < 4 ? 1 : lines < 256 ? 4 : kNvfp4MaxWarps;
  const int columns = std::max(p.padded_size, kSwizzled ? p.groups * kChunk * Format::kLanesPerGroup : 0);
  const dim3 grid((columns + kWarpColumns - 1) / kWarpColumns, std::min((lines + warps - 1) / warps, kMaxGridY));
  return launch_kernel(nvfp4_quant_kernel<Format, In, kGated, kSwizzled, kExperts>, grid, dim3(32 * warps), 0, stream,
                       p.pdl, p, lines);
}

}  // namespace
}  // namespace vllm_b200
