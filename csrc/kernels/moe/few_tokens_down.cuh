#pragma once

#include "few_tokens_nvfp4.cuh"

namespace vllm_b200 {

// Of a thread, for the 18 warps that rows of w2 of 1024 and more bytes take.
constexpr int kDownRegisters = 96;

// How a block works: kTeamsOfBlock teams, in which each warp has kWarpBlocks blocks of a chunk. With one team of 8 warps,
// two blocks share a multiprocessor, and pieces of rows have 2048 bytes.
template <Scales kScales, bool kOneTeam>
struct DownForm {
  static constexpr int kTeamsOfBlock = kOneTeam ? 1 : kTeams;
  static constexpr int kWarpBlocks = kOneTeam || kScales == Scales::kNone ? 2 : 1;
};

template <Scales kScales, bool kOneTeam>
struct DownRows : RowChunks<8 * DownForm<kScales, kOneTeam>::kWarpBlocks, Format<kScales>::kTileBytes> {
  static constexpr int kWarpBlocks = DownForm<kScales, kOneTeam>::kWarpBlocks;

  __host__ __device__ explicit DownRows(int columns)
      : RowChunks<8 * kWarpBlocks, Format<kScales>::kTileBytes>(columns / Format<kScales>::kBlock) {}
  __host__ __device__ int team_warps() const { return (this->largest() + kWarpBlocks - 1) / kWarpBlocks; }
};

// The dynamic shared memory: barriers of both teams | assignments | scales of w2 | scales and quantised activations of
// each warp, of the last places | rings of both teams. The sums of the warps come to where the activations were.
template <Scales kScales, bool kOneTeam>
struct DownLayout : DownForm<kScales, kOneTeam> {
  using F = Format<kScales>;
  using DownForm<kScales, kOneTeam>::kTeamsOfBlock;
  using DownForm<kScales, kOneTeam>::kWarpBlocks;
  DownRows<kScales, kOneTeam> rows;
  int assignments, w_scales, x_scales, maxima, activations, ring, end;

  // Places that a warp keeps: those of an entry, and what is quantised along with them.
  static __host__ __device__ constexpr int slots(int sets) { return 16 * sets; }

