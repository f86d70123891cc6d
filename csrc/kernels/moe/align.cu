#include "align.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>
#include <bit>

#include "../common/cluster.cuh"
#include "../common/launch.cuh"

// A stable counting sort by clusters that do not talk to each other. A block of a
// cluster takes a run of ids and sets a bit for each of them, in a word for 32 ids
// and their expert: an id's rank among its expert's ids is then the number of bits
// before its own, so nothing is counted in order. The blocks push their counts into
// each other's shared memory, so there is no workspace, and nothing to clear. Every
// cluster counts all ids, which costs little, and writes only its share of them:
// stores to scattered places are what takes the time.

namespace vllm_b200 {
namespace {

namespace cg = cooperative_groups;

constexpr int kIdsOfWord = 32;
constexpr int kWordsOfSegment = 8;  // whose bits one thread counts
constexpr int kMaxCluster = 16;
constexpr int kBatchThreads = 1024;
constexpr int kMaxDevices = 64;
constexpr int kStaticBytes = 1024;  // shared memory that the kernels declare, and the system's
constexpr uint32_t kAllLanes = 0xffffffffu;

// How the ids are spread over the grid of [replicas][cluster] blocks.
struct AlignPlan {
  int cluster;              // blocks, each with a run of the ids
  int replicas;             // clusters, each of which writes a share
  int words;                // of a tile: what a block takes at a time
  int block_bits;           // 2 ** block_bits = block_size; -1 for no power of two
  uint32_t words_of_block;  // of its run
  uint32_t words_of_share;  // of each run
};

// Shared memory, in words of 32 bits. Rows of experts begin at 16 bytes.
struct AlignMemory {
  int row, segments, cluster, words;

