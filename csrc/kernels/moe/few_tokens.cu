#include "few_tokens.h"

#include <algorithm>

#include "../common/bulk_copy.cuh"
#include "../common/launch.cuh"
#include "../quant/quantizers.cuh"
#include "routing.cuh"

// Two kernels, each a set of independent warps. A warp's unit of work is a tile
// of 16 rows of one expert's weights times up to 8 tokens of that expert: the
// weights are the mma's A operand, the tokens the 8 columns of B, quantised in
// registers. The weights come through the warp's own ring in shared memory, so
// that warps never wait for each other, in pieces of up to 1 KiB of a row:
// shorter ones do not reach the memory's bandwidth. The warp fetches ahead
// across tiles.
//
// Within a 64-byte half of a block the k index is permuted alike in A and B, so
// that a lane's 16 contiguous bytes feed two mma.m16n8k32.
//
// gate_up_kernel: a tile is 8 rows of the gate and the 8 of the other half that
// belong to the same columns, so that a lane holds both factors of
// silu(gate) * up. It writes them to `hidden`.
//
// down_kernel: a block owns 16 columns of the output and takes all experts;
// each (assignment, part of K) gets its own sums in shared memory, so that the
// sum over a token's experts runs in the order of its slots whatever else is in
// the batch. It starts while gate_up_kernel runs and fetches its first weights.

namespace vllm_b200 {
namespace {

constexpr int kRows = 16;
constexpr int kBlock = 128;  // columns that share a scale
constexpr int kPair = 2;     // blocks that are multiplied together
constexpr int kRowPadding = 64;  // bytes; eight rows' 16-byte loads then hit all banks
constexpr int kMaxWarps = 16;
constexpr float kEps = 1e-10f;

using Fp8 = __nv_fp8_e4m3;
using Bf16 = __nv_bfloat16;

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__host__ __device__ constexpr int stage_bytes(const StreamConfig& config) {
  return kRows * (config.chunk * kBlock + kRowPadding);
}

// What is still to be fetched of a tile: 8 rows from `upper` and 8 from `lower` on. No blocks: there is no tile left.
struct Rows {
  const uint8_t *upper = nullptr, *lower = nullptr;
  int blocks = 0;
};

// A warp's ring. Slots are filled and emptied in turn, each refilled right after it is emptied.
struct Ring {
  uint32_t data, barriers;  // shared memory
  int stride, chunk, stages;
  int64_t pitch;  // of the weights, in bytes
  int slot = 0;
  uint32_t parity = 0;
  uint64_t policy = evict_first_policy();
  Rows rows;

  __device__ Ring(uint32_t data, uint32_t barriers, const StreamConfig& config, int64_t pitch)
      : data(data + threadIdx.x / 32 * config.stages * stage_bytes(config)),
        barriers(barriers + threadIdx.x / 32 * config.stages * 8),
        stride(config.chunk * kBlock + kRowPadding),
        chunk(config.chunk),
        stages(config.stages),
        pitch(pitch) {
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < stages; ++i) barrier_init(this->barriers + 8 * i, 1);
      barrier_init_fence();
    }
    __syncwarp();
  }
  // The next chunk into a slot; next_rows() gives the next tile.
  template <typename NextRows>
  __device__ __forceinline__ void fetch(int slot, NextRows&& next_rows) {
    if (rows.blocks == 0) rows = next_rows();
    if (rows.blocks == 0) return;
    const int blocks = min(rows.blocks, chunk), bytes = blocks * kBlock;
    if (elect_lane()) {
      const uint32_t barrier = barriers + 8 * slot, destination = data + slot * kRows * stride;
      barrier_expect(barrier, kRows * bytes);
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) {
        bulk_copy(destination + i * stride, rows.upper + i * pitch, bytes, barrier, policy);
        bulk_copy(destination + (i + kRows / 2) * stride, rows.lower + i * pitch, bytes, barrier, policy);
      }
    }
    rows.blocks -= blocks;
    rows.upper += bytes, rows.lower += bytes;
  }
  template <typename NextRows>
  __device__ __forceinline__ void fill(NextRows&& next_rows) {
    for (int i = 0; i < stages; ++i) fetch(i, next_rows);
  }
  // The address of the oldest chunk, once it is here.
  __device__ __forceinline__ uint32_t wait() const {
    barrier_wait(barriers + 8 * slot, parity);
    return data + slot * kRows * stride;
  }
  // After the last read of the oldest chunk.
  template <typename NextRows>
  __device__ __forceinline__ void refill(NextRows&& next_rows) {
    __syncwarp();
    fetch(slot, next_rows);
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// What a warp needs of a tile besides its weights. Loaded one tile ahead.
struct Tile {
  int first = 0, count = 0;  // of the entry
  int log_rows = 0;          // 8 columns of B hold 1 << log_rows tokens
  int blocks = 0;
  int column = 0, part = 0;
  const Bf16* row = nullptr;  // of activations: the calling lane's, at its columns of the first block; null: none
  float upper[2], lower[2];   // scales of the weights: lane i's are those of blocks i and 32 + i

  __device__ __forceinline__ void load_scales(const float* upper_source, const float* lower_source) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const bool exists = 32 * i + lane < blocks;
      upper[i] = exists ? __ldg(upper_source + 32 * i + lane) : 0.0f;
      lower[i] = exists ? __ldg(lower_source + 32 * i + lane) : 0.0f;
    }
  }
  __device__ __forceinline__ void set_entry(const Entry& entry) {
    first = entry.first, count = entry.count;
    log_rows = count <= 1 ? 0 : 32 - __clz(count - 1);
  }
  // Which token of the entry the calling lane quantises; none where that is not below count.
  __device__ __forceinline__ int lane_token() const { return threadIdx.x % 32 / 4 & ((1 << log_rows) - 1); }
};

