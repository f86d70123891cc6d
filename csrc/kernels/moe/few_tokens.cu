#include "few_tokens.h"

#include <algorithm>

#include "../common/bulk_copy.cuh"
#include "../common/launch.cuh"
#include "../quant/quantizers.cuh"
#include "routing.cuh"

// Two kernels, each a set of independent warps. A warp's unit of work is a tile
// of 16 rows of one expert's weights, streamed through the warp's own ring in
// shared memory, times up to 8 tokens of that expert: the weights are the
// mma's A operand, the tokens the 8 columns of B, quantised in registers.
//
// Within a 128-byte block the k index is permuted alike in A and B, so that a
// lane's 16 contiguous bytes feed two mma.m16n8k32.
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
constexpr int kBlock = 128;      // columns that share a scale
constexpr int kRowPadding = 64;  // bytes; eight rows' 16-byte loads then hit all banks
constexpr int kMaxWarps = 16;
constexpr float kEps = 1e-10f;

using Fp8 = __nv_fp8_e4m3;
using Bf16 = __nv_bfloat16;

__device__ __forceinline__ void mma(float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                    uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__host__ __device__ constexpr int ring_bytes(const StreamConfig& config) {
  return config.stages * kRows * (config.chunk + kRowPadding);
}

// A warp's ring of weight buffers. Slots are filled and emptied in turn, each refilled right after it is emptied.
struct Ring {
  uint32_t data, barriers;  // shared memory
  int stride, chunk, stages;
  int slot = 0;
  uint32_t parity = 0;
  uint64_t policy = evict_first_policy();

  __device__ Ring(uint32_t data, uint32_t barriers, const StreamConfig& config)
      : data(data + threadIdx.x / 32 * ring_bytes(config)),
        barriers(barriers + threadIdx.x / 32 * config.stages * 8),
        stride(config.chunk + kRowPadding),
        chunk(config.chunk),
        stages(config.stages) {
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < stages; ++i) barrier_init(this->barriers + 8 * i, 1);
      barrier_init_fence();
    }
    __syncwarp();
  }
  // `bytes` of each of the tile's rows into a slot; row: the calling lane's, for the first 16 lanes.
  __device__ __forceinline__ void fill(int slot, const uint8_t* row, int bytes) {
    const int lane = threadIdx.x % 32;
    const uint32_t barrier = barriers + 8 * slot;
    if (lane == 0) barrier_expect(barrier, kRows * bytes);
    __syncwarp();
    if (lane < kRows) bulk_copy(data + (slot * kRows + lane) * stride, row, bytes, barrier, policy);
  }
  // The address of the next slot to be emptied, when it is full.
  __device__ __forceinline__ uint32_t wait() {
    barrier_wait(barriers + 8 * slot, parity);
    return data + slot * kRows * stride;
  }
  __device__ __forceinline__ void advance() {
    if (++slot == stages) slot = 0, parity ^= 1;
  }
};

// The B operand: blocks of 128 columns of up to 8 rows, quantised. Four lanes hold a block of a row, 32 elements each.
// Fewer than 8 rows leave lanes over, which take the blocks that follow, so that a round quantises
// 8 >> log_rows blocks.
template <bool kPow2>
struct Activations {
  const Bf16* row;  // the calling lane's, at its columns of the first block; null: none
  int log_rows, num_blocks;
  Chunk<Bf16> low, high;  // of the next round
  uint32_t q[8];          // of this round
  float scale;