  __host__ __device__ AlignMemory(const AlignPlan& plan, int num_experts)
      : row((num_experts + 3) / 4 * 4),
        segments((plan.words + kWordsOfSegment - 1) / kWordsOfSegment),
        cluster(plan.cluster),
        words(plan.words) {}
  __host__ __device__ int bits() const { return 0; }                                  // [words][row]
  __host__ __device__ int segment() const { return words * row; }                     // [segments][row]
  __host__ __device__ int gathered() const { return segment() + segments * row; }     // [cluster][row]
  __host__ __device__ int per_expert() const { return gathered() + cluster * row; }   // [5][row]
  __host__ __device__ int in_segment() const { return per_expert() + 5 * row; }       // [words][row] of 8 bits
  __host__ __device__ size_t bytes() const { return 4 * static_cast<size_t>(in_segment()) + words * row; }
};

// Exclusive prefix sum over the threads of the block, and the sum of all.
__device__ __forceinline__ int prefix_sum(int value, int* warp_totals, int& total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += other;
  }
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  const int of_warp = lane < static_cast<int>(blockDim.x / 32) ? warp_totals[lane] : 0;
  total = __reduce_add_sync(kAllLanes, of_warp);
  return sum - value + __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
}

__device__ __forceinline__ void fill(int32_t* out, int64_t count, int32_t value, int64_t thread, int64_t threads) {
  if (count <= 0) return;
  const int64_t head = min(count, static_cast<int64_t>(-(reinterpret_cast<uintptr_t>(out) / 4) % 4));
  if (thread < head) out[thread] = value;
  out += head, count -= head;
  for (int64_t i = thread; i < count / 4; i += threads) {
    reinterpret_cast<int4*>(out)[i] = make_int4(value, value, value, value);
  }
  if (thread < count % 4) out[count / 4 * 4 + thread] = value;
}

// num_experts for an id that is left out.
template <typename Id>
__device__ __forceinline__ int expert_of_id(const MoeAlignParams& p, int64_t i) {
  const Id id = static_cast<const Id*>(p.topk_ids)[i];
  int expert = id >= 0 && id < p.num_experts ? static_cast<int>(id) : -1;
  if (p.expert_map && expert >= 0) expert = p.expert_map[expert];
  return expert >= 0 && expert < p.num_experts ? expert : p.num_experts;
}

// A thread takes up to kItems ids of a tile, and at most one expert. kOneTile: a block's run is no longer.
template <typename Id, int kThreads, int kItems, bool kOneTile>
__global__ void __launch_bounds__(kThreads, 1) align_kernel(const __grid_constant__ MoeAlignParams p,
                                                        const __grid_constant__ AlignPlan plan) {
  constexpr int kMaxSegments = (kThreads * kItems / kIdsOfWord + kWordsOfSegment - 1) / kWordsOfSegment;
  extern __shared__ int4 shared[];
  __shared__ int warp_totals[kThreads / 32];
  const AlignMemory memory(plan, p.num_experts);
  const int row = memory.row;
  uint32_t* words = reinterpret_cast<uint32_t*>(shared);
  uint32_t* bits = words + memory.bits();                              // a bit for each of 32 ids
  int32_t* segment = reinterpret_cast<int32_t*>(words + memory.segment());  // ids in the segments before
  int32_t* gathered = reinterpret_cast<int32_t*>(words + memory.gathered());  // ids of each block of the cluster
  int32_t* next = reinterpret_cast<int32_t*>(words + memory.per_expert());  // where the tile's first id goes
  int32_t *first = next + row, *total = first + row;                   // the expert's first block, its ids
  int32_t *earlier = total + row, *rest = earlier + row;               // ids before those of this cluster's share
  uint8_t* in_segment = reinterpret_cast<uint8_t*>(words + memory.in_segment());  // ids in the segment's words before

  pdl_trigger();
  cg::cluster_group cluster = cg::this_cluster();
  const bool alone = plan.cluster == 1;
  const int rank = blockIdx.x;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const bool has_expert = tid < p.num_experts;

  // The run of this block, the words of it that are this cluster's to write, and the tiles that these are in.
  const uint32_t tile_ids = plan.words * kIdsOfWord;
  const int64_t run = static_cast<int64_t>(plan.words_of_block) * kIdsOfWord, begin = min(p.num_ids, rank * run);
  const uint32_t ids = static_cast<uint32_t>(min(p.num_ids - begin, run));
  const uint32_t own_ids = plan.words_of_share * kIdsOfWord;
  const uint32_t own_begin = blockIdx.y * own_ids, own_end = own_begin + own_ids;
  const uint32_t first_tile = kOneTile ? 0 : own_begin / tile_ids * tile_ids;

  int expert[kItems];
  auto load_tile = [&](uint32_t tile) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t i = j * kThreads + tid;
      expert[j] = i < tile_ids && tile + i < ids ? expert_of_id<Id>(p, begin + tile + i) : -1;
    }
  };
  auto clear = [&](void* from, int count) {
    for (int i = tid; i < count / 4; i += kThreads) static_cast<int4*>(from)[i] = make_int4(0, 0, 0, 0);
  };
  // Sets in_segment and `segment` for the loaded tile; returns how many ids of its expert a thread has.
  auto rank_tile = [&]() -> int {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int word = (j * kThreads + tid) / kIdsOfWord;
      if (static_cast<unsigned>(expert[j]) < static_cast<unsigned>(p.num_experts)) {
        atomicOr(&bits[word * row + expert[j]], 1u << lane);
      }
    }
    __syncthreads();
    // A warp takes 32 experts of a segment.
    const int shift = 32 - __clz((p.num_experts - 1) / 32);
    for (int unit = warp; unit < memory.segments << shift; unit += kThreads / 32) {
      const int s = unit >> shift, e = (unit & ((1 << shift) - 1)) * 32 + lane;
      if (e >= p.num_experts) continue;
      int count = 0;
#pragma unroll
      for (int k = 0; k < kWordsOfSegment; ++k) {
        const int word = s * kWordsOfSegment + k;
        if (word < plan.words) {
          in_segment[word * row + e] = static_cast<uint8_t>(count);
          count += __popc(bits[word * row + e]);
        }
      }
      segment[s * row + e] = count;
    }
    __syncthreads();
    int of_segments[kMaxSegments], count = 0;
    if (has_expert) {
#pragma unroll
      for (int s = 0; s < kMaxSegments; ++s) of_segments[s] = s < memory.segments ? segment[s * row + tid] : 0;
#pragma unroll
      for (int s = 0; s < kMaxSegments; ++s) {
        if (s < memory.segments) segment[s * row + tid] = count;
        count += of_segments[s];
      }
    }
    return count;
  };
  auto write_tile = [&](uint32_t tile) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t in_tile = j * kThreads + tid, i = tile + in_tile;
      if (expert[j] < 0 || i < own_begin || i >= own_end) continue;
      const int32_t id = static_cast<int32_t>(begin + i);
      const int e = expert[j], word = in_tile / kIdsOfWord;
      if (p.scatter_ids) p.scatter_ids[id] = e < p.num_experts ? id : -1;
      if (e == p.num_experts) continue;
      const int before = segment[word / kWordsOfSegment * row + e] + in_segment[word * row + e] +
                         __popc(bits[word * row + e] & ((1u << lane) - 1));
      p.sorted_ids[next[e] + before] = id;
    }
  };

  if (!alone) cluster.barrier_arrive();  // the others may be written to once they have begun
  if (kOneTile && !p.pdl) load_tile(0);
  if constexpr (kOneTile) {
    clear(bits, plan.words * row);
  } else {
    clear(earlier, 2 * row);
  }
  pdl_wait();
  if (kOneTile && p.pdl) load_tile(0);
  __syncthreads();

  int count = 0;  // of this block's ids
  if constexpr (kOneTile) {
    count = rank_tile();
  } else {
    constexpr int kBatch = 8;
    for (uint32_t from = tid; from < ids; from += kBatch * kThreads) {
      int batch[kBatch];
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const uint32_t i = from + j * kThreads;
        batch[j] = i < ids ? expert_of_id<Id>(p, begin + i) : p.num_experts;
      }
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int late = from + j * kThreads < first_tile ? 0 : row;  // `rest` lies behind `earlier`
        if (batch[j] < p.num_experts) atomicAdd(&earlier[late + batch[j]], 1);
      }
    }
    __syncthreads();
    if (has_expert) count = earlier[tid] + rest[tid];
  }

  // A thread has an expert from here on.
  int of_all = count, before = 0;  // ids, of all blocks and of those before
  if (!alone) {
    cluster.barrier_wait();
    if (has_expert) {
      for (int b = 0; b < plan.cluster; ++b) *cluster.map_shared_rank(gathered + rank * row + tid, b) = count;
    }
    cluster.sync();
    if (has_expert) {
      of_all = 0;
#pragma unroll 4
      for (int b = 0; b < plan.cluster; ++b) {
        const int of_block = gathered[b * row + tid];
        if (b < rank) before += of_block;
        of_all += of_block;
      }
    }
  }
  int used = 0;  // blocks of ids
  const int filled = of_all + p.block_size - 1;
  const int blocks = !has_expert ? 0 : plan.block_bits < 0 ? filled / p.block_size : filled >> plan.block_bits;
  const int first_block = prefix_sum(blocks, warp_totals, used);
  if (has_expert) {
    first[tid] = first_block;
    total[tid] = of_all;
    next[tid] = first_block * p.block_size + before + (kOneTile ? 0 : earlier[tid]);
  }
  __syncthreads();

  if constexpr (kOneTile) {
    write_tile(0);
  } else {
    for (uint32_t tile = first_tile; tile < min(own_end, ids); tile += tile_ids) {
      load_tile(tile);
      clear(bits, plan.words * row);
      __syncthreads();
      const int of_tile = rank_tile();
      __syncthreads();
      write_tile(tile);
      __syncthreads();
      if (has_expert) next[tid] += of_tile;
    }
  }

  // Each expert's last block is padded by a warp, which also says whose the blocks are.
  const int32_t padding = static_cast<int32_t>(p.num_ids);
  const int block = static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y);
  const int num_blocks = static_cast<int>(gridDim.x * gridDim.y);
  for (int e = block + num_blocks * warp; e < p.num_experts; e += num_blocks * (kThreads / 32)) {
    const int ids_of_expert = total[e], blocks_of_expert = (e + 1 < p.num_experts ? first[e + 1] : used) - first[e];
    for (int b = lane; b < blocks_of_expert; b += 32) p.block_experts[first[e] + b] = e;
    const int64_t start = static_cast<int64_t>(first[e]) * p.block_size;
    for (int i = ids_of_expert + lane; i < blocks_of_expert * p.block_size; i += 32) p.sorted_ids[start + i] = padding;
  }
  const int64_t thread = block * kThreads + tid, threads = num_blocks * kThreads;
  const int64_t sorted = static_cast<int64_t>(used) * p.block_size;
  fill(p.sorted_ids + sorted, p.max_sorted - sorted, padding, thread, threads);
  fill(p.block_experts + used, p.max_blocks - used, -1, thread, threads);
  if (thread == 0) *p.num_sorted = static_cast<int32_t>(sorted);
}

