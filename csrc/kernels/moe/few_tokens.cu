#include "few_tokens.h"

#include <algorithm>

#include "few_tokens.cuh"

// Two kernels. In each block a warp or two fetch the weights into rings, far ahead, and the others, in two teams that
// take turns, share the columns of a tile out among them. All blocks find the batch's experts from topk_ids by
// themselves: no sorting, padding or quantising launches.
//
// gate_up_kernel: a tile is 8 rows of the gate and the 8 of the other half that belong to the same columns, so that a
// lane holds both factors of silu(gate) * up, which it writes to `hidden`, by places (see Entry).
//
// down_kernel: a block owns 16 columns of the output. One team takes the experts of even numbers, the other those of
// odd ones, in their order, so that a row's sum runs in one order whatever else is in the batch. It starts where blocks
// of gate_up_kernel have ended, and fetches its first weights.

namespace vllm_b200 {
namespace {

// Of a thread, for the 18 warps that rows of w2 of 1024 and more bytes take.
constexpr int kRegisters = 96;

constexpr int kGateUpWarps = 8;  // besides the one that fetches
constexpr int kGateUpThreads = 32 * kGateUpWarps;
constexpr int kTeams = 2;  // of the warps that multiply
constexpr int kTeamWarps = kGateUpWarps / kTeams, kTeamThreads = 32 * kTeamWarps;
using GateUpRows = RowChunks<16>;
using DownRows = RowChunks<8>;  // each block of a chunk has a warp

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

// The dynamic shared memory: barriers of both teams | assignments | scales of w2 | scales and quantised activations of
// each warp, of the last places | rings of both teams. The sums of the warps come to where the activations were.
struct DownLayout {
  DownRows rows;
  int assignments, w_scales, x_scales, quantised, ring, end;

  // Places that a warp keeps: those of an entry, and what is quantised along with them.
  static __host__ __device__ constexpr int slots(int sets) { return 16 * sets; }

