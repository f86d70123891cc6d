#include "align.h"

#include <cooperative_groups.h>

#include <algorithm>
#include <atomic>

#include "../common/cluster.cuh"
#include "../common/launch.cuh"

// A stable counting sort by one cluster. A block takes a run of ids, a warp a run
// of the block's; an id's rank among its expert's is what the warp has counted so
// far, plus the equal ones in the lanes before. The blocks read each other's
// counts from shared memory, so there is no workspace, and nothing to clear. Ids
// are put in order in shared memory first: those of an expert then leave side by side.

namespace vllm_b200 {
namespace {

namespace cg = cooperative_groups;

constexpr int kThreads = 1024, kFewThreads = 256;
constexpr int kItems = 8;             // ids that a thread takes at a time
constexpr int kIdsOfFewThreads = 1024;
constexpr int kIdsPerBlock = 2048;    // below that, another block costs more than it saves
constexpr int kDirectIds = 512;       // not worth the way through shared memory
constexpr int kMaxDevices = 64;
constexpr int kStaticBytes = 1024;    // shared memory that the kernels declare, and the system's
constexpr uint32_t kAllLanes = 0xffffffffu;

struct Offsets {
  int blocks;  // of ids, of all experts before
  int local;   // ids of this block of the grid, of all experts before
};

// Exclusive prefix sums over the threads of the block.
__device__ __forceinline__ Offsets prefix_sums(Offsets value, Offsets* warp_totals) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  Offsets sum = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int blocks = __shfl_up_sync(kAllLanes, sum.blocks, step), local = __shfl_up_sync(kAllLanes, sum.local, step);
    if (lane >= step) sum.blocks += blocks, sum.local += local;
  }
  if (lane == 31) warp_totals[warp] = sum;
  __syncthreads();
  const Offsets before = lane < warp ? warp_totals[lane] : Offsets{0, 0};
  return {sum.blocks - value.blocks + __reduce_add_sync(kAllLanes, before.blocks),
          sum.local - value.local + __reduce_add_sync(kAllLanes, before.local)};
}

__device__ __forceinline__ void fill(int32_t* out, int64_t count, int32_t value, int64_t thread, int64_t threads) {
  int64_t done = 0;
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    done = count / 4 * 4;
    for (int64_t i = thread; i < count / 4; i += threads) {
      reinterpret_cast<int4*>(out)[i] = make_int4(value, value, value, value);
    }
  }
  for (int64_t i = done + thread; i < count; i += threads) out[i] = value;
}

// The lanes of the warp with the same key, which is of `bits` bits.
__device__ __forceinline__ uint32_t lanes_like_this(int key, int bits) {
  uint32_t mask = kAllLanes;
  for (int b = 0; b < bits; ++b) {
    const uint32_t set = __ballot_sync(kAllLanes, key >> b & 1);
    mask &= key >> b & 1 ? set : ~set;
  }
  return mask;
}

template <typename Id>
__device__ __forceinline__ int expert_of_id(const MoeAlignParams& p, int64_t i) {
  const Id id = static_cast<const Id*>(p.topk_ids)[i];
  int expert = id >= 0 && id < p.num_experts ? static_cast<int>(id) : -1;
  if (p.expert_map && expert >= 0) expert = p.expert_map[expert];
  return expert >= 0 && expert < p.num_experts ? expert : p.num_experts;  // the last key: left out
}