// What a kernel may use on the current device, asked once.
struct AlignLimits {
  int cluster, shared_bytes;
};

template <typename Id, int kThreads, int kItems, bool kOneTile>
cudaError_t find_limits(AlignLimits& limits) {
  static std::atomic<int> clusters[kMaxDevices], shared_memory[kMaxDevices];  // 0 for not asked yet
  const auto kernel = align_kernel<Id, kThreads, kItems, kOneTile>;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (clusters[device].load() == 0) {
    int bytes = 0;
    cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    bytes -= kStaticBytes;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    shared_memory[device].store(bytes);
    clusters[device].store(max_cluster(kernel, dim3(kThreads), bytes));
  }
  limits = {std::min(clusters[device].load(), kMaxCluster), shared_memory[device].load()};
  return cudaSuccess;
}

template <typename Id, int kThreads, int kItems, bool kOneTile>
cudaError_t launch(const MoeAlignParams& p, const AlignPlan& plan, cudaStream_t stream) {
  const auto kernel = align_kernel<Id, kThreads, kItems, kOneTile>;
  const size_t bytes = AlignMemory(plan, p.num_experts).bytes();
  const dim3 grid(plan.cluster, plan.replicas), block(kThreads);
  if (plan.cluster == 1) return launch_kernel(kernel, grid, block, bytes, stream, p.pdl, p, plan);
  return launch_clusters(kernel, grid, block, plan.cluster, bytes, stream, p.pdl, p, plan);
}

