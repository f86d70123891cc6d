#pragma once

#include "few_tokens.cuh"

namespace vllm_b200 {

constexpr int kGateUpWarps = 8;  // besides the one that fetches
constexpr int kGateUpThreads = 32 * kGateUpWarps;
constexpr int kTeamWarps = kGateUpWarps / kTeams, kTeamThreads = 32 * kTeamWarps;
using GateUpRows = RowChunks<16>;

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

// The dynamic shared memory: barriers | assignments | scales of x | partial sums | quantised x | ring.
struct GateUpLayout {
  GateUpRows rows;
  int assignments, scales, partials, quantised, ring, end;

  __host__ __device__ GateUpLayout(const FewTokensMoeParams& p, int stages) : rows(p.hidden_size) {
    assignments = Ring::barrier_bytes(stages);
    scales = round_up(assignments + Assignments::bytes(p), 16);
    partials = round_up(scales + 4 * rows.blocks * p.num_tokens, 16);
    quantised = partials + 2 * kGateUpThreads * 16 * (p.num_tokens > kTileTokens ? 2 : 1);
    ring = round_up(quantised + p.num_tokens * p.hidden_size, 128);
    end = ring + stages * rows.stage_bytes();
  }
};

// A tile of gate_up_kernel; they are counted expert by expert.
struct Cursor {
  int tile, entry, column_tile;  // column_tile: of the entry

  __device__ Cursor(int tile, int expert_tiles)
      : tile(tile), entry(tile / expert_tiles), column_tile(tile - entry * expert_tiles) {}
  __device__ __forceinline__ void advance(int expert_tiles) {
    ++tile;
    if (++column_tile == expert_tiles) column_tile = 0, ++entry;
  }
};

// A tile is 8 rows of the gate and the 8 of the other half that belong to the same columns, so that a lane holds both
// factors of silu(gate) * up, which it writes to `hidden`, by places (see Entry).
template <bool kPow2, int kSets>
__global__ void __maxnreg__(kRegisters) gate_up_kernel(const __grid_constant__ FewTokensMoeParams p, int stages) {
  constexpr int kBatch = 2 * kSets;  // blocks of x that a lane loads at once
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = warp_index(), group = lane / 4, quad = lane % 4;
  const GateUpLayout layout(p, stages);
  const GateUpRows rows = layout.rows;
  Ring ring = {shared_address(shared + layout.ring), shared_address(shared), stages, rows.stage_bytes()};
  Assignments assignments(shared + layout.assignments, p);
  float* const scales = reinterpret_cast<float*>(shared + layout.scales);
  if (threadIdx.x == 0) ring.init(1);
  assignments.clear(p);
  // x is quantised by pairs of a block and a token.
  const int pairs = rows.blocks * p.num_tokens;
  int pair = warp * 8 + group;
  const Bf16* sources[kBatch];
  Group<kPow2> x[kBatch];
  auto find_x = [&] {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int p_i = pair + 8 * kGateUpWarps * i, block = p_i / p.num_tokens;
      sources[i] = static_cast<const Bf16*>(p.x) + (p_i - block * p.num_tokens) * p.x_stride + block * kBlock;
    }
  };
  auto load_x = [&] {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (pair + 8 * kGateUpWarps * i < pairs) x[i].load(sources[i]);
    }
  };
  find_x();
  __syncthreads();

  pdl_wait();
  // After the wait and not before: down_kernel reads topk_ids and topk_weights as soon as all blocks have come here.
  pdl_trigger();
  // Before the weights are asked for, behind which it would have to wait.
  if (warp < kGateUpWarps) load_x();
  assignments.collect<false>(p);

  const int expert_tiles = p.intermediate_size / (kRows / 2), tiles = assignments.size() * expert_tiles;
  const int block = blockIdx.x, share = tiles / static_cast<int>(gridDim.x), rest = tiles % static_cast<int>(gridDim.x);
  const int begin = share * block + min(block, rest), end = begin + share + (block < rest);

  if (warp == kGateUpWarps) {
    if (!elect_lane()) return;
    const uint64_t policy = evict_first_policy();
    const int64_t half = int64_t{p.intermediate_size} * p.hidden_size;
#pragma unroll 1
    for (Cursor at(begin, expert_tiles); at.tile < end; at.advance(expert_tiles)) {
      const uint8_t* const first = static_cast<const uint8_t*>(p.w13) + 2 * assignments[at.entry].expert * half +
                                   int64_t{at.column_tile} * (kRows / 2) * p.hidden_size;
#pragma unroll 1
      for (int chunk = 0; chunk < rows.chunks; ++chunk) {
        ring.fetch(first + (p.up_first ? half : 0), first + (p.up_first ? 0 : half), chunk * rows.largest() * kBlock,
                   rows.blocks_of(chunk) * kBlock, p.hidden_size, policy);
      }
    }
    return;
  }

  // Lane 2 i has the gate's scale of the warp's block i, lane 2 i + 1 that of the other half.
  const int team = warp / kTeamWarps, member = warp % kTeamWarps;
  // The teams take turns with the tiles, where that gives each its own buffers.
  const int teams = rows.chunks == 1 && stages % kTeams == 0 ? kTeams : 1;
  const int scale_rows = p.intermediate_size / kBlock, scale_block = member + lane / 2 * kTeamWarps;
  const float* const scale_source =
      p.w13_scale + (lane % 2 != p.up_first ? scale_rows * rows.blocks : 0) + scale_block;
  auto scale_of = [&](const Cursor& cursor) {
    if (cursor.tile >= end || scale_block >= rows.blocks) return 0.0f;
    const int row = 2 * assignments[cursor.entry].expert * scale_rows + cursor.column_tile * (kRows / 2) / kBlock;
    return __ldg(scale_source + int64_t{row} * rows.blocks);
  };
  Cursor at(begin + team, expert_tiles);
  float next_scale = scale_of(at);

  while (true) {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int p_i = pair + 8 * kGateUpWarps * i;
      const float s = x[i].quantize(shared + layout.quantised + p_i * kBlock, p_i % p.num_tokens, p_i < pairs);
      if (quad == 0 && p_i < pairs) scales[p_i] = s;
    }
    pair += 8 * kGateUpWarps * kBatch;
    if (__all_sync(kFullWarp, pair >= pairs)) break;
    find_x();
    load_x();
  }
  sync_threads(1, kGateUpThreads);
  if (team >= teams) return;

  // Columns without a token take another's: nobody reads their sums.
  const int last = p.num_tokens - 1;
  uint32_t column_of[kSets];
  const float* column_scales[kSets][2];
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int token = min(8 * set + group, last);
    column_of[set] = shared_address(shared + layout.quantised) + (member * p.num_tokens + token) * kBlock +
                     quantised_half(token, 0) + quad * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      column_scales[set][i] = scales + member * p.num_tokens + min(8 * set + 2 * quad + i, last);
    }
  }
  auto other_half = [&](int set) {
    const int token = min(8 * set + group, last);
    return quantised_half(token, 1) - quantised_half(token, 0);
  };
  float4* const partials =
      reinterpret_cast<float4*>(shared + layout.partials) + team * 2 * kSets * kTeamThreads + lane;
  for (int i = 0; i < team; ++i) ring.advance();