  __host__ __device__ DownLayout(const FewTokensMoeParams& p, int stages) : rows(p.intermediate_size) {
    const int count = p.num_tokens * p.top_k, warps = kTeams * rows.largest();
    const int places = slots(p.num_tokens > kTileTokens ? 2 : 1) * warps;
    assignments = kTeams * Ring::barrier_bytes(stages);
    w_scales = round_up(assignments + Assignments::bytes(p), 16);
    x_scales = w_scales + 4 * (p.num_experts < count ? p.num_experts : count) * rows.largest();
    quantised = round_up(x_scales + 4 * places, 16);
    ring = round_up(quantised + kBlock * places, 128);
    end = ring + kTeams * stages * rows.stage_bytes();
  }
};

template <bool kPow2, int kSets>
__global__ void __maxnreg__(kRegisters) down_kernel(const __grid_constant__ FewTokensMoeParams p, int stages) {
  constexpr int kSlots = DownLayout::slots(kSets);
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = warp_index(), group = lane / 4, quad = lane % 4;
  const DownLayout layout(p, stages);
  const DownRows rows = layout.rows;
  // After the warps that multiply comes one for each team that fetches.
  const int team_warps = rows.largest(), warps = kTeams * team_warps, threads = 32 * warps;
  const int team = warp < warps ? warp / team_warps : warp - warps, member = warp - team * team_warps;
  Ring ring = {shared_address(shared + layout.ring) + team * stages * rows.stage_bytes(),
               shared_address(shared) + team * Ring::barrier_bytes(stages), stages, rows.stage_bytes()};
  Assignments assignments(shared + layout.assignments, p);
  float* const w_scales = reinterpret_cast<float*>(shared + layout.w_scales);
  if (warp >= warps && lane == 0) ring.init(team_warps);
  assignments.clear(p);
  __syncthreads();

  // Before the wait. The only kernel that may still run is gate_up_kernel, which writes neither ids nor weights, and
  // whose blocks let this one start after they had waited for all kernels before: what those wrote is here.
  assignments.collect<true>(p);
  const int row = blockIdx.x * kRows;
  const int begin = team == 0 ? 0 : assignments.even(), end = team == 0 ? assignments.even() : assignments.size();

  if (warp >= warps) {
    if (!elect_lane()) return;
    const uint64_t policy = evict_first_policy();
#pragma unroll 1
    for (int chunk = 0; chunk < rows.chunks; ++chunk) {
#pragma unroll 1
      for (int i = begin; i < end; ++i) {
        const uint8_t* const first = static_cast<const uint8_t*>(p.w2) +
                                     (int64_t{assignments[i].expert} * p.hidden_size + row) * p.intermediate_size;
        ring.fetch(first, first + int64_t{kRows / 2} * p.intermediate_size, chunk * team_warps * kBlock,
                   rows.blocks_of(chunk) * kBlock, p.intermediate_size, policy);
      }
    }
    return;
  }

  const int places = end > begin ? assignments[end - 1].end() : 0;
  float sum[kSets][4] = {};
  float* const x_scales = reinterpret_cast<float*>(shared + layout.x_scales) + warp * kSlots;
  uint8_t* const quantised = shared + layout.quantised + warp * kSlots * kBlock;
  const uint32_t columns = shared_address(quantised) + quad * 16;
#pragma unroll 1
  for (int chunk = 0; chunk < rows.chunks; ++chunk) {
    const int block = chunk * team_warps + member, pitch = rows.blocks_of(chunk) * kBlock;
    const bool works = member < rows.blocks_of(chunk);
    const uint32_t own_weights = member * kBlock + WeightBlock::lane_offset(pitch);
    if (chunk == 0) {
      pdl_wait();
      pdl_trigger();
    }
    Group<kPow2> x;
    const Bf16* source = static_cast<const Bf16*>(p.hidden) + block * kBlock;
    auto load_places = [&](int first) {
      if (works && first + group < places) x.load(source + int64_t{first + group} * p.intermediate_size);
    };
    int ready = begin < end ? assignments[begin].first : 0;  // places up to here are quantised
    load_places(ready);
    if (works) {
      for (int i = begin + lane; i < end; i += 32) {
        const int64_t scale_row = int64_t{assignments[i].expert} * (p.hidden_size / kBlock) + row / kBlock;
        w_scales[i * team_warps + member] = __ldg(p.w2_scale + scale_row * rows.blocks + block);
      }
    }
    __syncwarp();
#pragma unroll 1
    for (int at = begin; at < end; ++at) {
      const Entry entry = assignments[at];
      while (ready < entry.end()) {
        const int place = ready + group;
        const float s = x.quantize(quantised + place % kSlots * kBlock, place, place < places);
        if (quad == 0 && place < places) x_scales[place % kSlots] = s * assignments.weight(place);
        ready += 8;
        load_places(ready);
        __syncwarp();
      }
      const uint32_t buffer = ring.wait();
      if (works) {
        WeightBlock w;
        w.load(buffer + own_weights, pitch);
        const float w_scale = w_scales[at * team_warps + member];
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          if (kSets > 1 && (entry.tokens >> 8 * set & 0xff) == 0) continue;
          // A column without a token takes another's activations: nobody reads its sums.
          const int token = 8 * set + group, place = entry.has(token) ? entry.place(token) : entry.first;
          const uint32_t address = columns + place % kSlots * kBlock;
          const uint4 column[2] = {load_shared(address + quantised_half(place, 0)),
                                   load_shared(address + quantised_half(place, 1))};
          const float scale = x_scales[place % kSlots] * w_scale;
          const float x0 = __shfl_sync(kFullWarp, scale, 8 * quad), x1 = __shfl_sync(kFullWarp, scale, 8 * quad + 4);
          float product[4];
          w.multiply(product, column);
          if (entry.has(8 * set + 2 * quad)) sum[set][0] += product[0] * x0, sum[set][2] += product[2] * x0;
          if (entry.has(8 * set + 2 * quad + 1)) sum[set][1] += product[1] * x1, sum[set][3] += product[3] * x1;
        }
      }
      __syncwarp();
      if (lane == 0) ring.release();
      ring.advance();
    }
  }