  __device__ __forceinline__ void load(int first_block) {
    const int block = first_block + (threadIdx.x % 32 / 4 >> log_rows);
    low = high = {};
    if (row != nullptr && block < num_blocks) {
      load_chunk<Bf16, true>(low, row + block * kBlock);
      load_chunk<Bf16, true>(high, row + block * kBlock + kBlock / 2);
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

// One float per block of a row of weights, 32 blocks in a register of the warp, and the 32 after them.
struct BlockScales {
  const float* source;
  int num_blocks;
  float now, next;

  __device__ BlockScales(const float* source, int num_blocks) : source(source), num_blocks(num_blocks) {
    now = load(0), next = load(32);
  }
  __device__ __forceinline__ float load(int first) const {
    const int block = first + threadIdx.x % 32;
    return block < num_blocks ? __ldg(source + block) : 0.0f;
  }
  __device__ __forceinline__ float at(int block) {
    if (block % 32 == 0 && block > 0) now = next, next = load(block + 32);
    return __shfl_sync(kFullWarp, now, block % 32);
  }
};

// acc += tile * activations, over the tile's blocks as they come through the ring.
// acc[0], acc[1]: row lane / 4, columns lane % 4 * 2 and the one after; acc[2], acc[3]: 8 rows further.
template <bool kPow2, typename Refill>
__device__ __forceinline__ void multiply(float (&acc)[4], Ring& ring, Refill&& refill, Activations<kPow2>& x,
                                         BlockScales upper, BlockScales lower) {
  const int lane = threadIdx.x % 32, group = lane / 4, quad = lane % 4;
  const int mask = (1 << x.log_rows) - 1, round_mask = (kTileTokens >> x.log_rows) - 1;
  const int source = (group & mask) * 4 + quad;
  const int column0 = (2 * quad & mask) * 4, column1 = (2 * quad + 1 & mask) * 4;
  int block = 0;
  while (block < x.num_blocks) {
    const int end = min(block + ring.chunk / kBlock, x.num_blocks);
    uint32_t tile = ring.wait() + group * ring.stride + quad * 16;
    for (; block < end; ++block, tile += kBlock) {
      const int turn = block & round_mask;
      if (turn == 0) {
        x.quantize();
        x.load(block + round_mask + 1);
      }
      const int shift = turn << x.log_rows << 2;
      uint32_t b[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) b[i] = __shfl_sync(kFullWarp, x.q[i], source + shift);
      const float x0 = __shfl_sync(kFullWarp, x.scale, column0 + shift);
      const float x1 = __shfl_sync(kFullWarp, x.scale, column1 + shift);
      const float w0 = upper.at(block), w1 = lower.at(block);

      float sum[4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 a = load_shared(tile + 64 * half), c = load_shared(tile + 64 * half + 8 * ring.stride);
        mma(sum, a.x, c.x, a.y, c.y, b[4 * half], b[4 * half + 1]);
        mma(sum, a.z, c.z, a.w, c.w, b[4 * half + 2], b[4 * half + 3]);
      }
      acc[0] += sum[0] * (x0 * w0);
      acc[1] += sum[1] * (x1 * w0);
      acc[2] += sum[2] * (x0 * w1);
      acc[3] += sum[3] * (x1 * w1);
    }
    __syncwarp();
    refill(ring.slot);
    ring.advance();
  }
}

__device__ __forceinline__ int log_rows(int count) { return count <= 1 ? 0 : 32 - __clz(count - 1); }

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
  __device__ __forceinline__ bool is_here(int assignment, const FewTokensMoeParams& p) const {
    if constexpr (kOneToken) return expert >= 0;  // asked by thread `assignment`
    return routing.assigned[assignment] != Routing::kNobody;
  }
  // The whole warp asks.
  __device__ __forceinline__ Entry entry(int index) const {
    if constexpr (kOneToken) return {__shfl_sync(kFullWarp, expert, index), index, 1};
    return routing.entry(index);
  }
  __device__ __forceinline__ int assignment(const Entry& entry, int column) const {
    if constexpr (kOneToken) return entry.first;
    return routing.order[entry.first + column];
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
    end = rings + config.warps * ring_bytes(config);
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
  Ring ring(shared_address(shared + layout.rings), shared_address(shared), p.gate_up);

  pdl_wait();
  // After the wait and not before: down_kernel reads topk_ids and topk_weights as soon as all blocks have come here.
  pdl_trigger();
  const Batch<kOneToken> batch(*reinterpret_cast<Routing*>(shared + layout.routing), p);

  const int num_blocks = p.hidden_size / kBlock, tiles = p.intermediate_size / 8;
  const int num_items = batch.num_entries * tiles, step = gridDim.x * p.gate_up.warps;
  const int first_item = blockIdx.x + gridDim.x * warp;

  int next_item = first_item, next_byte = 0;
  const uint8_t* row = nullptr;
  auto refill = [&](int slot) {
    if (next_byte == 0) {
      Entry entry = {};
      for (; next_item < num_items; next_item += step) {
        entry = batch.entry(next_item / tiles);
        if (!kOneToken || entry.expert >= 0) break;
      }
      if (next_item >= num_items) return;
      const int64_t rows = 2 * p.intermediate_size;
      const int in_expert = ((lane < 8) == p.up_first ? p.intermediate_size : 0) + next_item % tiles * 8 + lane % 8;
      row = static_cast<const uint8_t*>(p.w13) + (entry.expert * rows + in_expert) * p.hidden_size;
    }
    const int bytes = min(ring.chunk, p.hidden_size - next_byte);
    ring.fill(slot, row + next_byte, bytes);
    next_byte += bytes;
    if (next_byte == p.hidden_size) next_byte = 0, next_item += step;
  };
  for (int slot = 0; slot < ring.stages; ++slot) refill(slot);

  for (int item = first_item; item < num_items; item += step) {
    const Entry entry = batch.entry(item / tiles);
    if (kOneToken && entry.expert < 0) continue;
    const int column = item % tiles * 8;
    Activations<kPow2> x;
    x.log_rows = log_rows(entry.count);
    x.num_blocks = num_blocks;
    const int mine = group & ((1 << x.log_rows) - 1);
    x.row = nullptr;
    if (mine < entry.count) {
      const int token = batch.assignment(entry, mine) / p.top_k;
      x.row = static_cast<const Bf16*>(p.x) + token * p.x_stride + quad * 16;
    }
    x.load(0);
    const int scale_rows = p.intermediate_size / kBlock;
    const float* scales =
        p.w13_scale + (static_cast<int64_t>(entry.expert) * 2 * scale_rows + column / kBlock) * num_blocks;
    const float *gate_scales = scales + (p.up_first ? scale_rows * num_blocks : 0),
                *up_scales = scales + (p.up_first ? 0 : scale_rows * num_blocks);
    float acc[4] = {};
    multiply(acc, ring, refill, x, BlockScales(gate_scales, num_blocks),
             BlockScales(up_scales, num_blocks));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * quad + i >= entry.count) continue;
      const int64_t assignment = batch.assignment(entry, 2 * quad + i);
      static_cast<Bf16*>(p.hidden)[assignment * p.intermediate_size + column + group] =
          __float2bfloat16_rn(silu(rounded(acc[i])) * rounded(acc[2 + i]));
    }
  }
}

template <bool kPow2, bool kOneToken>
__global__ void __launch_bounds__(32 * kMaxWarps, 1) down_kernel(const __grid_constant__ FewTokensMoeParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int assignments = p.num_tokens * p.top_k;
  const Layout layout(p.down, p.num_tokens, assignments, assignments * p.split * kRows);
  Ring ring(shared_address(shared + layout.rings), shared_address(shared), p.down);
  float* weights = reinterpret_cast<float*>(shared + layout.weights);
  float* sums = reinterpret_cast<float*>(shared + layout.sums);

  // Before the wait. The only kernel that may still run is gate_up_kernel, which writes neither ids nor weights, and
  // whose blocks let this one start after they had waited for all kernels before: what those wrote is here.
  const Batch<kOneToken> batch(*reinterpret_cast<Routing*>(shared + layout.routing), p);

  const int num_blocks = p.intermediate_size / kBlock, row_tiles = p.hidden_size / kRows;
  const int num_units = batch.num_entries * p.split;
  auto first_block = [&](int part) { return part * num_blocks / p.split; };

  int next_tile = blockIdx.x, next_unit = warp, next_byte = 0, end_byte = 0;
  const uint8_t* row = nullptr;
  auto refill = [&](int slot) {
    if (next_byte == end_byte) {
      Entry entry = {};
      while (next_tile < row_tiles) {
        if (next_unit >= num_units) {
          next_unit = warp, next_tile += gridDim.x;
          if (next_unit >= num_units) return;
          continue;
        }
        entry = batch.entry(next_unit / p.split);
        if (!kOneToken || entry.expert >= 0) break;
        next_unit += p.down.warps;
      }
      if (next_tile >= row_tiles) return;
      const int part = next_unit % p.split;
      next_byte = first_block(part) * kBlock, end_byte = first_block(part + 1) * kBlock;
      const int64_t in_all = static_cast<int64_t>(entry.expert) * p.hidden_size + next_tile * kRows + lane % kRows;
      row = static_cast<const uint8_t*>(p.w2) + in_all * p.intermediate_size;
    }
    const int bytes = min(ring.chunk, end_byte - next_byte);
    ring.fill(slot, row + next_byte, bytes);
    next_byte += bytes;
    if (next_byte == end_byte) next_unit += p.down.warps;
  };
  for (int slot = 0; slot < ring.stages; ++slot) refill(slot);
  for (int i = threadIdx.x; i < assignments; i += blockDim.x) {
    const bool here = batch.is_here(i, p);
    weights[i] = !here ? 0.0f : p.topk_weights == nullptr ? 1.0f : p.topk_weights[i];
    if (!here) {
      for (int j = 0; j < p.split * kRows; ++j) sums[i * p.split * kRows + j] = 0.0f;
    }
  }

  pdl_wait();
  pdl_trigger();

  for (int row_tile = blockIdx.x; row_tile < row_tiles; row_tile += gridDim.x) {
    const int out_column = row_tile * kRows;
    for (int unit = warp; unit < num_units; unit += p.down.warps) {
      const Entry entry = batch.entry(unit / p.split);
      if (kOneToken && entry.expert < 0) continue;
      const int part = unit % p.split, begin = first_block(part);
      Activations<kPow2> h;
      h.log_rows = log_rows(entry.count);
      h.num_blocks = first_block(part + 1) - begin;
      const int mine = group & ((1 << h.log_rows) - 1);
      h.row = nullptr;
      if (mine < entry.count) {
        const int64_t assignment = batch.assignment(entry, mine);
        h.row = static_cast<const Bf16*>(p.hidden) + assignment * p.intermediate_size + begin * kBlock + quad * 16;
      }
      h.load(0);
      const int64_t scale_row = static_cast<int64_t>(entry.expert) * (p.hidden_size / kBlock) + out_column / kBlock;
      const BlockScales scales(p.w2_scale + scale_row * num_blocks + begin, h.num_blocks);
      float acc[4] = {};
      multiply(acc, ring, refill, h, scales, scales);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (2 * quad + i >= entry.count) continue;
        float* sum = sums + (batch.assignment(entry, 2 * quad + i) * p.split + part) * kRows;
        sum[group] = acc[i], sum[group + 8] = acc[2 + i];
      }
    }
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
      Bf16* out = static_cast<Bf16*>(p.out) + token * p.out_stride + out_column + 2 * pair;
      *reinterpret_cast<__nv_bfloat162*>(out) = __floats2bfloat162_rn(total.x, total.y);
    }
    if (row_tile + gridDim.x < row_tiles) __syncthreads();
  }
}