// The B operand: blocks of 128 columns of up to 8 rows, quantised. Four lanes hold a block of a row, 32 elements each.
// Fewer than 8 rows leave lanes over, which take the blocks that follow, so that a round quantises
// 8 >> log_rows blocks.
template <bool kPow2>
struct Activations {
  Chunk<Bf16> low, high;  // of the next round
  uint32_t q[8];          // of this round
  float scale;

  __device__ __forceinline__ void load(const Tile& tile, int first_block) {
    const int block = first_block + (threadIdx.x % 32 / 4 >> tile.log_rows);
    low = high = {};
    if (tile.row != nullptr && block < tile.blocks) {
      load_chunk<Bf16, true>(low, tile.row + block * kBlock);
      load_chunk<Bf16, true>(high, tile.row + block * kBlock + kBlock / 2);
    }
  }
  __device__ __forceinline__ void quantize() {
    using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, Divisor>;
    // Four lanes hold a group as they would one of 64 elements.
    scale = group_scale<Fp8, 4 * kChunk, kPow2>(max(absmax_bits(low), absmax_bits(high)), kEps);
    const Divide divide(scale);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Chunk<Bf16>& chunk = i < 4 ? low : high;
      const float2 a = unpack_pair(chunk, 2 * (i % 4)), b = unpack_pair(chunk, 2 * (i % 4) + 1);
      q[i] = pack_bytes(static_cast<Fp8*>(nullptr), divide(a.x), divide(a.y), divide(b.x), divide(b.y));
    }
  }
};

