#pragma once

#include "../quant/row_source.cuh"
#include "few_tokens_nvfp4.cuh"

namespace vllm_b200 {

constexpr int kGateUpWarps = 8;  // besides the one that fetches
constexpr int kGateUpThreads = 32 * kGateUpWarps;
constexpr int kGateUpRegisters = 128;  // no format needs more
constexpr int kTeamWarps = kGateUpWarps / kTeams, kTeamThreads = 32 * kTeamWarps;

template <Scales kScales>
using GateUpRows = RowChunks<Format<kScales>::kGateUpBlocks, Format<kScales>::kTileBytes>;

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

__device__ __forceinline__ float activate(const FewTokensMoeParams& p, float gate, float up) {
  switch (p.activation) {
    case Activation::kSiluClamped:
      return activate_and_multiply<Activation::kSiluClamped>(gate, up, p.activation_params);
    case Activation::kGelu: return activate_and_multiply<Activation::kGelu>(gate, up, p.activation_params);
    case Activation::kGeluTanh: return activate_and_multiply<Activation::kGeluTanh>(gate, up, p.activation_params);
    default: return silu(gate) * up;
  }
}

// The dynamic shared memory: barriers | assignments | scales of x | maxima of places | partial sums | x | ring.
template <Scales kScales>
struct GateUpLayout {
  using F = Format<kScales>;
  GateUpRows<kScales> rows;
  int assignments, scales, maxima, partials, activations, ring, end;

