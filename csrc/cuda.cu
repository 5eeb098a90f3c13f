// Launches of the kernels in cuda_kernels.h, as cuda_plan.h lays them out. Nothing here waits, memory is the
// caller's, and all work is on the caller's stream, so that a CUDA graph can capture it.
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
  const std::function<void*(size_t)>& allocate;
  cudaStream_t stream;
  int device = 0, processors = 0, threads = kThreads;
  cudaError_t error = cudaGetDevice(&device);

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

template <class Call>
int run_on_cuda(const Call& call, const std::function<void*(size_t)>& allocate, void* stream) {
  Launches launches{allocate, static_cast<cudaStream_t>(stream)};
  auto& error = launches.error;
  auto count = cudaDevAttrMultiProcessorCount;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&launches.processors, count, launches.device);
  if (error == cudaSuccess) run(call, launches);
  return error;
}
template int run_on_cuda(const Forward&, const std::function<void*(size_t)>&, void*);
template int run_on_cuda(const Backward&, const std::function<void*(size_t)>&, void*);

}  // namespace gan_ops
