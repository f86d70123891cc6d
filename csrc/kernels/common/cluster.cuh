#pragma once

#include <cuda_runtime.h>

namespace vllm_b200 {

// launch_kernel of launch.cuh for a grid of clusters of `cluster` blocks. More
// than 8 blocks are not portable: see max_cluster().
template <typename... Params, typename... Args>
cudaError_t launch_clusters(void (*kernel)(Params...), dim3 grid, dim3 block, int cluster, size_t smem_bytes,
                            cudaStream_t stream, bool pdl, Args... args) {
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster;
  attributes[0].val.clusterDim.y = 1;
  attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = pdl ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, Params(args)...);
}

// The largest cluster of these blocks, up to 16, that the GPU takes: 8 where it
// does not say. Allows the kernel clusters of that size.
template <typename... Params>
int max_cluster(void (*kernel)(Params...), dim3 block, size_t smem_bytes) {
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    cudaGetLastError();
    return 8;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(16);
  config.blockDim = block;
  config.dynamicSmemBytes = smem_bytes;
  int size = 0;
  if (cudaOccupancyMaxPotentialClusterSize(&size, kernel, &config) != cudaSuccess) {
    cudaGetLastError();
    return 8;
  }
  return size < 1 ? 1 : size > 16 ? 16 : size;
}

}  // namespace vllm_b200