#pragma unroll 1
  for (int turn = 0; at.tile < end; ++turn) {
    const Cursor current = at;
    const float scale = next_scale;
    for (int i = 0; i < teams; ++i) at.advance(expert_tiles);
    next_scale = scale_of(at);
    float sum[kSets][4] = {};
    int mine = 0;  // of the warp's blocks
#pragma unroll 1
    for (int chunk = 0; chunk < rows.chunks; ++chunk) {
      const int blocks = rows.blocks_of(chunk), pitch = blocks * kBlock;
      const uint32_t weights = ring.wait();
#pragma unroll kSets == 1 ? 2 : 1
      for (int block = member; block < blocks; block += kTeamWarps, ++mine) {
        WeightBlock w;
        w.load(weights + block * kBlock + WeightBlock::lane_offset(pitch), pitch);
        const float gate_scale = __shfl_sync(kFullWarp, scale, 2 * mine);
        const float up_scale = __shfl_sync(kFullWarp, scale, 2 * mine + 1);
        const int offset = mine * kTeamWarps * p.num_tokens;
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          const uint32_t address = column_of[set] + offset * kBlock;
          const uint4 column[2] = {load_shared(address), load_shared(address + other_half(set))};
          const float x0 = column_scales[set][0][offset], x1 = column_scales[set][1][offset];
          float product[4];
          w.multiply(product, column);
          sum[set][0] += product[0] * (x0 * gate_scale);
          sum[set][1] += product[1] * (x1 * gate_scale);
          sum[set][2] += product[2] * (x0 * up_scale);
          sum[set][3] += product[3] * (x1 * up_scale);
        }
      }
      if (chunk + 1 < rows.chunks) {
        sync_threads(1 + team, kTeamThreads);
        if (member == 0 && lane == 0) ring.release();
        ring.advance();
      }
    }
    float4* const tile_partials = partials + turn % 2 * kSets * kTeamThreads;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      tile_partials[set * kTeamThreads + 32 * member] =
          make_float4(sum[set][0], sum[set][1], sum[set][2], sum[set][3]);
    }
    sync_threads(1 + team, kTeamThreads);
    // The members take turns to add up; the others go on with the next tile.
    if (member == turn % kTeamWarps) {
      if (lane == 0) ring.release();
      const Entry entry = assignments[current.entry];
      Bf16* const hidden = static_cast<Bf16*>(p.hidden) + current.column_tile * (kRows / 2) + group;
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
        if (kSets > 1 && (entry.tokens >> 8 * set & 0xff) == 0) continue;
        float4 total = {};
#pragma unroll
        for (int i = 0; i < kTeamWarps; ++i) {
          const float4 part = tile_partials[set * kTeamThreads + 32 * i];
          total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 8 * set + 2 * quad + i;
          if (!entry.has(token)) continue;
          const float gate = i == 0 ? total.x : total.y, up = i == 0 ? total.z : total.w;
          hidden[int64_t{entry.place(token)} * p.intermediate_size] =
              __float2bfloat16_rn(silu(rounded(gate)) * rounded(up));
        }
      }
    }
    for (int i = 0; i < teams; ++i) ring.advance();
  }
}

}  // namespace vllm_b200