  __host__ __device__ DownLayout(const FewTokensMoeParams& p, int stages) : rows(p.intermediate_size) {
    const int count = p.num_tokens * p.top_k, warps = kTeamsOfBlock * rows.team_warps();
    const int sets = p.num_tokens > kTileTokens ? 2 : 1, entries = p.num_experts < count ? p.num_experts : count;
    const int places = F::kQuantised ? kWarpBlocks * slots(sets) * warps : 0;
    assignments = kTeamsOfBlock * Ring::barrier_bytes(stages);
    w_scales = round_up(assignments + Assignments::bytes(p), 16);
    x_scales = w_scales + 4 * entries * (F::kBlocks ? rows.largest() : F::kRowScales ? kRows : 0);
    maxima = x_scales + 4 * places;
    activations = round_up(maxima + (F::kRowScales ? 4 * (count + kTeams) : 0), 16);
    ring = round_up(activations + (F::kQuantised ? kBlockBytes * places : 512 * sets * warps), 128);
    end = ring + kTeamsOfBlock * stages * rows.stage_bytes();
  }
};

// The largest of a row of gate_up_kernel's maxima, in bf16, which `lanes`, four or all, share. The whole warp calls it.
__device__ __forceinline__ uint32_t largest_of(const FewTokensMoeParams& p, int place, bool valid, int lanes) {
  const int words = p.intermediate_size / (kRows / 2) / 8;
  const uint4* const row = static_cast<const uint4*>(p.maxima) + place * words;
  uint32_t two = 0;
  if (valid) {
#pragma unroll 4
    for (int i = threadIdx.x % lanes; i < words; i += lanes) {
      const uint4 eight = row[i];
      two = __vmaxu2(two, __vmaxu2(__vmaxu2(eight.x, eight.y), __vmaxu2(eight.z, eight.w)));
    }
  }
  for (int distance = 1; distance < lanes; distance *= 2) {
    two = __vmaxu2(two, __shfl_xor_sync(kFullWarp, two, distance));
  }
  return max(two >> 16, two & 0xffff);
}

// A block owns 16 columns of the output. One team takes the experts of even numbers, the other those of odd ones, or
// the only one all of them, in their order, so that a row's sum runs in one order whatever else is in the batch. It
// starts where blocks of gate_up_kernel have ended, and fetches its first weights.
template <Scales kScales, int kSets, bool kOneTeam>
__global__ void __maxnreg__(kDownRegisters) down_kernel(const __grid_constant__ FewTokensMoeParams p, int stages) {
  using F = Format<kScales>;
  using Value = typename F::Value;
  using Layout = DownLayout<kScales, kOneTeam>;
  constexpr int kSlots = Layout::slots(kSets), kWarpBlocks = Layout::kWarpBlocks, kTeamsOfBlock = Layout::kTeamsOfBlock;
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = warp_index(), group = lane / 4, quad = lane % 4;
  const Layout layout(p, stages);
  const DownRows<kScales, kOneTeam> rows = layout.rows;
  // After the warps that multiply comes one for each team that fetches.
  const int team_warps = rows.team_warps(), warps = kTeamsOfBlock * team_warps, threads = 32 * warps;
  const int team = warp < warps ? warp / team_warps : warp - warps, member = warp - team * team_warps;
  Ring ring = {shared_address(shared + layout.ring) + team * stages * rows.stage_bytes(),
               shared_address(shared) + team * Ring::barrier_bytes(stages), stages, rows.stage_bytes()};
  Assignments assignments(shared + layout.assignments, p);
  float* const w_scales = reinterpret_cast<float*>(shared + layout.w_scales);
  uint32_t* const maxima = reinterpret_cast<uint32_t*>(shared + layout.maxima);  // of both teams, then of places
  if (warp >= warps && lane == 0) ring.init(32 * team_warps);
  if (F::kRowScales && threadIdx.x < kTeams) maxima[threadIdx.x] = 0;
  assignments.clear(p);
  __syncthreads();

  // Before the wait. The only kernel that may still run is gate_up_kernel, which writes neither ids nor weights, and
  // whose blocks let this one start after they had waited for all kernels before: what those wrote is here.
  assignments.collect<true>(p);
  const int row = blockIdx.x * kRows;
  const int begin = team == 0 ? 0 : assignments.even();
  const int end = team == 0 && !kOneTeam ? assignments.even() : assignments.size();

  if (warp >= warps) {
    if (!elect_lane()) return;
    WeightStream weights(ring, p.ahead);
    const int pitch = p.intermediate_size * sizeof(Value);
#pragma unroll 1
    for (int chunk = 0; chunk < rows.chunks; ++chunk) {
#pragma unroll 1
      for (int i = begin; i < end; ++i) {
        if constexpr (F::kNvFp4) {
          const int64_t tile = int64_t{assignments[i].expert} * gridDim.x + blockIdx.x;
          weights.fetch(static_cast<const uint8_t*>(p.w2) + tile * rows.blocks * F::kTileBytes +
                            chunk * rows.stage_bytes(),
                        rows.blocks_of(chunk) * F::kTileBytes);
          continue;
        }
        const uint8_t* const first =
            static_cast<const uint8_t*>(p.w2) + (int64_t{assignments[i].expert} * p.hidden_size + row) * pitch;
        weights.fetch(first, first + int64_t{kRows / 2} * pitch, chunk * rows.largest() * kBlockBytes,
                      rows.blocks_of(chunk) * kBlockBytes, pitch);
      }
    }
    return;
  }

  const int places = end > begin ? assignments[end - 1].end() : 0;
  const bool given = !F::kTokens && p.hidden_scale != nullptr;  // the scale of hidden activations
  float sum[kSets][4] = {};
  if (!F::kNvFp4 && p.w2_bias != nullptr) {
    // An expert's is always the same warp's, so that here, too, a row's sum runs in one order.
#pragma unroll 1
    for (int at = begin; at < end; ++at) {
      const Entry entry = assignments[at];
      if (entry.expert / kTeams % team_warps != member) continue;
      const Bf16* const bias = static_cast<const Bf16*>(p.w2_bias) + int64_t{entry.expert} * p.hidden_size + row + group;
      const float upper = __bfloat162float(bias[0]), lower = __bfloat162float(bias[kRows / 2]);
#pragma unroll
      for (int set = 0; set < kSets; ++set) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int token = 8 * set + 2 * quad + i;
          if (!entry.has(token)) continue;
          const float weight = assignments.weight(entry.place(token));
          sum[set][i] += weight * upper;
          sum[set][i + 2] += weight * lower;
        }
      }
    }
  }
  if constexpr (F::kQuantised) {
    float* const x_scales = reinterpret_cast<float*>(shared + layout.x_scales) + warp * kWarpBlocks * kSlots;
    uint8_t* const quantised = shared + layout.activations + warp * kWarpBlocks * kSlots * kBlockBytes;
    const uint32_t columns = shared_address(quantised) + quad * 16;
#pragma unroll 1
    for (int chunk = 0; chunk < rows.chunks; ++chunk) {
      const int blocks = rows.blocks_of(chunk), pitch = blocks * kBlockBytes;
      const auto has_block = [&](int i) { return i * team_warps + member < blocks; };
      const uint32_t own_weights = member * kBlockBytes + WeightBlock<Value>::lane_offset(pitch);
      if (chunk == 0) {
        if constexpr (F::kRowScales) {
          for (int i = begin * kRows + 32 * member + lane; i < end * kRows; i += 32 * team_warps) {
            const int64_t expert = assignments[i / kRows].expert;
            w_scales[i] = __ldg(p.w2_scale + (p.row_scales ? expert * p.hidden_size + row + i % kRows : expert));
          }
        }
        pdl_wait();
        pdl_trigger();
      }
      Group<kScales> x[kWarpBlocks];
      const int first_block = chunk * rows.largest() + member;
      const Bf16* source = static_cast<const Bf16*>(p.hidden) + first_block * F::kBlock;
      auto load_places = [&](int first) {
        if (first + group >= places) return;
        const Bf16* const own = source + int64_t{first + group} * p.intermediate_size;
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
          if (has_block(i)) x[i].load(own + i * team_warps * F::kBlock);
        }
      };
      int ready = begin < end ? assignments[begin].first : 0;  // places up to here are quantised
      load_places(ready);
      if constexpr (F::kBlocks) {
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
          if (!has_block(i)) continue;
          for (int at = begin + lane; at < end; at += 32) {
            const int64_t scale_row = int64_t{assignments[at].expert} * (p.hidden_size / F::kBlock) + row / F::kBlock;
            w_scales[at * rows.largest() + i * team_warps + member] =
                __ldg(p.w2_scale + scale_row * rows.blocks + first_block + i * team_warps);
          }
        }
      } else if (chunk == 0) {
        if (!given) {
          // The maximum of all tokens is over both teams' places.
          const int first = F::kTokens ? ready : 0;
          const int last = F::kTokens || assignments.size() == 0 ? places : assignments[assignments.size() - 1].end();
          const int lanes = last - first <= team_warps ? 32 : 4, places_at_once = 32 / lanes;
          for (int i = first + places_at_once * member; i < last; i += places_at_once * team_warps) {
            const int place = i + lane / lanes;
            const uint32_t bits = largest_of(p, place, place < last, lanes) << 16;
            if (lane % lanes == 0 && place < last) {
              if (F::kTokens) {
                maxima[kTeams + place] = bits;
              } else {
                atomicMax(maxima + team, bits);
              }
            }
          }
        }
        sync_threads(2 + team, 32 * team_warps);
      }
      __syncwarp();
