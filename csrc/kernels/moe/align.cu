#include "align.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>
#include <bit>

#include "../common/cluster.cuh"
#include "../common/launch.cuh"

// A stable counting sort by clusters that do not talk to each other. The blocks of
// a cluster count a run of the ids each and push their counts into each other's
// shared memory, so there is no workspace, and nothing to clear. Every cluster
// counts all ids, which costs little, and writes only its share of every run:
// stores to scattered places are what takes the time. Of that share a block sets a
// bit for each id, in a word for 32 ids and their expert: an id's rank among its
// expert's is then the number of bits before its own, whatever came first.

namespace vllm_b200 {
namespace {

namespace cg = cooperative_groups;

constexpr int kIdsOfWord = 32;
constexpr int kWordsOfSegment = 8;
constexpr int kWordsWithoutSegments = 16;  // up to which a rank is found word by word
constexpr int kMaxCluster = 16;
constexpr int kBatchThreads = 1024;
constexpr int kMaxDevices = 64;
constexpr int kStaticBytes = 1024;  // shared memory that the kernels declare, and the system's
constexpr uint32_t kAllLanes = 0xffffffffu;

// How the ids are spread over the grid of [replicas][cluster] blocks.
struct AlignPlan {
  int cluster;              // blocks, each with a run of the ids
  int replicas;             // clusters, each of which writes a share
  int words;                // of a tile: what a block ranks at a time
  int block_bits;           // 2 ** block_bits = block_size; -1 for no power of two
  uint32_t words_of_block;  // of its run
  uint32_t words_of_share;  // of each run
};

// Shared memory, in words of 32 bits. Rows of experts begin at 16 bytes.
struct AlignMemory {
  int row, segments, cluster, words;

