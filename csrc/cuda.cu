// Launches of the kernels in cuda_kernels.h, as cuda_plan.h lays them out. Nothing here waits or allocates, and all
// work is on the caller's stream, so that a CUDA graph can capture it.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace gan_ops {

// Two neighbouring elements in one word.
__device__ inline float2 widen_two(uint32_t word, __nv_bfloat16) {
  return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
}
__device__ inline float2 widen_two(uint32_t word, __half) { return __half22float2(reinterpret_cast<__half2&>(word)); }
__device__ inline uint32_t narrow_two(float a, float b, __nv_bfloat16) {
  auto two = __floats2bfloat162_rn(a, b);
  return reinterpret_cast<uint32_t&>(two);
}
__device__ inline uint32_t narrow_two(float a, float b, __half) {
  auto two = __floats2half2_rn(a, b);
  return reinterpret_cast<uint32_t&>(two);
}

}  // namespace gan_ops

#include "cuda_kernels.h"

namespace gan_ops {
namespace {

// One stream's launches on the current device, up to the first error.
struct Launches {
  cudaStream_t stream;
  int device = 0, processors = 0, threads = kThreads;
  cudaError_t error;

  explicit Launches(void* stream_) : stream(static_cast<cudaStream_t>(stream_)), error(cudaGetDevice(&device)) {
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }

  template <class... Given>
  void operator()(void (*kernel)(Given...), int blocks, int block, Given... given) {
    if (error != cudaSuccess) return;
    kernel<<<blocks, block, 0, stream>>>(given...);
    error = cudaGetLastError();
  }

  void clear(void* memory, size_t bytes) {
    if (error == cudaSuccess) error = cudaMemsetAsync(memory, 0, bytes, stream);
  }
};

}  // namespace

// 0 where there is no device: the call that the workspace is for then says so.
size_t workspace_bytes(const Shape& s) {
  const Launches launches(nullptr);
  return launches.error == cudaSuccess ? workspace_bytes_of(s, launches.processors, launches.threads) : 0;
}

template <class Call>
int run_on_cuda(const Call& call, void* workspace, void* stream) {
  Launches launches(stream);
  if (launches.error == cudaSuccess) run(call, workspace, launches);
  return launches.error;
}
template int run_on_cuda(const Forward&, void*, void*);
template int run_on_cuda(const Backward&, void*, void*);

}  // namespace gan_ops