#pragma unroll 1
      for (int at = begin; at < end; ++at) {
        const Entry entry = assignments[at];
        while (ready < entry.end()) {
          const int place = ready + group;
#pragma unroll
          for (int i = 0; i < kWarpBlocks; ++i) {
            uint8_t* const destination = quantised + (i * kSlots + place % kSlots) * kBlockBytes;
            float s = 0.0f;
            if constexpr (F::kBlocks) {
              s = x[i].quantize(destination, place, place < places);
            } else if (place < places) {
              const uint32_t largest = maxima[F::kTokens ? kTeams + place : team];
              s = x[i].scale_of(largest, p.hidden_scale);
              x[i].quantize(destination, place, largest, p.hidden_scale);
            }
            if (quad == 0 && place < places) x_scales[i * kSlots + place % kSlots] = s * assignments.weight(place);
          }
          ready += 8;
          load_places(ready);
          __syncwarp();
        }
        const uint32_t buffer = ring.wait();
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
          if (!has_block(i)) continue;
          WeightBlock<Value> w;
          w.load(buffer + own_weights + i * team_warps * kBlockBytes, pitch);
          const float upper_scale =
              F::kBlocks ? w_scales[at * rows.largest() + i * team_warps + member] : w_scales[at * kRows + group];
          const float lower_scale = F::kBlocks ? upper_scale : w_scales[at * kRows + kRows / 2 + group];
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            if (kSets > 1 && (entry.tokens >> 8 * set & 0xff) == 0) continue;
            // A column without a token takes another's activations: nobody reads its sums.
            const int token = 8 * set + group, place = entry.has(token) ? entry.place(token) : entry.first;
            const int slot = i * kSlots + place % kSlots;
            const uint32_t address = columns + slot * kBlockBytes;
            const uint4 column[2] = {load_shared(address + shared_half(place, 0)),
                                     load_shared(address + shared_half(place, 1))};
            const float scale = F::kBlocks ? x_scales[slot] * upper_scale : x_scales[slot];
            const float x0 = __shfl_sync(kFullWarp, scale, 8 * quad), x1 = __shfl_sync(kFullWarp, scale, 8 * quad + 4);
            float product[4];
            w.multiply(product, column);
            if constexpr (F::kRowScales) {
              product[0] *= upper_scale, product[1] *= upper_scale;
              product[2] *= lower_scale, product[3] *= lower_scale;
            }
            if (entry.has(8 * set + 2 * quad)) sum[set][0] += product[0] * x0, sum[set][2] += product[2] * x0;
            if (entry.has(8 * set + 2 * quad + 1)) sum[set][1] += product[1] * x1, sum[set][3] += product[3] * x1;
          }
        }
        ring.release();
        ring.advance();
        __syncwarp();  // before others' activations come to the same places
      }
    }
  } else {
    pdl_wait();
    pdl_trigger();
#pragma unroll 1
    for (int chunk = 0; chunk < rows.chunks; ++chunk) {
      const int blocks = rows.blocks_of(chunk), pitch = blocks * kBlockBytes;
      const uint32_t own_weights = member * WeightBlock<Value>::kStep + WeightBlock<Value>::lane_offset(pitch);
      const uint4* const source = reinterpret_cast<const uint4*>(
          static_cast<const Bf16*>(p.hidden) + (chunk * rows.largest() + member) * F::kBlock) + quad;
      // The activations of an entry, which go from memory to where the product takes them.
      uint4 x[kSets][kWarpBlocks][F::kXLoads] = {};
      float factor = 1.0f;
      auto load_x = [&](const Entry& entry) {
        if constexpr (F::kNvFp4) factor = nvfp4_factor(p.w2_scale, entry.expert);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          if (kSets > 1 && (entry.tokens >> 8 * set & 0xff) == 0) continue;
          // A column without a token takes another's activations: nobody reads its sums.
          const int token = 8 * set + group, place = entry.has(token) ? entry.place(token) : entry.first;
          const uint4* const own = source + int64_t{place} * (p.intermediate_size / 8);
#pragma unroll
          for (int i = 0; i < kWarpBlocks; ++i) {
            if (i * team_warps + member >= blocks) continue;
#pragma unroll
            for (int j = 0; j < F::kXLoads; ++j) x[set][i][j] = own[i * team_warps * (F::kXBytes / 16) + 4 * j];
          }
        }
      };
      if (begin < end) load_x(assignments[begin]);
#pragma unroll 1
      for (int at = begin; at < end; ++at) {
        const Entry entry = assignments[at];
        const float own_factor = factor;
        const uint32_t buffer = ring.wait();
        float product[kSets][4] = {}, other[kSets][4] = {};
#pragma unroll
        for (int i = 0; i < kWarpBlocks; ++i) {
          if (i * team_warps + member >= blocks) continue;
          WeightBlock<Value> w;
          w.load(buffer + own_weights + i * team_warps * WeightBlock<Value>::kStep, pitch);
#pragma unroll
          for (int set = 0; set < kSets; ++set) {
            if (kSets > 1 && (entry.tokens >> 8 * set & 0xff) == 0) continue;
            w.add_product(product[set], other[set], x[set][i]);
          }
        }
        ring.release();
        ring.advance();
        if (at + 1 < end) load_x(assignments[at + 1]);
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            const int token = 8 * set + 2 * quad + i;
            if (!entry.has(token)) continue;
            const float weight = assignments.weight(entry.place(token)) * own_factor;
            sum[set][i] += (product[set][i] + other[set][i]) * weight;
            sum[set][i + 2] += (product[set][i + 2] + other[set][i + 2]) * weight;
          }
        }
      }
    }
  }

  sync_threads(1, threads);
  float4* const partials = reinterpret_cast<float4*>(shared + layout.activations) + lane;
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