// acc = tile's weights * its activations. acc[0], acc[1]: row lane / 4, columns lane % 4 * 2 and the one after;
// acc[2], acc[3]: 8 rows further. Leaves the first round of the next tile's activations under way.
template <int kLogRows, bool kPow2, typename NextRows>
__device__ __forceinline__ void multiply(float (&acc)[4], Ring& ring, NextRows&& next_rows, Activations<kPow2>& x,
                                         const Tile& tile, const Tile& next) {
  constexpr int kTokens = 1 << kLogRows, kRound = kTileTokens >> kLogRows;
  const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int source = group % kTokens * 4 + quad;
  const int column0 = 2 * quad % kTokens * 4, column1 = (2 * quad + 1) % kTokens * 4;
  auto start_round = [&](int block) {
    x.quantize();
    if (block + kRound < tile.blocks) {
      x.load(tile, block + kRound);
    } else {
      x.load(next, 0);
    }
  };
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = 0.0f;
  int chunk_end = 0;
  uint32_t weights = 0;
  for (int block = 0; block < tile.blocks; block += kPair) {
    if (block % kRound == 0) start_round(block);
    if (block == chunk_end) {
      weights = ring.wait() + group * ring.stride + quad * 16;
      chunk_end = min(block + ring.chunk, tile.blocks);
    }
    uint4 upper[kPair][2], lower[kPair][2];
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      if (i > 0 && block + i >= tile.blocks) break;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        upper[i][half] = load_shared(weights + i * kBlock + half * 64);
        lower[i][half] = load_shared(weights + i * kBlock + half * 64 + kRows / 2 * ring.stride);
      }
    }
    weights += kPair * kBlock;
    if (block + kPair >= chunk_end) ring.refill(next_rows);
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      if (i > 0 && block + i >= tile.blocks) break;
      if (i > 0 && kRound == 1) start_round(block + i);
      const int shift = (block + i) % kRound * kTokens * 4;
      uint32_t b[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) b[j] = __shfl_sync(kFullWarp, x.q[j], source + shift);
      const float x0 = __shfl_sync(kFullWarp, x.scale, column0 + shift);
      const float x1 = __shfl_sync(kFullWarp, x.scale, column1 + shift);
      const float w0 = __shfl_sync(kFullWarp, block < 32 ? tile.upper[0] : tile.upper[1], (block + i) % 32);
      const float w1 = __shfl_sync(kFullWarp, block < 32 ? tile.lower[0] : tile.lower[1], (block + i) % 32);
      float sum[2][4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 a = upper[i][half], c = lower[i][half];
        mma(sum[half], a.x, c.x, a.y, c.y, b[4 * half], b[4 * half + 1]);
        mma(sum[half], a.z, c.z, a.w, c.w, b[4 * half + 2], b[4 * half + 3]);
      }
      acc[0] += (sum[0][0] + sum[1][0]) * (x0 * w0);
      acc[1] += (sum[0][1] + sum[1][1]) * (x1 * w0);
      acc[2] += (sum[0][2] + sum[1][2]) * (x0 * w1);
      acc[3] += (sum[0][3] + sum[1][3]) * (x1 * w1);
    }
  }
}

// `tile` and those after it. next_rows() and next_tile() give a warp's tiles in the same order, finish(tile, acc) takes
// the result. The first chunks are under way.
template <bool kPow2, bool kOneToken, typename NextRows, typename NextTile, typename Finish>
__device__ __forceinline__ void multiply_all(Tile tile, Ring& ring, NextRows&& next_rows, NextTile&& next_tile,
                                             Finish&& finish) {
  Activations<kPow2> x;
  x.load(tile, 0);
  while (tile.blocks > 0) {
    const Tile next = next_tile();
    float acc[4];
    switch (kOneToken ? 0 : tile.log_rows) {
      case 0: multiply<0>(acc, ring, next_rows, x, tile, next); break;
      case 1: multiply<1>(acc, ring, next_rows, x, tile, next); break;
      case 2: multiply<2>(acc, ring, next_rows, x, tile, next); break;
      default: multiply<3>(acc, ring, next_rows, x, tile, next); break;
    }
    finish(tile, acc);
    tile = next;
  }
}

// What both kernels know of the batch. One token needs no sorting: its slots are the entries, lane i holds the expert
// of slot i.
template <bool kOneToken>
struct Batch {
  Routing& routing;
  int num_entries;
  int expert = -1;

  __device__ Batch(Routing& routing, const FewTokensMoeParams& p) : routing(routing) {
    if constexpr (kOneToken) {
      const int lane = threadIdx.x % 32;
      if (lane < p.top_k) expert = local_expert(p, lane);
      num_entries = p.top_k;
    } else {
      sort_assignments(routing, p);
      num_entries = routing.num_entries;
    }
  }
  __device__ __forceinline__ bool is_here(int assignment) const {
    if constexpr (kOneToken) return expert >= 0;  // asked by thread `assignment`
    return routing.assigned[assignment] != Routing::kNobody;
  }
  // The whole warp asks.
  __device__ __forceinline__ Entry entry(int index) const {
    if constexpr (kOneToken) return {__shfl_sync(kFullWarp, expert, index), index, 1};
    return routing.entry(index);
  }
  __device__ __forceinline__ int assignment(int first, int column) const {
    if constexpr (kOneToken) return first;
    return routing.order[first + column];
  }
};

// The dynamic shared memory: barriers | Routing, for several tokens | weights | sums | rings.
struct Layout {
  int routing, weights, sums, rings, end;