template <typename Id, int kBlockThreads>
__global__ void __launch_bounds__(kBlockThreads) align_kernel(const __grid_constant__ MoeAlignParams p,
                                                             const int64_t ids_per_block, const bool stage) {
  constexpr int kWarps = kBlockThreads / 32, kTile = kBlockThreads * kItems;
  extern __shared__ int32_t shared[];
  __shared__ Offsets warp_totals[kWarps];
  const int keys = p.num_experts + 1;
  int32_t* counts = shared;                      // [kWarps][keys]: of the warp, then of the warps before
  int32_t* block_counts = counts + kWarps * keys;  // [keys]: of the block, for the cluster to read
  int32_t* next = block_counts + keys;           // [keys]: where the block's next id of the expert goes
  int32_t* local = next + keys;                  // [keys]: where the expert begins in `staged`
  int2* staged = reinterpret_cast<int2*>(shared + ((kWarps + 3) * keys + 1) / 2 * 2);  // (id, where it goes)

  pdl_trigger();
  cg::cluster_group cluster = cg::this_cluster();
  const int rank = cluster.block_rank(), blocks = cluster.num_blocks();
  const int tid = threadIdx.x, lane = tid % 32, warp = tid / 32;
  const int bits = 32 - __clz(p.num_experts);
  const int64_t begin = min(p.num_ids, rank * ids_per_block), end = min(p.num_ids, begin + ids_per_block);
  const bool one_tile = ids_per_block <= kTile;
  for (int i = tid; i < (kWarps + 1) * keys; i += kBlockThreads) counts[i] = 0;
  __syncthreads();
  pdl_wait();

  int expert[kItems], place[kItems];  // -1 for no id; rank in the warp
  int64_t warp_first = 0;
  // Ids [first, first + kTile): their experts, ranks, and the counts of every warp.
  auto count_tile = [&](int64_t first) {
    const int64_t ids = min(static_cast<int64_t>(kTile), end - first);
    const int rounds = static_cast<int>((ids + kBlockThreads - 1) / kBlockThreads);
    warp_first = first + static_cast<int64_t>(warp) * rounds * 32;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int64_t i = warp_first + 32 * j + lane;
      expert[j] = j < rounds && i < first + ids ? expert_of_id<Id>(p, i) : -1;
    }
    int32_t* mine = counts + warp * keys;
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      if (j >= rounds) break;
      const int key = expert[j] < 0 ? p.num_experts : expert[j];
      const uint32_t same = lanes_like_this(key, bits);
      place[j] = mine[key] + __popc(same & ((1u << lane) - 1));
      __syncwarp();
      if (same >> lane == 1) mine[key] = place[j] + 1;  // the last of them
      __syncwarp();
    }
  };
  // counts: of the warps before. block_counts: of all of them.
  auto sum_warps = [&]() {
    for (int e = tid; e < keys; e += kBlockThreads) {
      int sum = 0;
#pragma unroll 8
      for (int w = 0; w < kWarps; ++w) {
        const int count = counts[w * keys + e];
        counts[w * keys + e] = sum;
        sum += count;
      }
      block_counts[e] = sum;
    }
  };
  // Calls use(expert, sums before it, its own) for consecutive experts a thread.
  auto scan = [&](auto&& own, auto&& use) {
    const int per_thread = (p.num_experts + kBlockThreads - 1) / kBlockThreads, first = tid * per_thread;
    Offsets sum = {0, 0};
    for (int e = first; e < min(first + per_thread, p.num_experts); ++e) {
      const Offsets of_expert = own(e);
      sum.blocks += of_expert.blocks, sum.local += of_expert.local;
    }
    Offsets before = prefix_sums(sum, warp_totals);
    for (int e = first; e < min(first + per_thread, p.num_experts); ++e) {
      const Offsets of_expert = own(e);
      use(e, before, of_expert);
      before.blocks += of_expert.blocks, before.local += of_expert.local;
    }
  };
  auto barrier = [&]() { blocks == 1 ? __syncthreads() : cluster.sync(); };

  // Padding everywhere; behind the barrier, what is none is written over it.
  const int64_t thread = static_cast<int64_t>(rank) * kBlockThreads + tid, threads = blocks * kBlockThreads;
  fill(p.sorted_ids, p.max_sorted, static_cast<int32_t>(p.num_ids), thread, threads);
  fill(p.block_experts, p.max_blocks, -1, thread, threads);
  if (one_tile) {
    count_tile(begin);
    __syncthreads();
    sum_warps();
  } else {
    for (int64_t i = begin + tid; i < end; i += kBlockThreads) atomicAdd(&block_counts[expert_of_id<Id>(p, i)], 1);
  }
  barrier();

  scan(
      [&](int e) -> Offsets {
        int total = 0, before = 0;
#pragma unroll 4
        for (int b = 0; b < blocks; ++b) {
          const int count = blocks == 1 ? block_counts[e] : *cluster.map_shared_rank(block_counts + e, b);
          if (b < rank) before += count;
          total += count;
        }
        next[e] = before;
        return {(total + p.block_size - 1) / p.block_size, block_counts[e]};
      },
      [&](int e, Offsets before, Offsets own) {
        next[e] += before.blocks * p.block_size;
        local[e] = before.local;
        if (e % blocks == rank) {
          for (int b = 0; b < own.blocks; ++b) p.block_experts[before.blocks + b] = e;
        }
        if (e == p.num_experts - 1 && rank == 0) *p.num_sorted = (before.blocks + own.blocks) * p.block_size;
      });
  barrier();  // also: nobody reads another's counts any more

  for (int64_t first = begin; first < end; first += kTile) {
    if (!one_tile) {
      for (int i = tid; i < kWarps * keys; i += kBlockThreads) counts[i] = 0;
      __syncthreads();
      count_tile(first);
      __syncthreads();
      sum_warps();
      __syncthreads();
      scan([&](int e) -> Offsets { return {0, block_counts[e]}; },
           [&](int e, Offsets before, Offsets) { local[e] = before.local; });
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kItems; ++j) {
      const int e = expert[j];
      const int32_t i = static_cast<int32_t>(warp_first + 32 * j + lane);
      if (e < 0) continue;
      if (p.scatter_ids) p.scatter_ids[i] = e < p.num_experts ? i : -1;
      if (e == p.num_experts) continue;
      const int in_block = counts[warp * keys + e] + place[j];
      if (stage) {
        staged[local[e] + in_block] = make_int2(i, next[e] + in_block);
      } else {
        p.sorted_ids[next[e] + in_block] = i;
      }
    }
    if (stage) {
      __syncthreads();
      const int num_staged = local[p.num_experts - 1] + block_counts[p.num_experts - 1];
      for (int s = tid; s < num_staged; s += kBlockThreads) p.sorted_ids[staged[s].y] = staged[s].x;
    }
    if (one_tile) break;
    __syncthreads();
    for (int e = tid; e < p.num_experts; e += kBlockThreads) next[e] += block_counts[e];
    __syncthreads();
  }
}

