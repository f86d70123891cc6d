#include "../quant/nvfp4.cuh"
#include "rms_norm_quant.cuh"

namespace vllm_b200 {
namespace {

template <typename In, bool kSwizzled>
struct Nvfp4End {
  template <int kChunks>
  static __device__ __forceinline__ void quantize(const RmsNormQuantParams& p, const Chunk<In> (&chunk)[kChunks],
                                                  int64_t row) {
    const int groups = p.hidden_size / kChunk, tiles_across = (groups + kTileGroups - 1) / kTileGroups;
    const float global_scale = *p.global_scale, global_reciprocal = __frcp_rn(global_scale);
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int group = threadIdx.x + i * blockDim.x;
      const bool valid = group < groups && row < p.rows;
      const GroupScale scale = Nvfp4::scale(absmax_bits(chunk[i]), global_scale, global_reciprocal);
      if (valid) {
        reinterpret_cast<uint2*>(p.q)[row * groups + group] = Nvfp4::pack(chunk[i], scale.factor);
      }
      if constexpr (kSwizzled) {
        uint32_t word = valid ? scale.byte << 8 * (group % kTileGroups) : 0;
        word |= __shfl_xor_sync(kFullWarp, word, 1);
        word |= __shfl_xor_sync(kFullWarp, word, 2);
        if (group % kTileGroups == 0 && group < groups) {
          const int64_t tile = row / kTileRows * tiles_across + group / kTileGroups;
          static_cast<uint32_t*>(p.scale)[swizzled_offset(tile, row % kTileRows)] = word;
        }
      } else if (valid) {
        static_cast<uint8_t*>(p.scale)[row * groups + group] = scale.byte;
      }
    }
  }
};

template <typename In>
cudaError_t choose_layout(const RmsNormQuantParams& p, bool swizzled, cudaStream_t stream) {
  return swizzled ? choose_launch<In, Nvfp4End<In, true>>(p, stream) : choose_launch<In, Nvfp4End<In, false>>(p, stream);
}

}  // namespace

cudaError_t rms_norm_nvfp4_quant(const RmsNormQuantParams& params, InputType input, bool swizzled, cudaStream_t stream) {
  if (params.rows == 0 || params.hidden_size == 0) return cudaSuccess;
  RmsNormQuantParams p = params;
  p.padded_rows = swizzled ? round_up(p.rows, kTileRows) : p.rows;
  if (input == InputType::kBFloat16) return choose_layout<__nv_bfloat16>(p, swizzled, stream);
  if (input == InputType::kHalf) return choose_layout<__half>(p, swizzled, stream);
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
