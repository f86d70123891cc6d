#pragma once

#include "few_tokens.cuh"

namespace vllm_b200 {

using DownRows = RowChunks<8>;  // each block of a chunk has a warp

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

// A block owns 16 columns of the output. One team takes the experts of even numbers, the other those of odd ones, in
// their order, so that a row's sum runs in one order whatever else is in the batch. It starts where blocks of
// gate_up_kernel have ended, and fetches its first weights.
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

}  // namespace vllm_b200