  __host__ __device__ GateUpLayout(const FewTokensMoeParams& p, int stages) : rows(p.hidden_size / F::kBlock) {
    assignments = Ring::barrier_bytes(stages);
    scales = round_up(assignments + Assignments::bytes(p), 16);
    maxima = scales + 4 * (F::kBlocks ? rows.blocks : 1) * p.num_tokens;
    partials = round_up(maxima + (F::kRowScales ? 4 * p.num_tokens * p.top_k : 0), 16);
    activations = partials + 2 * kGateUpThreads * 16 * (p.num_tokens > kTileTokens ? 2 : 1);
    ring = round_up(activations + p.num_tokens * rows.blocks * F::kXBytes, 128);
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

// The scales of a tile's weights, which a lane asks for a tile ahead.
template <Scales kScales>
struct TileScales {
  struct Value {};
  __device__ TileScales(const FewTokensMoeParams&, const GateUpRows<kScales>&, int) {}
  __device__ __forceinline__ Value load(const FewTokensMoeParams&, int, int) const { return {}; }
};

// Lane 2 i has the gate's scale of the warp's block i, lane 2 i + 1 that of the other half.
template <Scales kScales>
  requires Format<kScales>::kBlocks
struct TileScales<kScales> {
  using Value = float;
  int scale_rows, blocks;
  bool has;
  const float* source;

  __device__ TileScales(const FewTokensMoeParams& p, const GateUpRows<kScales>& rows, int member)
      : blocks(rows.blocks) {
    const int lane = threadIdx.x % 32, block = member + lane / 2 * kTeamWarps;
    scale_rows = p.intermediate_size / kBlockBytes;
    has = block < rows.blocks;
    source = p.w13_scale + (lane % 2 != p.up_first ? scale_rows * rows.blocks : 0) + block;
  }
  __device__ __forceinline__ float load(const FewTokensMoeParams& p, int expert, int column_tile) const {
    if (!has) return 0.0f;
    const int row = 2 * expert * scale_rows + column_tile * (kRows / 2) / kBlockBytes;
    return __ldg(source + int64_t{row} * blocks);
  }
};

// x: of the gate's row that the lane's sums are for; y: of the other half's.
template <Scales kScales>
  requires Format<kScales>::kRowScales
struct TileScales<kScales> {
  using Value = float2;

  __device__ TileScales(const FewTokensMoeParams&, const GateUpRows<kScales>&, int) {}
  __device__ __forceinline__ float2 load(const FewTokensMoeParams& p, int expert, int column_tile) const {
    if (!p.row_scales) {
      const float scale = __ldg(p.w13_scale + expert);
      return make_float2(scale, scale);
    }
    const float* const first = p.w13_scale + 2 * int64_t{expert} * p.intermediate_size +
                               column_tile * (kRows / 2) + threadIdx.x % 32 / 4;
    const float lower = __ldg(first), upper = __ldg(first + p.intermediate_size);
    return p.up_first ? make_float2(upper, lower) : make_float2(lower, upper);
  }
};

// Of both rows.
template <>
struct TileScales<Scales::kNvFp4> {
  using Value = float;

  __device__ TileScales(const FewTokensMoeParams&, const GateUpRows<Scales::kNvFp4>&, int) {}
  __device__ __forceinline__ float load(const FewTokensMoeParams& p, int expert, int) const {
    return nvfp4_factor(p.w13_scale, expert);
  }
};

// x: of the gate's row of a column of `hidden`; y: of the other half's.
__device__ __forceinline__ float2 tile_bias(const FewTokensMoeParams& p, int expert, int column) {
  const Bf16* const bias = static_cast<const Bf16*>(p.w13_bias) + 2 * int64_t{expert} * p.intermediate_size;
  const int lower = p.interleaved ? 2 * column : column, upper = p.interleaved ? lower + 1 : lower + p.intermediate_size;
  const float first = __bfloat162float(bias[lower]), second = __bfloat162float(bias[upper]);
  return p.up_first ? make_float2(second, first) : make_float2(first, second);
}

// A tile is 8 rows of the gate and the 8 of the other half that belong to the same columns, so that a lane holds both
// factors of silu(gate) * up, which it writes to `hidden`, by places (see Entry). kGeneral: other activations, biases
// and rows that take turns.
template <Scales kScales, int kSets, bool kGeneral>
__global__ void __maxnreg__(kGateUpRegisters) gate_up_kernel(const __grid_constant__ FewTokensMoeParams p, int stages) {
  using F = Format<kScales>;
  using Value = typename F::Value;
  constexpr int kBatch = F::kNvFp4 ? 2 : (F::kQuantised ? 2 : 4) * kSets;  // blocks of x that a lane loads at once
  extern __shared__ __align__(128) uint8_t shared[];
  const int lane = threadIdx.x % 32, warp = warp_index(), group = lane / 4, quad = lane % 4;
  const GateUpLayout<kScales> layout(p, stages);
  const GateUpRows<kScales> rows = layout.rows;
  Ring ring = {shared_address(shared + layout.ring), shared_address(shared), stages, rows.stage_bytes()};
  Assignments assignments(shared + layout.assignments, p);
  float* const scales = reinterpret_cast<float*>(shared + layout.scales);
  uint32_t* const x_maxima = reinterpret_cast<uint32_t*>(scales);  // of rows
  uint32_t* const maxima = reinterpret_cast<uint32_t*>(shared + layout.maxima);  // of what goes to places of `hidden`
  if (threadIdx.x == 0) ring.init(kTeamThreads);
  if constexpr (F::kRowScales) {
    for (int i = threadIdx.x; i < p.num_tokens * (1 + p.top_k); i += blockDim.x) x_maxima[i] = 0;  // of both
  }
  assignments.clear(p);
  // x comes to shared memory by pairs of a block and a token.
  const int pairs = rows.blocks * p.num_tokens;
  int pair = warp * 8 + group;
  const Bf16* sources[kBatch];
  Group<kScales> x[kBatch];
  auto find_x = [&] {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int p_i = pair + 8 * kGateUpWarps * i, block = p_i / p.num_tokens;
      sources[i] = static_cast<const Bf16*>(p.x) + (p_i - block * p.num_tokens) * p.x_stride + block * F::kBlock;
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
    WeightStream weights(ring, p.ahead);
    const int pitch = p.hidden_size * sizeof(Value);
    const int64_t half = int64_t{p.intermediate_size} * pitch;
    const bool interleaved = kGeneral && p.interleaved;
    const int64_t lower = interleaved ? pitch : half;
    const int tile_rows = interleaved ? kRows : kRows / 2, row_pitch = interleaved ? 2 * pitch : pitch;
#pragma unroll 1
    for (Cursor at(begin, expert_tiles); at.tile < end; at.advance(expert_tiles)) {
      if constexpr (F::kNvFp4) {
        const int64_t tile = int64_t{assignments[at.entry].expert} * expert_tiles + at.column_tile;
        const uint8_t* const first = static_cast<const uint8_t*>(p.w13) + tile * rows.blocks * F::kTileBytes;
#pragma unroll 1
        for (int chunk = 0; chunk < rows.chunks; ++chunk) {
          weights.fetch(first + chunk * rows.stage_bytes(), rows.blocks_of(chunk) * F::kTileBytes);
        }
        continue;
      }
      const uint8_t* const first = static_cast<const uint8_t*>(p.w13) + 2 * assignments[at.entry].expert * half +
                                   int64_t{at.column_tile} * tile_rows * pitch;
#pragma unroll 1
      for (int chunk = 0; chunk < rows.chunks; ++chunk) {
        weights.fetch(first + (p.up_first ? lower : 0), first + (p.up_first ? 0 : lower),
                      chunk * rows.largest() * kBlockBytes, rows.blocks_of(chunk) * kBlockBytes, row_pitch);
      }
    }
    return;
  }

  const int team = warp / kTeamWarps, member = warp % kTeamWarps;
  // The teams take turns with the tiles, where that gives each its own buffers.
  const int teams = stages % (kTeams * rows.chunks) == 0 ? kTeams : 1;
  const TileScales<kScales> tile_scales(p, rows, member);
  Cursor at(begin + team, expert_tiles);
  auto scale_of = [&](const Cursor& cursor) {
    return cursor.tile < end ? tile_scales.load(p, assignments[cursor.entry].expert, cursor.column_tile)
                             : typename TileScales<kScales>::Value{};
  };
  auto next_scale = scale_of(at);

  // The next pairs, if there are any.
  auto advance_x = [&] {
    pair += 8 * kGateUpWarps * kBatch;
    if (__all_sync(kFullWarp, pair >= pairs)) return false;
    find_x();
    load_x();
    return true;
  };
  if (F::kTokens || (F::kRowScales && p.x_scale == nullptr)) {
    do {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int p_i = pair + 8 * kGateUpWarps * i;
        if constexpr (F::kRowScales) {
          uint32_t bits = p_i < pairs ? x[i].maximum() : 0;
          bits = max(bits, __shfl_xor_sync(kFullWarp, bits, 1));
          bits = max(bits, __shfl_xor_sync(kFullWarp, bits, 2));
          if (quad == 0 && p_i < pairs) atomicMax(x_maxima + (F::kTokens ? p_i % p.num_tokens : 0), bits);
        }
      }
    } while (advance_x());
    pair = warp * 8 + group;
    if (pairs > 8 * kGateUpWarps * kBatch) {
      find_x();
      load_x();
    }
    sync_threads(1, kGateUpThreads);
  }
  do {
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int p_i = pair + 8 * kGateUpWarps * i, token = p_i % p.num_tokens;
      uint8_t* const destination = shared + layout.activations + p_i * F::kXBytes;
      if constexpr (F::kBlocks) {
        const float s = x[i].quantize(destination, token, p_i < pairs);
        if (quad == 0 && p_i < pairs) scales[p_i] = s;
      } else if (p_i < pairs) {
        if constexpr (F::kRowScales) {
          x[i].quantize(destination, token, x_maxima[F::kTokens ? token : 0], p.x_scale);
        } else {
          x[i].store(destination, token);
        }
      }
    }
  } while (advance_x());
  sync_threads(1, kGateUpThreads);
  if (team >= teams) return;

