#include "small_m_gemm.cuh"

namespace vllm_b200 {

template cudaError_t small_m_gemm_format<GemmFormat::kE4M3Block, false>(const SmallMGemmParams&, const GemmConfig&, cudaStream_t);
template cudaError_t small_m_gemm_format<GemmFormat::kE4M3Block, true>(const SmallMGemmParams&, const GemmConfig&, cudaStream_t);

}  // namespace vllm_b200
