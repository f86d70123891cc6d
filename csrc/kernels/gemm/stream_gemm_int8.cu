#include "stream_gemm.cuh"

namespace vllm_b200 {

template cudaError_t stream_gemm_format<GemmFormat::kInt8>(const SmallMGemmParams&, const GemmConfig&, cudaStream_t);

}  // namespace vllm_b200