// Runs of about ids_per_block ids, as far as a cluster has blocks for them.
template <typename Id, int kThreads, int kItems>
cudaError_t plan_and_launch(const MoeAlignParams& p, int64_t ids_per_block, int most_replicas, cudaStream_t stream) {
  AlignLimits one, many;
  if (const cudaError_t error = find_limits<Id, kThreads, kItems, true>(one); error != cudaSuccess) return error;
  if (const cudaError_t error = find_limits<Id, kThreads, kItems, false>(many); error != cudaSuccess) return error;
  const AlignLimits limits = {std::min(one.cluster, many.cluster), std::min(one.shared_bytes, many.shared_bytes)};
  AlignPlan plan = {};
  plan.cluster = 1;
  while (2 * plan.cluster <= limits.cluster && p.num_ids > ids_per_block * plan.cluster) plan.cluster *= 2;
  const int64_t ids_of_words = static_cast<int64_t>(kIdsOfWord) * plan.cluster;
  plan.words_of_block = static_cast<uint32_t>(std::max<int64_t>((p.num_ids + ids_of_words - 1) / ids_of_words, 1));
  plan.words = static_cast<int>(std::min<uint32_t>(plan.words_of_block, kThreads * kItems / kIdsOfWord));
  while (plan.words > 1 && AlignMemory(plan, p.num_experts).bytes() > static_cast<size_t>(limits.shared_bytes)) {
    plan.words = (plan.words + 1) / 2;
  }
  plan.words_of_share = (plan.words_of_block + most_replicas - 1) / most_replicas;
  plan.replicas = static_cast<int>((plan.words_of_block + plan.words_of_share - 1) / plan.words_of_share);
  const uint32_t block_size = static_cast<uint32_t>(p.block_size);
  plan.block_bits = std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1;
  return plan.words_of_block <= static_cast<uint32_t>(plan.words)
             ? launch<Id, kThreads, kItems, true>(p, plan, stream)
             : launch<Id, kThreads, kItems, false>(p, plan, stream);
}