  sync_threads(1, threads);
  float4* const partials = reinterpret_cast<float4*>(shared + layout.quantised) + lane;
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    partials[(set * warps + warp) * 32] = make_float4(sum[set][0], sum[set][1], sum[set][2], sum[set][3]);
  }
  sync_threads(1, threads);
  for (int set = warp; set < kSets; set += warps) {
    float4 total = {};
#pragma unroll 4
    for (int i = 0; i < warps; ++i) {
      const float4 part = partials[(set * warps + i) * 32];
      total.x += part.x, total.y += part.y, total.z += part.z, total.w += part.w;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = 8 * set + 2 * quad + i;
      if (token >= p.num_tokens) continue;
      Bf16* const out = static_cast<Bf16*>(p.out) + token * p.out_stride + row + group;
      out[0] = __float2bfloat16_rn(i == 0 ? total.x : total.y);
      out[kRows / 2] = __float2bfloat16_rn(i == 0 ? total.z : total.w);
    }
  }
}

struct Device {
  int sms, shared_per_block;
};

cudaError_t this_device(Device& device) {
  int index = 0;
  cudaError_t error = cudaGetDevice(&index);
  const auto get = [&](int& value, cudaDeviceAttr attribute) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&value, attribute, index);
  };
  get(device.sms, cudaDevAttrMultiProcessorCount);
  get(device.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  return error;
}

// As many as fit into the shared memory along with a buffer of weights.
int tokens_of_a_launch(FewTokensMoeParams p, const Device& device) {
  p.num_tokens = kMaxTokens;
  while (p.num_tokens > 1 && std::max(GateUpLayout(p, 1).end, DownLayout(p, 1).end) > device.shared_per_block) {
    p.num_tokens /= 2;
  }
  return p.num_tokens;
}

// Buffers of a ring. Measured on an H200 with experts of 2048x768: more do not help, fewer leave the memory idle.
template <typename Layout>
int choose_stages(const FewTokensMoeParams& p, const Device& device) {
  int stages = 2 * kTeams;
  while (stages > 1 && Layout(p, stages).end > device.shared_per_block) stages /= 2;
  return stages;
}

template <typename Layout>
cudaError_t launch(void (*kernel)(FewTokensMoeParams, int), const FewTokensMoeParams& p, int blocks, int threads,
                   bool pdl, const Device& device, cudaStream_t stream) {
  const int stages = choose_stages<Layout>(p, device), bytes = Layout(p, stages).end;
  if (bytes > device.shared_per_block) return cudaErrorInvalidValue;
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  return launch_kernel(kernel, dim3(blocks), dim3(threads), bytes, stream, pdl, p, stages);
}

template <bool kPow2, int kSets>
cudaError_t launch_both(const FewTokensMoeParams& p, const Device& device, cudaStream_t stream) {
  const int tiles = p.num_tokens * p.top_k * (p.intermediate_size / (kRows / 2));  // at most
  const cudaError_t error = launch<GateUpLayout>(gate_up_kernel<kPow2, kSets>, p, std::min(tiles, device.sms),
                                                 kGateUpThreads + 32, p.pdl, device, stream);
  if (error != cudaSuccess) return error;
  return launch<DownLayout>(down_kernel<kPow2, kSets>, p, p.hidden_size / kRows,
                            32 * kTeams * (DownRows(p.intermediate_size).largest() + 1), true, device, stream);
}

}  // namespace

cudaError_t few_tokens_moe(const FewTokensMoeParams& params, cudaStream_t stream) {
  Device device = {};
  cudaError_t error = this_device(device);
  const int tokens = tokens_of_a_launch(params, device);
  for (int first = 0; error == cudaSuccess && first < params.num_tokens; first += tokens) {
    FewTokensMoeParams p = params;
    const int64_t ids = int64_t{first} * p.top_k;
    p.num_tokens = std::min(params.num_tokens - first, tokens);
    p.x = static_cast<const Bf16*>(p.x) + first * p.x_stride;
    p.out = static_cast<Bf16*>(p.out) + first * p.out_stride;
    p.topk_ids = static_cast<const char*>(p.topk_ids) + ids * (p.ids_are_int64 ? 8 : 4);
    if (p.topk_weights != nullptr) p.topk_weights += ids;
    p.pdl = params.pdl || first > 0;
    if (p.num_tokens > kTileTokens) {
      error = p.ue8m0 ? launch_both<true, 2>(p, device, stream) : launch_both<false, 2>(p, device, stream);
    } else {
      error = p.ue8m0 ? launch_both<true, 1>(p, device, stream) : launch_both<false, 1>(p, device, stream);
    }
  }
  return error;
}

}  // namespace vllm_b200