  __host__ __device__ Layout(const StreamConfig& config, int num_tokens, int num_assignments, int num_sums) {
    routing = round_up(8 * config.warps * config.stages);
    weights = routing + (num_tokens > 1 ? sizeof(Routing) : 0);
    sums = weights + round_up(4 * num_assignments);
    rings = sums + round_up(4 * num_sums);
    end = rings + config.warps * config.stages * stage_bytes(config);
  }
  __host__ __device__ static constexpr int round_up(int bytes) { return (bytes + 15) / 16 * 16; }
};

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
__device__ __forceinline__ float rounded(float x) { return __bfloat162float(__float2bfloat16_rn(x)); }

template <bool kPow2, bool kOneToken>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) gate_up_kernel(const __grid_constant__ FewTokensMoeParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const Layout layout(p.gate_up, p.num_tokens, 0, 0);
  Ring ring(shared_address(shared + layout.rings), shared_address(shared), p.gate_up, p.hidden_size);

  pdl_wait();
  // After the wait and not before: down_kernel reads topk_ids and topk_weights as soon as all blocks have come here.
  pdl_trigger();
  const Batch<kOneToken> batch(*reinterpret_cast<Routing*>(shared + layout.routing), p);

  const int blocks = p.hidden_size / kBlock, tiles = p.intermediate_size / 8, scale_rows = p.intermediate_size / kBlock;
  const int num_items = batch.num_entries * tiles, step = gridDim.x * p.gate_up.warps;
  const int first_item = blockIdx.x + gridDim.x * warp;
  // The item from `item` on that has work, with its entry; num_items or more: none.
  auto find = [&](int& item, Entry& entry) {
    for (; item < num_items; item += step) {
      entry = batch.entry(item / tiles);
      if (!kOneToken || entry.expert >= 0) return true;
    }
    return false;
  };

  int fetched_item = first_item;
  auto next_rows = [&] {
    Rows rows;
    Entry entry;
    if (!find(fetched_item, entry)) return rows;
    const int64_t half = static_cast<int64_t>(p.intermediate_size) * p.hidden_size;
    const int64_t column = fetched_item % tiles * 8;
    const uint8_t* first = static_cast<const uint8_t*>(p.w13) + 2 * entry.expert * half + column * p.hidden_size;
    rows.upper = first + (p.up_first ? half : 0);
    rows.lower = first + (p.up_first ? 0 : half);
    rows.blocks = blocks;
    fetched_item += step;
    return rows;
  };
  ring.fill(next_rows);

  int tile_item = first_item;
  auto next_tile = [&] {
    Tile tile;
    Entry entry;
    if (!find(tile_item, entry)) return tile;
    tile.set_entry(entry);
    tile.blocks = blocks;
    tile.column = tile_item % tiles * 8;
    if (tile.lane_token() < entry.count) {
      const int token = kOneToken ? 0 : batch.assignment(entry.first, tile.lane_token()) / p.top_k;
      tile.row = static_cast<const Bf16*>(p.x) + token * p.x_stride + quad * 16;
    }
    const int64_t scale_row = static_cast<int64_t>(entry.expert) * 2 * scale_rows + tile.column / kBlock;
    const float* scales = p.w13_scale + scale_row * blocks;
    tile.load_scales(scales + (p.up_first ? scale_rows * blocks : 0), scales + (p.up_first ? 0 : scale_rows * blocks));
    tile_item += step;
    return tile;
  };

  multiply_all<kPow2, kOneToken>(next_tile(), ring, next_rows, next_tile, [&](const Tile& tile, const float (&acc)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * quad + i >= tile.count) continue;
      const int64_t assignment = batch.assignment(tile.first, 2 * quad + i);
      static_cast<Bf16*>(p.hidden)[assignment * p.intermediate_size + tile.column + group] =
          __float2bfloat16_rn(silu(rounded(acc[i])) * rounded(acc[2 + i]));
    }
    __syncwarp();
  });
}

