#include "small_m_gemm.h"

namespace vllm_b200 {

// One source file each, for the compiler's sake: small_m_gemm_*.cu and stream_gemm_*.cu.
template <GemmFormat kFormat, bool kQuantize>
cudaError_t small_m_gemm_format(const SmallMGemmParams& params, const GemmConfig& config, cudaStream_t stream);
template <GemmFormat kFormat>
cudaError_t stream_gemm_format(const SmallMGemmParams& params, const GemmConfig& config, cudaStream_t stream);

namespace {

cudaError_t stream_gemm(const SmallMGemmParams& params, GemmFormat format, const GemmConfig& config, cudaStream_t stream) {
  if (params.m > kStreamGemmMaxTokens || config.stages < 2) return cudaErrorInvalidValue;
  switch (format) {
    case GemmFormat::kE4M3Block: return stream_gemm_format<GemmFormat::kE4M3Block>(params, config, stream);
    case GemmFormat::kE4M3: return stream_gemm_format<GemmFormat::kE4M3>(params, config, stream);
    case GemmFormat::kInt8: return stream_gemm_format<GemmFormat::kInt8>(params, config, stream);
    case GemmFormat::kBFloat16: return stream_gemm_format<GemmFormat::kBFloat16>(params, config, stream);
    case GemmFormat::kHalf:
    case GemmFormat::kNvFp4: break;
  }
  return cudaErrorInvalidValue;
}

}  // namespace

cudaError_t small_m_gemm(const SmallMGemmParams& params, GemmFormat format, bool quantize, const GemmConfig& config,
                         cudaStream_t stream) {
  if (config.stages != 0) return quantize ? cudaErrorInvalidValue : stream_gemm(params, format, config, stream);
  const bool valid = config.warps >= 1 && config.chunks >= 0 && config.chunks <= config.warps &&
                     (config.cluster == 1 || config.cluster == 2 || config.cluster == 4 || config.cluster == 8) &&
                     params.m <= (quantize ? kSmallGemmMaxQuantizedTokens : kSmallGemmMaxTokens);
  if (!valid || (quantize && format != GemmFormat::kE4M3Block)) return cudaErrorInvalidValue;
  switch (format) {
    case GemmFormat::kE4M3Block:
      return quantize ? small_m_gemm_format<GemmFormat::kE4M3Block, true>(params, config, stream)
                      : small_m_gemm_format<GemmFormat::kE4M3Block, false>(params, config, stream);
    case GemmFormat::kE4M3: return small_m_gemm_format<GemmFormat::kE4M3, false>(params, config, stream);
    case GemmFormat::kInt8: return small_m_gemm_format<GemmFormat::kInt8, false>(params, config, stream);
    case GemmFormat::kBFloat16: return small_m_gemm_format<GemmFormat::kBFloat16, false>(params, config, stream);
    case GemmFormat::kHalf: return small_m_gemm_format<GemmFormat::kHalf, false>(params, config, stream);
    case GemmFormat::kNvFp4: return small_m_gemm_format<GemmFormat::kNvFp4, false>(params, config, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace vllm_b200