  __host__ __device__ AlignMemory(const AlignPlan& plan, int num_experts)
      : row((num_experts + 3) / 4 * 4),
        segments(plan.words > kWordsWithoutSegments || plan.words_of_share > static_cast<uint32_t>(plan.words)
                     ? (plan.words + kWordsOfSegment - 1) / kWordsOfSegment
                     : 0),
        cluster(plan.cluster > 1 ? plan.cluster : 0),
        words(plan.words) {}
  // [words][row] of bits, then [2][row], [3][row], [segments][row] and [cluster][row] of numbers.
  __host__ __device__ int earlier() const { return words * row; }
  __host__ __device__ int per_expert() const { return earlier() + 2 * row; }
  __host__ __device__ int segment() const { return per_expert() + 3 * row; }
  __host__ __device__ int gathered() const { return segment() + segments * row; }
  __host__ __device__ size_t bytes() const { return sizeof(int32_t) * (gathered() + cluster * row); }
};

// Inclusive prefix sum over the lanes of the warp.
__device__ __forceinline__ int sum_up_to_lane(int value) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
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
__device__ __forceinline__ int expert_of_id(const MoeAlignParams& p, Id id) {
  int expert = id >= 0 && id < p.num_experts ? static_cast<int>(id) : -1;
  if (p.expert_map && expert >= 0) expert = p.expert_map[expert];
  return expert >= 0 && expert < p.num_experts ? expert : p.num_experts;
}

// A thread ranks up to kItems ids of a tile, and looks after one expert at most.
template <typename Id, int kThreads, int kItems>
__global__ void __launch_bounds__(kThreads, 1) align_kernel(const __grid_constant__ MoeAlignParams p,
                                                           const __grid_constant__ AlignPlan plan) {
  constexpr int kWarps = kThreads / 32, kBatch = 8;
  constexpr int kMaxSegments = kThreads * kItems / kIdsOfWord / kWordsOfSegment;
  extern __shared__ int4 shared[];
  __shared__ int warp_totals[kWarps];
  const AlignMemory memory(plan, p.num_experts);
  const int row = memory.row;
  uint32_t* bits = reinterpret_cast<uint32_t*>(shared);
  int32_t* numbers = reinterpret_cast<int32_t*>(shared);
  int32_t *earlier = numbers + memory.earlier(), *rest = earlier + row;  // ids before this cluster's share, and others
  int32_t* next = numbers + memory.per_expert();                         // where the tile's first id goes
  int32_t *first = next + row, *total = first + row;                     // the expert's first block, its ids
  int32_t *segment = numbers + memory.segment();                         // ids in segments, then in those before
  int32_t* gathered = numbers + memory.gathered();                       // ids of each block of the cluster

  pdl_trigger();
  cg::cluster_group cluster = cg::this_cluster();
  const bool alone = plan.cluster == 1;
  const int rank = blockIdx.x;
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const bool has_expert = tid < p.num_experts;

  // The run of this block, and what of it is this cluster's to write.
  const uint32_t tile_ids = plan.words * kIdsOfWord;
  const int64_t run = static_cast<int64_t>(plan.words_of_block) * kIdsOfWord, begin = min(p.num_ids, rank * run);
  const uint32_t ids = static_cast<uint32_t>(min(p.num_ids - begin, run));
  const uint32_t own_ids = plan.words_of_share * kIdsOfWord;
  const uint32_t own_begin = blockIdx.y * own_ids, own_end = min(ids, own_begin + own_ids);
  const Id* topk_ids = static_cast<const Id*>(p.topk_ids) + begin;

  Id own[kItems];
  int expert[kItems];
  auto load_tile = [&](uint32_t tile) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j * kThreads >= tile_ids) break;
      const uint32_t in_tile = j * kThreads + tid, i = tile + in_tile;
      own[j] = in_tile < tile_ids && i < own_end ? topk_ids[i] : -1;
    }
  };
  auto mark_tile = [&]() {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j * kThreads >= tile_ids) break;
      expert[j] = expert_of_id(p, own[j]);
      const int word = (j * kThreads + tid) / kIdsOfWord;
      if (expert[j] < p.num_experts) atomicOr(&bits[word * row + expert[j]], 1u << lane);
    }
  };
  auto clear = [&](int from, int count) {
    for (int i = tid; i < count / 4; i += kThreads) shared[from / 4 + i] = make_int4(0, 0, 0, 0);
  };
  // A warp takes 32 experts of a segment.
  auto count_segments = [&]() {
    const int group_bits = 32 - __clz((p.num_experts - 1) / 32);
    for (int unit = warp; unit < memory.segments << group_bits; unit += kWarps) {
      const int s = unit >> group_bits, e = (unit & ((1 << group_bits) - 1)) * 32 + lane;
      if (e >= p.num_experts) continue;
      int count = 0;
#pragma unroll
      for (int k = 0; k < kWordsOfSegment; ++k) {
        const int word = s * kWordsOfSegment + k;
        if (word < plan.words) count += __popc(bits[word * row + e]);
      }
      segment[s * row + e] = count;
    }
  };
  // Returns how many ids of its expert the tile has, where it has segments.
  auto sum_segments = [&]() -> int {
    int sum = 0, count[kMaxSegments > 0 ? kMaxSegments : 1];
    if (memory.segments == 0 || !has_expert) return 0;
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) count[s] = s < memory.segments ? segment[s * row + tid] : 0;
#pragma unroll
    for (int s = 0; s < kMaxSegments; ++s) {
      if (s < memory.segments) segment[s * row + tid] = sum;
      sum += count[s];
    }
    return sum;
  };
  auto write_tile = [&](uint32_t tile) {
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const uint32_t in_tile = j * kThreads + tid, i = tile + in_tile;
      if (j * kThreads >= tile_ids) break;
      if (in_tile >= tile_ids || i >= own_end) continue;
      const int32_t id = static_cast<int32_t>(begin + i);
      const int e = expert[j], word = in_tile / kIdsOfWord;
      if (p.scatter_ids) p.scatter_ids[id] = e < p.num_experts ? id : -1;
      if (e == p.num_experts) continue;
      int before = next[e] + __popc(bits[word * row + e] & ((1u << lane) - 1)), from = 0;
      if (memory.segments) {
        from = word / kWordsOfSegment * kWordsOfSegment;
        before += segment[word / kWordsOfSegment * row + e];
      }
#pragma unroll 4
      for (int k = from; k < word; ++k) before += __popc(bits[k * row + e]);
      p.sorted_ids[before] = id;
    }
  };

  if (!alone) cluster.barrier_arrive();  // the others may be written to once they have begun
  if (!p.pdl) load_tile(own_begin);
  clear(0, memory.per_expert());
  pdl_wait();
  if (p.pdl) load_tile(own_begin);
  Id batch[kBatch];
  auto load_batch = [&](uint32_t from) {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (from + j * kThreads >= ids) break;
      batch[j] = from + j * kThreads + tid < ids ? topk_ids[from + j * kThreads + tid] : -1;
    }
  };
  load_batch(0);
  __syncthreads();
  mark_tile();
  for (uint32_t from = 0; from < ids; from += kBatch * kThreads) {
    if (from > 0) load_batch(from);
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      if (from + j * kThreads >= ids) break;
      const int e = expert_of_id(p, batch[j]);
      const int late = from + j * kThreads + tid < own_begin ? 0 : row;  // `rest` lies behind `earlier`
      if (e < p.num_experts) atomicAdd(&earlier[late + e], 1);
    }
  }
  __syncthreads();
  count_segments();

  // A thread has an expert from here on.
  const int own_earlier = has_expert ? earlier[tid] : 0;
  int of_all = has_expert ? own_earlier + rest[tid] : 0, before = own_earlier;  // of all blocks, and those before
  if (!alone) {
    if (has_expert) total[tid] = of_all;
    cluster.barrier_wait();
    __syncthreads();
    for (int b = warp; b < plan.cluster; b += kWarps) {
      int4* theirs = cluster.map_shared_rank(reinterpret_cast<int4*>(gathered + rank * row), b);
      for (int i = lane; i < row / 4; i += 32) theirs[i] = reinterpret_cast<const int4*>(total)[i];
    }
    cluster.sync();
    of_all = 0;
    if (has_expert) {
#pragma unroll 8
      for (int b = 0; b < plan.cluster; ++b) {
        const int of_block = gathered[b * row + tid];
        if (b < rank) before += of_block;
        of_all += of_block;
      }
    }
  }
  const int filled = of_all + p.block_size - 1;
  const int blocks = !has_expert ? 0 : plan.block_bits < 0 ? filled / p.block_size : filled >> plan.block_bits;
  int up_to_this = 0;
  if (warp * 32 < p.num_experts) {
    up_to_this = sum_up_to_lane(blocks);
    if (lane == 31) warp_totals[warp] = up_to_this;
  }
  __syncthreads();
  const int of_warp = lane * 32 < p.num_experts ? warp_totals[lane] : 0;
  const int used = __reduce_add_sync(kAllLanes, of_warp);  // blocks of ids
  if (warp * 32 < p.num_experts) {
    const int first_block = up_to_this - blocks + __reduce_add_sync(kAllLanes, lane < warp ? of_warp : 0);
    if (has_expert) {
      first[tid] = first_block;
      total[tid] = of_all;
      next[tid] = first_block * p.block_size + before;
    }
  }
  int of_tile = sum_segments();
  __syncthreads();

  write_tile(own_begin);
  for (uint32_t tile = own_begin + tile_ids; tile < own_end; tile += tile_ids) {
    __syncthreads();
    if (has_expert) next[tid] += of_tile;
    load_tile(tile);
    clear(0, plan.words * row);
    __syncthreads();
    mark_tile();
    __syncthreads();
    count_segments();
    __syncthreads();
    of_tile = sum_segments();
    __syncthreads();
    write_tile(tile);
  }

  // A lane takes an expert, all of the warp pad its last block and say whose the blocks are.
  const int32_t padding = static_cast<int32_t>(p.num_ids);
  const int block = static_cast<int>(blockIdx.x + gridDim.x * blockIdx.y);
  const int num_blocks = static_cast<int>(gridDim.x * gridDim.y);
  for (int begins = block + num_blocks * warp; begins < p.num_experts; begins += num_blocks * kThreads) {
    const int mine = begins + num_blocks * kWarps * lane;
    const int my_ids = mine < p.num_experts ? total[mine] : 0, my_first = mine < p.num_experts ? first[mine] : 0;
    for (uint32_t left = __ballot_sync(kAllLanes, my_ids > 0); left; left &= left - 1) {
      const int from = __ffs(left) - 1, e = begins + num_blocks * kWarps * from;
      const int its_ids = __shfl_sync(kAllLanes, my_ids, from), its_first = __shfl_sync(kAllLanes, my_first, from);
      const int its_end = e + 1 < p.num_experts ? first[e + 1] : used;
      for (int b = its_first + lane; b < its_end; b += 32) p.block_experts[b] = e;
      const int end = its_end * p.block_size;
      for (int i = its_first * p.block_size + its_ids + lane; i < end; i += 32) p.sorted_ids[i] = padding;
    }
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

template <typename Id, int kThreads, int kItems>
cudaError_t find_limits(AlignLimits& limits) {
  static std::atomic<int> clusters[kMaxDevices], shared_memory[kMaxDevices];  // 0 for not asked yet
  const auto kernel = align_kernel<Id, kThreads, kItems>;
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

// Runs of about ids_per_block ids, as far as a cluster has blocks for them.
template <typename Id, int kThreads, int kItems>
cudaError_t launch(const MoeAlignParams& p, int64_t ids_per_block, int most_replicas, cudaStream_t stream) {
  AlignLimits limits;
  if (const cudaError_t error = find_limits<Id, kThreads, kItems>(limits); error != cudaSuccess) return error;
  AlignPlan plan = {};
  plan.cluster = 1;
  while (2 * plan.cluster <= limits.cluster && p.num_ids > ids_per_block * plan.cluster) plan.cluster *= 2;
  const int64_t ids_of_words = static_cast<int64_t>(kIdsOfWord) * plan.cluster;
  plan.words_of_block = static_cast<uint32_t>(std::max<int64_t>((p.num_ids + ids_of_words - 1) / ids_of_words, 1));
  plan.words_of_share = (plan.words_of_block + most_replicas - 1) / most_replicas;
  plan.replicas = static_cast<int>((plan.words_of_block + plan.words_of_share - 1) / plan.words_of_share);
  plan.words = static_cast<int>(std::min<uint32_t>(plan.words_of_share, kThreads * kItems / kIdsOfWord));
  while (plan.words > 1 && AlignMemory(plan, p.num_experts).bytes() > static_cast<size_t>(limits.shared_bytes)) {
    plan.words = (plan.words + 1) / 2;
  }
  const uint32_t block_size = static_cast<uint32_t>(p.block_size);
  plan.block_bits = std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1;
  const size_t bytes = AlignMemory(plan, p.num_experts).bytes();
  const dim3 grid(plan.cluster, plan.replicas), block(kThreads);
  const auto kernel = align_kernel<Id, kThreads, kItems>;
  if (plan.cluster == 1) return launch_kernel(kernel, grid, block, bytes, stream, p.pdl, p, plan);
  return launch_clusters(kernel, grid, block, plan.cluster, bytes, stream, p.pdl, p, plan);
}

template <typename Id>
cudaError_t choose(const MoeAlignParams& p, cudaStream_t stream) {
  if (p.num_ids <= 256 && p.num_experts <= 256) return launch<Id, 256, 1>(p, 256, 1, stream);
  return launch<Id, 512, 4>(p, 2048, p.num_ids <= 2048 ? 8 : 4, stream);
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
  const int lane = tid % 32, warp = tid / 32, up_to_this = sum_up_to_lane(blocks);
  if (lane == 31) warp_totals[warp] = up_to_this;
  valid[tid] = tokens;
  __syncthreads();
  const int used = __reduce_add_sync(kAllLanes, warp_totals[lane]);
  first_block[tid] = up_to_this - blocks + __reduce_add_sync(kAllLanes, lane < warp ? warp_totals[lane] : 0);
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
  return params.wide_ids ? choose<int64_t>(params, stream) : choose<int32_t>(params, stream);
}

cudaError_t batched_moe_align(const BatchedMoeAlignParams& params, cudaStream_t stream) {
  const int64_t size = static_cast<int64_t>(params.num_batches) * params.blocks_per_batch * params.block_size;
  const int64_t blocks = std::clamp<int64_t>((size + 4 * kBatchThreads - 1) / (4 * kBatchThreads), 1, 128);
  return launch_kernel(batched_align_kernel, dim3(blocks), dim3(kBatchThreads), 0, stream, params.pdl, params);
}

}  // namespace vllm_b200