template <bool kPow2, bool kOneToken>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) down_kernel(const __grid_constant__ FewTokensMoeParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int assignments = p.num_tokens * p.top_k;
  const Layout layout(p.down, p.num_tokens, assignments, assignments * p.split * kRows);
  Ring ring(shared_address(shared + layout.rings), shared_address(shared), p.down, p.intermediate_size);
  float* weights = reinterpret_cast<float*>(shared + layout.weights);
  float* sums = reinterpret_cast<float*>(shared + layout.sums);

  // Before the wait. The only kernel that may still run is gate_up_kernel, which writes neither ids nor weights, and
  // whose blocks let this one start after they had waited for all kernels before: what those wrote is here.
  const Batch<kOneToken> batch(*reinterpret_cast<Routing*>(shared + layout.routing), p);

  const int blocks = p.intermediate_size / kBlock, row_tiles = p.hidden_size / kRows;
  const int num_units = batch.num_entries * p.split;
  auto first_block = [&](int part) { return part * blocks / p.split; };
  // A place in the warp's work: a row tile, and in it an entry and a part.
  struct Place {
    int row_tile, unit;
  };
  // The place from `place` on that has work, not beyond last_row_tile.
  auto find = [&](Place& place, Entry& entry, int last_row_tile) {
    while (place.row_tile <= last_row_tile) {
      for (; place.unit < num_units; place.unit += p.down.warps) {
        entry = batch.entry(place.unit / p.split);
        if (!kOneToken || entry.expert >= 0) return true;
      }
      place.unit = warp, place.row_tile += gridDim.x;
    }
    return false;
  };

  Place fetched = {static_cast<int>(blockIdx.x), warp};
  auto next_rows = [&] {
    Rows rows;
    Entry entry;
    if (!find(fetched, entry, row_tiles - 1)) return rows;
    const int part = fetched.unit % p.split, begin = first_block(part);
    const int64_t row = static_cast<int64_t>(entry.expert) * p.hidden_size + fetched.row_tile * kRows;
    rows.upper = static_cast<const uint8_t*>(p.w2) + row * p.intermediate_size + begin * kBlock;
    rows.lower = rows.upper + kRows / 2 * p.intermediate_size;
    rows.blocks = first_block(part + 1) - begin;
    fetched.unit += p.down.warps;
    return rows;
  };
  ring.fill(next_rows);
  for (int i = threadIdx.x; i < assignments; i += blockDim.x) {
    const bool here = batch.is_here(i);
    weights[i] = !here ? 0.0f : p.topk_weights == nullptr ? 1.0f : p.topk_weights[i];
    if (!here) {
      for (int j = 0; j < p.split * kRows; ++j) sums[i * p.split * kRows + j] = 0.0f;
    }
  }

  int row_tile = blockIdx.x;
  Place place = {row_tile, warp};
  auto next_tile = [&] {
    Tile tile;
    Entry entry;
    if (!find(place, entry, row_tile)) return tile;
    tile.set_entry(entry);
    tile.part = place.unit % p.split;
    const int begin = first_block(tile.part);
    tile.blocks = first_block(tile.part + 1) - begin;
    if (tile.lane_token() < entry.count) {
      const int64_t assignment = batch.assignment(entry.first, tile.lane_token());
      tile.row = static_cast<const Bf16*>(p.hidden) + assignment * p.intermediate_size + begin * kBlock + quad * 16;
    }
    const int64_t scale_row = static_cast<int64_t>(entry.expert) * (p.hidden_size / kBlock) + row_tile * kRows / kBlock;
    const float* scales = p.w2_scale + scale_row * blocks + begin;
    tile.load_scales(scales, scales);
    place.unit += p.down.warps;
    return tile;
  };
  Tile first = next_tile();

  pdl_wait();
  pdl_trigger();

  while (row_tile < row_tiles) {
    multiply_all<kPow2, kOneToken>(first, ring, next_rows, next_tile, [&](const Tile& tile, const float (&acc)[4]) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (2 * quad + i >= tile.count) continue;
        float* sum = sums + (batch.assignment(tile.first, 2 * quad + i) * p.split + tile.part) * kRows;
        sum[group] = acc[i], sum[group + 8] = acc[2 + i];
      }
      __syncwarp();
    });
    __syncthreads();
    for (int i = threadIdx.x; i < p.num_tokens * kRows / 2; i += blockDim.x) {
      const int token = i / (kRows / 2), pair = i % (kRows / 2);
      float2 total = {};
      for (int slot = 0; slot < p.top_k; ++slot) {
        const int assignment = token * p.top_k + slot;
        float2 sum = {};
        for (int part = 0; part < p.split; ++part) {
          const float2 s = reinterpret_cast<const float2*>(sums)[(assignment * p.split + part) * (kRows / 2) + pair];
          sum.x += s.x, sum.y += s.y;
        }
        total.x = fmaf(weights[assignment], sum.x, total.x);
        total.y = fmaf(weights[assignment], sum.y, total.y);
      }
      Bf16* out = static_cast<Bf16*>(p.out) + token * p.out_stride + row_tile * kRows + 2 * pair;
      *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(total.x, total.y);
    }
    row_tile += gridDim.x;
    if (row_tile >= row_tiles) break;
    __syncthreads();
    place = {row_tile, warp};
    first = next_tile();
  }
}

