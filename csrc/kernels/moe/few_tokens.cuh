#pragma once

#include "../common/launch.cuh"
#include "../common/ring.cuh"
#include "../quant/quantizers.cuh"
#include "assignments.cuh"
#include "few_tokens.h"

// What the two kernels of few_tokens.cu share: the stream of weights, the quantised activations, the product.
//
// A tile is 16 rows of one expert's weights times all tokens of the batch, which are the columns of mma.m16n8: k32 of
// bytes, k16 of bf16. In a 64-byte half of a block of 128 bytes the k index is permuted alike in A and B, so that a
// lane's 16 contiguous bytes feed two of them.

namespace vllm_b200 {

constexpr int kRows = 16;
constexpr int kBlockBytes = 128;   // of a row, that a warp takes at once
constexpr int kTileTokens = 8;     // columns of an mma
constexpr float kEps = 1e-10f;
constexpr int kTeams = 2;  // of the warps that multiply

using Fp8 = __nv_fp8_e4m3;
using Bf16 = __nv_bfloat16;

// What the scales of e4m3 weights and activations are for; kNone: both are bf16; kInt8Tokens: both are int8. A tensor
// of weights is one expert's, and has rows of equal scales. kNvFp4: of e2m1 weights, the activations are bf16.
enum class Scales { kNone, kBlocks, kPow2Blocks, kTokens, kTensors, kInt8Tokens, kNvFp4 };

struct E2m1Pair {
  uint8_t bits;
};

template <Scales kScales>
struct Format {
  static constexpr bool kBlocks = kScales == Scales::kBlocks || kScales == Scales::kPow2Blocks;
  static constexpr bool kInt8 = kScales == Scales::kInt8Tokens;
  static constexpr bool kTokens = kScales == Scales::kTokens || kInt8;
  static constexpr bool kRowScales = kTokens || kScales == Scales::kTensors;  // one scale along all of a product
  static constexpr bool kNvFp4 = kScales == Scales::kNvFp4;
  static constexpr bool kQuantised = kScales != Scales::kNone && !kNvFp4;  // the activations
  using Value = std::conditional_t<
      kNvFp4, E2m1Pair, std::conditional_t<kInt8, int8_t, std::conditional_t<kQuantised, Fp8, Bf16>>>;
  static constexpr int kBlock = kNvFp4 ? 128 : kBlockBytes / sizeof(Value);          // columns
  static constexpr int kXBytes = kQuantised ? kBlock : 2 * kBlock;                   // of a block of activations
  static constexpr int kXLoads = kXBytes / 64;                                       // of a lane, of such a block
  static constexpr int kTileBytes = kNvFp4 ? kNvFp4TileBytes : kRows * kBlockBytes;  // of a block of weights
  static constexpr int kGateUpBlocks = kNvFp4 ? 32 : 16;                             // of a row, that come at once
};

__host__ __device__ constexpr int round_up(int value, int multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// How rows of weights are cut: into chunks of kChunkBlocks blocks, and the rest.
template <int kChunkBlocks, int kTileBytes>
struct RowChunks {
  int blocks;  // of a row
  int chunks;

  __host__ __device__ explicit RowChunks(int blocks)
      : blocks(blocks), chunks((blocks + kChunkBlocks - 1) / kChunkBlocks) {}
  __host__ __device__ int largest() const { return blocks < kChunkBlocks ? blocks : kChunkBlocks; }
  __host__ __device__ int blocks_of(int chunk) const {
    return blocks - chunk * kChunkBlocks < kChunkBlocks ? blocks - chunk * kChunkBlocks : kChunkBlocks;
  }
  __host__ __device__ int stage_bytes() const { return kTileBytes * largest(); }
};

// What a thread asks for, buffer by buffer of a ring: no more than `ahead` are on their way.
struct WeightStream {
  Ring ring;
  Ring arrived = ring;  // `ahead` buffers behind
  int ahead;
  int fetched = 0;
  uint64_t policy = evict_first_policy();

  __device__ WeightStream(const Ring& ring, int ahead) : ring(ring), ahead(ahead) {}
  // Of 16 rows of `pitch` bytes, `bytes` from `column` on. `upper` and `lower`: the first of eight rows each.
  __device__ __forceinline__ void fetch(const uint8_t* upper, const uint8_t* lower, int column, int bytes, int pitch) {
    wait();
    const uint32_t barrier = ring.full(ring.slot), to = ring.data + ring.slot * ring.stage_bytes;
    barrier_expect(barrier, kRows * bytes);
    if (bytes == pitch) {
      bulk_copy(to, upper, kRows / 2 * bytes, barrier, policy);
      bulk_copy(to + kRows / 2 * bytes, lower, kRows / 2 * bytes, barrier, policy);
    } else {
#pragma unroll 1
      for (int i = 0; i < kRows / 2; ++i) {
        bulk_copy(to + i * bytes, upper + int64_t{i} * pitch + column, bytes, barrier, policy);
        bulk_copy(to + (i + kRows / 2) * bytes, lower + int64_t{i} * pitch + column, bytes, barrier, policy);
      }
    }
    ring.advance();
  }
  // Contiguous bytes.
  __device__ __forceinline__ void fetch(const uint8_t* tile, int bytes) {
    wait();
    barrier_expect(ring.full(ring.slot), bytes);
    bulk_copy(ring.data + ring.slot * ring.stage_bytes, tile, bytes, ring.full(ring.slot), policy);
    ring.advance();
  }
  // Until the current buffer may be asked for.
  __device__ __forceinline__ void wait() {
    if (fetched++ >= ahead && ring.stages >= ahead) {
      barrier_wait(arrived.full(arrived.slot), arrived.parity);
      arrived.advance();
    }
    ring.wait_empty();
  }
};

// Activations in shared memory: 128 bytes for each block of a row, its halves swapped in every other row, so that the
// 16-byte reads of two neighbours meet no bank twice.
__device__ __forceinline__ uint32_t shared_half(int row, int half) { return ((half ^ row) & 1) * (kBlockBytes / 2); }

// A block of a row of bf16 activations as its four lanes hold it, and how it comes to shared memory.
template <Scales kScales>
struct Group;

// 32 of 128 elements in each lane, which become bytes.
struct ByteGroup {
  Chunk<Bf16> low = {}, high = {};

  __device__ __forceinline__ void load(const Bf16* block) {
    const int quad = threadIdx.x % 4;
    load_chunk<Bf16, true>(low, block + quad * kChunk);
    load_chunk<Bf16, true>(high, block + kBlockBytes / 2 + quad * kChunk);
  }
  // The bits of the calling lane's absolute maximum.
  __device__ __forceinline__ uint32_t maximum() const { return max(absmax_bits(low), absmax_bits(high)); }
  // To `destination`, 128 bytes of a row of this number.
  template <typename Out = Fp8, typename Divide>
  __device__ __forceinline__ void store(uint8_t* destination, int row, const Divide& divide) const {
    destination += threadIdx.x % 4 * kChunk;
    quantize_chunk(low, divide, reinterpret_cast<Out*>(destination + shared_half(row, 0)));
    quantize_chunk(high, divide, reinterpret_cast<Out*>(destination + shared_half(row, 1)));
  }
};

template <bool kPow2>
struct ScaledGroup : ByteGroup {
  // To `destination`, 128 bytes of a row of this number; returns the scale. The whole warp calls it.
  __device__ __forceinline__ float quantize(uint8_t* destination, int row, bool write) const {
    using Divide = std::conditional_t<kPow2, PowerOfTwoDivisor, Divisor>;
    // Four lanes hold a group as they would one of 64 elements.
    const float scale = group_scale<Fp8, 4 * kChunk, kPow2>(maximum(), kEps);
    if (write) store(destination, row, Divide(scale));
    return scale;
  }
};
template <> struct Group<Scales::kBlocks> : ScaledGroup<false> {};
template <> struct Group<Scales::kPow2Blocks> : ScaledGroup<true> {};

// Those with one scale for a row or for all: it comes from the bits of the largest value, unless it is given. vLLM
// divides by the scale of a token.
template <> struct Group<Scales::kTokens> : ByteGroup {
  static __device__ __forceinline__ float scale_of(uint32_t largest, const float*) {
    return token_scale_e4m3(largest, nullptr);
  }
  __device__ __forceinline__ void quantize(uint8_t* destination, int row, uint32_t largest, const float*) const {
    store(destination, row, Divisor(scale_of(largest, nullptr)));
  }
};

// In int8 it multiplies, and rounds as its Triton kernel does: ties away from zero.
template <> struct Group<Scales::kInt8Tokens> : ByteGroup {
  static __device__ __forceinline__ float scale_of(uint32_t largest, const float*) {
    return divide_by<127>(floored(largest));
  }
  __device__ __forceinline__ void quantize(uint8_t* destination, int row, uint32_t largest, const float*) const {
    store<RoundedInt8>(destination, row, Multiplier(__fdiv_rn(127.0f, floored(largest))));
  }
  static __device__ __forceinline__ float floored(uint32_t largest) {
    return __uint_as_float(max(largest, __float_as_uint(kEps)));
  }
};

// It multiplies by the reciprocal of a tensor's, which it takes from the largest value that is a number.
template <> struct Group<Scales::kTensors> : ByteGroup {
  static __device__ __forceinline__ float scale_of(uint32_t largest, const float* given) {
    return given != nullptr ? *given : divide_by<448>(__uint_as_float(largest));
  }
  __device__ __forceinline__ void quantize(uint8_t* destination, int row, uint32_t largest, const float* given) const {
    store(destination, row, Multiplier(__frcp_rn(scale_of(largest, given))));
  }
  __device__ __forceinline__ uint32_t maximum() const {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kChunk / 2; ++i) {
      const __nv_bfloat162 a = reinterpret_cast<const __nv_bfloat162&>(low.word[i]);
      const __nv_bfloat162 b = reinterpret_cast<const __nv_bfloat162&>(high.word[i]);
      const __nv_bfloat162 larger = __hmax2(__habs2(a), __habs2(b));  // NaN where both are
      const uint32_t two = reinterpret_cast<const uint32_t&>(larger);
      bits = max(bits, max(without_nan(two << 16), without_nan(two & 0xffff0000u)));
    }
    return bits;
  }
  static __device__ __forceinline__ uint32_t without_nan(uint32_t bits) { return bits > 0x7f800000u ? 0 : bits; }
};

// 16 of 64 elements in each lane, not quantised.
template <> struct Group<Scales::kNone> {
  uint4 low = {}, high = {};

  __device__ __forceinline__ void load(const Bf16* block) {
    const uint4* const own = reinterpret_cast<const uint4*>(block) + threadIdx.x % 4;
    low = own[0], high = own[4];
  }
  __device__ __forceinline__ void store(uint8_t* destination, int row) const {
    destination += threadIdx.x % 4 * 16;
    *reinterpret_cast<uint4*>(destination + shared_half(row, 0)) = low;
    *reinterpret_cast<uint4*>(destination + shared_half(row, 1)) = high;
  }
};

// The index of the calling warp, as a value that the compiler knows to be the same in all lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(kFullWarp, static_cast<int>(threadIdx.x / 32), 0); }

template <typename Value>
using Sum = std::conditional_t<std::is_same_v<Value, int8_t>, int32_t, float>;

template <typename Value>
__device__ __forceinline__ void mma(Sum<Value> (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                    uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<Value, Fp8>) {
    asm("mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else if constexpr (std::is_same_v<Value, int8_t>) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  }
}

// One lane's part of 16 rows by a block of weights.
template <typename Value>
struct WeightBlock {
  static constexpr int kStep = kBlockBytes;  // from a block in a buffer to the next
  uint4 upper[2], lower[2];

  // Of a block in a buffer of the ring with rows of `pitch` bytes: where the calling lane's part is.
  static __device__ __forceinline__ int lane_offset(int pitch) {
    return threadIdx.x % 32 / 4 * pitch + threadIdx.x % 4 * 16;
  }
  __device__ __forceinline__ void load(uint32_t address, int pitch) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      upper[half] = load_shared(address + half * (kBlockBytes / 2));
      lower[half] = load_shared(address + kRows / 2 * pitch + half * (kBlockBytes / 2));
    }
  }
  // product[0], product[1]: row lane / 4, columns lane % 4 * 2 and the one after; product[2], product[3]: 8 rows on.
  // x: both halves of the block in the row of activations that is column lane / 4.
  __device__ __forceinline__ void multiply(float (&product)[4], const uint4 (&x)[2]) const {
    Sum<Value> sum[4] = {}, other[4] = {};
    add_product(sum, other, x);
#pragma unroll
    for (int i = 0; i < 4; ++i) product[i] = static_cast<float>(sum[i] + other[i]);
  }
  // In two sums, which do not wait for each other.
  __device__ __forceinline__ void add_product(Sum<Value> (&sum)[4], Sum<Value> (&other)[4], const uint4 (&x)[2]) const {
    mma<Value>(sum, upper[0].x, lower[0].x, upper[0].y, lower[0].y, x[0].x, x[0].y);
    mma<Value>(other, upper[1].x, lower[1].x, upper[1].y, lower[1].y, x[1].x, x[1].y);
    mma<Value>(sum, upper[0].z, lower[0].z, upper[0].w, lower[0].w, x[0].z, x[0].w);
    mma<Value>(other, upper[1].z, lower[1].z, upper[1].w, lower[1].w, x[1].z, x[1].w);
  }
};

}  // namespace vllm_b200
