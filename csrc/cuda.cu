// Launches of the kernels in cuda_kernels.h, as cuda_plan.h lays them out. Nothing here waits or allocates, and all
// work is on the caller's stream, so that a CUDA graph can capture it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

__device__ inline void* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return memory;
}

#include "cuda_kernels.h"
#include "cuda_plan.h"

namespace gan_ops {
namespace {

cudaError_t current_device(Device& device) {
  int index = 0, shared = 0;
  cudaError_t error = cudaGetDevice(&index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, index);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  device.shared_bytes = shared;
  return error;
}

template <class Work>
cudaError_t launch(const typename Launches<Work>::Launch& l, void* workspace, cudaStream_t stream) {
  constexpr int64_t kWithoutAsking = 48 * 1024;
  const Kernel<Work> kernel = kernel_for(l.step, l.work, l.geometry.vector);
  if (l.shared_bytes > kWithoutAsking) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(l.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  const Geometry& g = l.geometry;
  const dim3 grid(static_cast<unsigned>(g.strips), static_cast<unsigned>(g.chunks));
  kernel<<<grid, dim3(g.width, g.ranks), l.shared_bytes, stream>>>(l.work, g, workspace);
  return cudaGetLastError();
}

template <class Work>
int run(const Work& work, void* workspace, void* stream) {
  Device device;
  cudaError_t error = current_device(device);
  if (error != cudaSuccess) return error;
  const Launches<Work> launches = plan(work, device);
  for (int i = 0; i < launches.count && error == cudaSuccess; ++i) {
    error = launch<Work>(launches.at[i], workspace, static_cast<cudaStream_t>(stream));
  }
  return error;
}

}  // namespace

// 0 where there is no device: the call that the workspace is for then says so.
size_t workspace_bytes(const Shape& shape) {
  Device device;
  return current_device(device) == cudaSuccess ? workspace_bytes_of(shape, device) : 0;
}

int forward_cuda(const Forward& f, void* workspace, void* stream) { return run(f, workspace, stream); }

int backward_cuda(const Backward& b, void* workspace, void* stream) { return run(b, workspace, stream); }

}  // namespace gan_ops