  // Columns without a token take another's: nobody reads their sums.
  const int last = p.num_tokens - 1;
  uint32_t column_of[kSets];
  const float* column_scales[kSets][2];  // of blocks
  float row_scales[kSets][2] = {};       // of rows
#pragma unroll
  for (int set = 0; set < kSets; ++set) {
    const int token = min(8 * set + group, last);
    column_of[set] = shared_address(shared + layout.activations) + (member * p.num_tokens + token) * F::kXBytes +
                     shared_half(token, 0) + quad * 16;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int column = min(8 * set + 2 * quad + i, last);
      column_scales[set][i] = scales + member * p.num_tokens + column;
      if constexpr (F::kRowScales) row_scales[set][i] = x[0].scale_of(x_maxima[F::kTokens ? column : 0], p.x_scale);
    }
  }
  auto other_half = [&](int set) {
    const int token = min(8 * set + group, last);
    return shared_half(token, 1) - shared_half(token, 0);
  };
  float4* const partials =
      reinterpret_cast<float4*>(shared + layout.partials) + team * 2 * kSets * kTeamThreads + lane;
  ring.advance(team * rows.chunks);

#pragma unroll 1
  for (int turn = 0; at.tile < end; ++turn) {
    const Cursor current = at;
    const auto scale = next_scale;
    for (int i = 0; i < teams; ++i) at.advance(expert_tiles);
    next_scale = scale_of(at);
    Sum<Value> sum[kSets][4] = {}, other[kSets][4] = {};
    int mine = 0;  // of the warp's blocks
    float2 bias = {};
    if constexpr (kGeneral) {
      // Asked for before the weights are waited for.
      if (p.w13_bias != nullptr && member == turn % kTeamWarps) {
        bias = tile_bias(p, assignments[current.entry].expert, current.column_tile * (kRows / 2) + group);
      }
    }
#pragma unroll 1
    for (int chunk = 0; chunk < rows.chunks; ++chunk) {
      const int blocks = rows.blocks_of(chunk), pitch = blocks * kBlockBytes;
      const uint32_t weights = ring.wait();
#pragma unroll kSets == 1 ? 2 : 1
      for (int block = member; block < blocks; block += kTeamWarps, ++mine) {
        WeightBlock<Value> w;
        w.load(weights + block * WeightBlock<Value>::kStep + WeightBlock<Value>::lane_offset(pitch), pitch);
        const int offset = mine * kTeamWarps * p.num_tokens;
        float gate_scale, up_scale;
        if constexpr (F::kBlocks) {
          gate_scale = __shfl_sync(kFullWarp, scale, 2 * mine);
          up_scale = __shfl_sync(kFullWarp, scale, 2 * mine + 1);
        }
#pragma unroll
        for (int set = 0; set < kSets; ++set) {
          const uint32_t address = column_of[set] + offset * F::kXBytes;
          uint4 column[F::kXLoads];
#pragma unroll
          for (int i = 0; i < F::kXLoads; i += 2) {
            column[i] = load_shared(address + i * (kBlockBytes / 2));
            column[i + 1] = load_shared(address + i * (kBlockBytes / 2) + other_half(set));
          }
          if constexpr (F::kBlocks) {
            const float x0 = column_scales[set][0][offset], x1 = column_scales[set][1][offset];
            float product[4];
            w.multiply(product, column);
            sum[set][0] += product[0] * (x0 * gate_scale);
            sum[set][1] += product[1] * (x1 * gate_scale);
            sum[set][2] += product[2] * (x0 * up_scale);
            sum[set][3] += product[3] * (x1 * up_scale);
          } else {
            w.add_product(sum[set], other[set], column);
          }
        }
      }
      ring.release();
      if (chunk + 1 < rows.chunks) ring.advance();
    }
    float4* const tile_partials = partials + turn % 2 * kSets * kTeamThreads;
#pragma unroll
    for (int set = 0; set < kSets; ++set) {
      if constexpr (!F::kBlocks) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[set][i] += other[set][i];
      }
      tile_partials[set * kTeamThreads + 32 * member] =
          make_float4(sum[set][0], sum[set][1], sum[set][2], sum[set][3]);
    }
    sync_threads(1 + team, kTeamThreads);
    // The members take turns to add up; the others go on with the next tile.
    if (member == turn % kTeamWarps) {
      const Entry entry = assignments[current.entry];
      const int hidden_column =
          F::kNvFp4 ? nvfp4_hidden_column(current.column_tile, group) : current.column_tile * (kRows / 2) + group;
      Bf16* const hidden = static_cast<Bf16*>(p.hidden) + hidden_column;
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
          float gate = i == 0 ? total.x : total.y, up = i == 0 ? total.z : total.w;
          if constexpr (F::kRowScales) {
            gate = gate * row_scales[set][i] * scale.x;
            up = up * row_scales[set][i] * scale.y;
          } else if constexpr (F::kNvFp4) {
            gate *= scale, up *= scale;
          }
          const int place = entry.place(token);
          float product;
          if constexpr (kGeneral) {
            product = activate(p, rounded(gate + bias.x), rounded(up + bias.y));
          } else {
            product = silu(rounded(gate)) * rounded(up);
          }
          const Bf16 value = __float2bfloat16_rn(product);
          if constexpr (F::kRowScales) {
            const uint32_t bits = __bfloat16_as_ushort(value) & 0x7fff;
            // The scale of a tensor leaves NaN out.
            if (F::kTokens || bits <= 0x7f80) atomicMax(maxima + place, bits);
          }
          hidden[int64_t{place} * p.intermediate_size] = value;
        }
      }
    }
    ring.advance(1 + (teams - 1) * rows.chunks);
  }

  if constexpr (F::kRowScales) {
    if (!F::kTokens && p.maxima == nullptr) return;
    // Each tile gets the maxima of all of the block's tiles.
    sync_threads(1 + kTeams, teams * kTeamThreads);
    for (int tile = begin + threadIdx.x; tile < end; tile += teams * kTeamThreads) {
      const Cursor cursor(tile, expert_tiles);
      const Entry entry = assignments[cursor.entry];
      uint16_t* const column = static_cast<uint16_t*>(p.maxima) + cursor.column_tile;
      for (int place = entry.first; place < entry.end(); ++place) column[place * expert_tiles] = maxima[place];
    }
  }
}

}  // namespace vllm_b200