template <typename Id, int kBlockThreads>
cudaError_t launch(const MoeAlignParams& p, cudaStream_t stream) {
  constexpr int kTile = kBlockThreads * kItems;
  const auto kernel = align_kernel<Id, kBlockThreads>;
  const size_t counters = ((kBlockThreads / 32 + 3) * (p.num_experts + 1) + 1) / 2 * 2 * sizeof(int32_t);
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;

  // Once a device: what the kernel may use. 0 for not asked yet.
  static std::atomic<int> clusters[kMaxDevices], shared_memory[kMaxDevices];
  if (device >= kMaxDevices) return cudaErrorInvalidDevice;
  if (clusters[device].load() == 0) {
    int bytes = 0;
    cudaError_t error = cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error != cudaSuccess) return error;
    bytes -= kStaticBytes;
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    shared_memory[device].store(bytes);
    clusters[device].store(kBlockThreads == kThreads ? max_cluster(kernel, dim3(kBlockThreads), bytes) : 1);
  }
  int cluster = 1;
  while (2 * cluster <= clusters[device].load() && p.num_ids > static_cast<int64_t>(kIdsPerBlock) * cluster) cluster *= 2;
  const int64_t ids_per_block = (p.num_ids + cluster - 1) / cluster;
  const size_t staged = std::min<int64_t>(ids_per_block, kTile) * sizeof(int2);
  const bool stage = ids_per_block > kDirectIds && counters + staged <= static_cast<size_t>(shared_memory[device].load());
  const size_t bytes = counters + (stage ? staged : 0);
  if (cluster == 1) return launch_kernel(kernel, dim3(1), dim3(kBlockThreads), bytes, stream, p.pdl, p, ids_per_block, stage);
  return launch_clusters(kernel, dim3(cluster), dim3(kBlockThreads), cluster, bytes, stream, p.pdl, p, ids_per_block,
                         stage);
}

template <typename Id>
cudaError_t choose_threads(const MoeAlignParams& p, cudaStream_t stream) {
  return p.num_ids <= kIdsOfFewThreads ? launch<Id, kFewThreads>(p, stream) : launch<Id, kThreads>(p, stream);
}

// Every block of the grid finds the sums again and writes a part of the result.
__global__ void __launch_bounds__(kThreads) batched_align_kernel(const __grid_constant__ BatchedMoeAlignParams p) {
  __shared__ Offsets warp_totals[kThreads / 32];
  __shared__ int32_t first_block[kThreads + 1], valid[kThreads];
  pdl_trigger();
  pdl_wait();
  const int tid = threadIdx.x;
  const int tokens = tid < p.num_batches ? p.num_tokens[tid] : 0;
  const int blocks = (tokens + p.block_size - 1) / p.block_size;
  const Offsets before = prefix_sums({blocks, 0}, warp_totals);
  first_block[tid] = before.blocks;
  valid[tid] = tokens;
  if (tid == kThreads - 1) first_block[kThreads] = before.blocks + blocks;
  __syncthreads();

  const int used = first_block[kThreads];
  if (blockIdx.x == 0 && tid == 0) *p.num_sorted = used * p.block_size;
  const int64_t size = static_cast<int64_t>(p.num_batches) * p.blocks_per_batch * p.block_size;
  const int64_t padding = static_cast<int64_t>(p.num_batches) * p.max_tokens;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + tid; i < size;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
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
  return params.wide_ids ? choose_threads<int64_t>(params, stream) : choose_threads<int32_t>(params, stream);
}

cudaError_t batched_moe_align(const BatchedMoeAlignParams& params, cudaStream_t stream) {
  const int64_t size = static_cast<int64_t>(params.num_batches) * params.blocks_per_batch * params.block_size;
  const int64_t blocks = std::clamp<int64_t>((size + 4 * kThreads - 1) / (4 * kThreads), 1, 128);
  return launch_kernel(batched_align_kernel, dim3(blocks), dim3(kThreads), 0, stream, params.pdl, params);
}

}  // namespace vllm_b200
