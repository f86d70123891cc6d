#include "small_m_gemm.cuh"

namespace vllm_b200 {

template cudaError_t small_m_gemm_format<GemmFormat::kNvFp4, false>(const SmallMGemmParams&, const GemmConfig&, cudaStream_t);

}  // namespace vllm_b200