template <typename Kernel>
cudaError_t launch_stream(Kernel kernel, const FewTokensMoeParams& p, const StreamConfig& config, int tiles,
                          const Layout& layout, bool pdl, cudaStream_t stream) {
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.end);
  if (error != cudaSuccess) return error;
  const int blocks = config.blocks > 0 ? std::min(config.blocks, tiles) : tiles;
  return launch_kernel(kernel, dim3(blocks), dim3(32 * config.warps), layout.end, stream, pdl, p);
}

template <bool kPow2, bool kOneToken>
cudaError_t launch(const FewTokensMoeParams& p, cudaStream_t stream) {
  const int assignments = p.num_tokens * p.top_k;
  // Entries are at most assignments: more blocks would have nothing to do.
  const int items = assignments * (p.intermediate_size / 8), blocks = std::max(1, (items + p.gate_up.warps - 1) / p.gate_up.warps);
  const cudaError_t error = launch_stream(gate_up_kernel<kPow2, kOneToken>, p, p.gate_up, blocks,
                                          Layout(p.gate_up, p.num_tokens, 0, 0), p.pdl, stream);
  if (error != cudaSuccess) return error;
  return launch_stream(down_kernel<kPow2, kOneToken>, p, p.down, p.hidden_size / kRows,
                       Layout(p.down, p.num_tokens, assignments, assignments * p.split * kRows), true, stream);
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
  p.split = 1;
  p.gate_up = {512, 2, 6, sms};
  p.down = {p.intermediate_size < 1024 ? 256 : 512, 1, 8, 0};
  return cudaSuccess;
}

}  // namespace vllm_b200