using Kernel = void (*)(FewTokensMoeParams);

cudaError_t launch_stream(Kernel kernel, const FewTokensMoeParams& p, const StreamConfig& config, int tiles,
                          const Layout& layout, bool pdl, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.end);
  if (error != cudaSuccess) return error;
  const int blocks = config.blocks > 0 ? std::min(config.blocks, tiles) : tiles;
  return launch_kernel(kernel, dim3(blocks), dim3(32 * config.warps), layout.end, stream, pdl, p);
}

template <bool kPow2, bool kOneToken>
cudaError_t launch_gate_up(const FewTokensMoeParams& p, cudaStream_t stream) {
  // Entries are at most assignments: more blocks would have nothing to do.
  const int items = p.num_tokens * p.top_k * (p.intermediate_size / 8);
  const int blocks = std::max(1, (items + p.gate_up.warps - 1) / p.gate_up.warps);
  return launch_stream(gate_up_kernel<kPow2, kOneToken>, p, p.gate_up, blocks,
                       Layout(p.gate_up, p.num_tokens, 0, 0), p.pdl, stream);
}

template <bool kPow2, bool kOneToken>
cudaError_t launch_down(const FewTokensMoeParams& p, cudaStream_t stream) {
  const int assignments = p.num_tokens * p.top_k;
  return launch_stream(down_kernel<kPow2, kOneToken>, p, p.down, p.hidden_size / kRows,
                       Layout(p.down, p.num_tokens, assignments, assignments * p.split * kRows), true, stream);
}

template <bool kPow2, bool kOneToken>
cudaError_t launch(const FewTokensMoeParams& p, cudaStream_t stream) {
  const cudaError_t error = launch_gate_up<kPow2, kOneToken>(p, stream);
  return error != cudaSuccess ? error : launch_down<kPow2, kOneToken>(p, stream);
}

}  // namespace

cudaError_t few_tokens_moe(const FewTokensMoeParams& p, cudaStream_t stream) {
  if (p.num_tokens == 0) return cudaSuccess;
  const bool one = p.num_tokens == 1 && p.top_k <= 32;
  if (p.ue8m0) return one ? launch<true, true>(p, stream) : launch<true, false>(p, stream);
  return one ? launch<false, true>(p, stream) : launch<false, false>(p, stream);
}

cudaError_t configure_few_tokens_moe(FewTokensMoeParams& p) {
  int device = 0, sms = 0, shared = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&device), cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device),
        cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)}) {
    if (error != cudaSuccess) return error;
  }
  p.split = (p.intermediate_size / kBlock + kMaxBlocks - 1) / kMaxBlocks;
  // Measured on an H200 with 8 experts of 128 of 2048x768 and of 256 of 7168x2048. One token: few tiles, all fetched at
  // once. More: the longest pieces of rows, and for short rows of w2 as many warps as there are.
  const bool one = p.num_tokens == 1, short_rows = p.intermediate_size < 1024;
  p.gate_up = one ? StreamConfig{4, 2, short_rows ? 6 : 8, sms} : StreamConfig{8, 1, 6, 2 * sms};
  p.down = {4, 1, short_rows ? (one ? 8 : 16) : (one ? 4 : 6), 0};
  // GPUs with less shared memory take fewer warps.
  const int assignments = p.num_tokens * p.top_k;
  while (p.gate_up.warps > 1 && Layout(p.gate_up, p.num_tokens, 0, 0).end > shared) --p.gate_up.warps;
  while (p.down.warps > 1 && Layout(p.down, p.num_tokens, assignments, assignments * p.split * kRows).end > shared) {
    --p.down.warps;
  }
  return cudaSuccess;
}

}  // namespace vllm_b200