// Plain int32 ids: the plans that were the fastest on an H200.
cudaError_t choose_plain(const MoeAlignParams& p, cudaStream_t stream) {
  if (p.num_ids <= 8192) return plan_and_launch<int32_t, 512, 1>(p, 512, p.num_ids < 512 ? 2 : 4, stream);
  if (p.num_ids <= 16384) return plan_and_launch<int32_t, 512, 2>(p, 1024, 4, stream);
  return plan_and_launch<int32_t, 1024, 2>(p, 2048, 4, stream);
}

template <typename Id>
cudaError_t choose(const MoeAlignParams& p, cudaStream_t stream) {
  if (p.num_ids <= 256 && p.num_experts <= 256) return plan_and_launch<Id, 256, 1>(p, 256, 1, stream);
  return plan_and_launch<Id, 1024, 2>(p, 2048, p.num_ids <= 2048 ? 8 : 4, stream);
}

// Every block of the grid finds the sums again and writes a part of the result.
__global__ void __launch_bounds__(kBatchThreads)
    batched_align_kernel(const __grid_constant__ BatchedMoeAlignParams p) {
  __shared__ int warp_totals[kBatchThreads / 32];
  __shared__ int32_t first_block[kBatchThreads], valid[kBatchThreads];
  pdl_trigger();
  pdl_wait();
  const int tid = threadIdx.x;
  const int tokens = tid < p.num_batches ? p.num_tokens[tid] : 0;
  const int blocks = (tokens + p.block_size - 1) / p.block_size;
  int used = 0;
  first_block[tid] = prefix_sum(blocks, warp_totals, used);
  valid[tid] = tokens;
  __syncthreads();

  if (blockIdx.x == 0 && tid == 0) *p.num_sorted = used * p.block_size;
  const int64_t size = static_cast<int64_t>(p.num_batches) * p.blocks_per_batch * p.block_size;
  const int64_t padding = static_cast<int64_t>(p.num_batches) * p.max_tokens;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kBatchThreads + tid; i < size;
       i += static_cast<int64_t>(gridDim.x) * kBatchThreads) {
    const int block = static_cast<int>(i / p.block_size);
    int batch = -1;
    int64_t id = padding;
    if (block < used) {
      // The last batch that begins at or before the block; batches without tokens have the next one's beginning.
      int low = 0, high = p.num_batches;
      while (high - low > 1) {
        const int middle = (low + high) / 2;
        (first_block[middle] <= block ? low : high) = middle;
      }
      batch = low;
      const int64_t token = i - static_cast<int64_t>(first_block[batch]) * p.block_size;
      if (token < valid[batch]) id = static_cast<int64_t>(batch) * p.max_tokens + token;
    }
    p.sorted_ids[i] = static_cast<int32_t>(id);
    if (i % p.block_size == 0) p.block_experts[block] = batch;
  }
}

}  // namespace

cudaError_t moe_align(const MoeAlignParams& params, cudaStream_t stream) {
  if (!params.wide_ids && !params.expert_map && !params.scatter_ids) return choose_plain(params, stream);
  return params.wide_ids ? choose<int64_t>(params, stream) : choose<int32_t>(params, stream);
}

cudaError_t batched_moe_align(const BatchedMoeAlignParams& params, cudaStream_t stream) {
  const int64_t size = static_cast<int64_t>(params.num_batches) * params.blocks_per_batch * params.block_size;
  const int64_t blocks = std::clamp<int64_t>((size + 4 * kBatchThreads - 1) / (4 * kBatchThreads), 1, 128);
  return launch_kernel(batched_align_kernel, dim3(blocks), dim3(kBatchThreads), 0, stream, params.pdl, params);
}

}  // namespace vllm_b200
