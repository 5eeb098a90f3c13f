// Stands in for CUDA on a CPU, as far as csrc/cuda_kernels.h needs: blocks in turn, and in a block one system thread
// for each CUDA thread, so that ThreadSanitizer finds what a missing barrier lets happen. Dynamic shared memory is a
// new piece of heap, of just the size asked for, for each block, so that AddressSanitizer finds what overruns it; it
// starts as NaN.
#pragma once
#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(threads)

using std::fma;
using std::sqrt;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;

namespace stand_in {

inline dim3 block_size;
inline void* block_memory;

// All of a block's threads wait for each other. Two barriers by turns: ThreadSanitizer takes a thread that leaves a
// barrier late for one that has also met those who are at that barrier again, and would miss their races.
inline pthread_barrier_t barriers[2];
inline thread_local int turn;

inline void wait_for_block() {
  pthread_barrier_wait(&barriers[turn]);
  turn = 1 - turn;
}

// Calls body() as each thread of each block; in_reverse: the last block first.
template <class Body>
void launch(dim3 grid, dim3 block, size_t shared_bytes, bool in_reverse, const Body& body) {
  const unsigned blocks = grid.x * grid.y, threads = block.x * block.y;
  for (auto& barrier : barriers) pthread_barrier_init(&barrier, nullptr, threads);
  block_size = block;
  const auto live = [&](unsigned thread) {
    threadIdx = {thread % block.x, thread / block.x, 0};
    for (unsigned i = 0; i < blocks; ++i) {
      const unsigned b = in_reverse ? blocks - 1 - i : i;
      blockIdx = {b % grid.x, b / grid.x, 0};
      if (thread == 0) block_memory = std::memset(std::malloc(shared_bytes), 0xff, shared_bytes);
      wait_for_block();
      body();
      wait_for_block();
      if (thread == 0) std::free(block_memory);
    }
  };
  {
    std::vector<std::jthread> running;
    for (unsigned thread = 0; thread < threads; ++thread) running.emplace_back(live, thread);
  }
  for (auto& barrier : barriers) pthread_barrier_destroy(&barrier);
}

// The nearest multiple of 2^-fraction_bits of v's power of two, to even at a tie; from 2^least down, of that power.
inline double round_to(double v, int fraction_bits, int least) {
  if (v == 0 || !std::isfinite(v)) return v;
  const int unit = std::max(std::ilogb(v), least) - fraction_bits;
  return std::ldexp(std::nearbyint(std::ldexp(v, -unit)), unit);
}

}  // namespace stand_in

#define blockDim stand_in::block_size

inline void __syncthreads() { stand_in::wait_for_block(); }
inline void* dynamic_shared() { return stand_in::block_memory; }

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 v) {
  const uint32_t bits = uint32_t{v.bits} << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  if (std::isnan(v)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

struct __half {
  uint16_t bits;
};

inline float __half2float(__half v) {
  const int exponent = v.bits >> 10 & 31, fraction = v.bits & 1023;
  const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                     : exponent == 0 ? std::ldexp(static_cast<float>(fraction), -24)
                                     : std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
  return v.bits >> 15 ? -size : size;
}

inline __half __float2half_rn(float v) {
  const uint16_t sign = std::signbit(v) ? 0x8000 : 0;
  if (std::isnan(v)) return {0x7fff};
  const double size = stand_in::round_to(std::fabs(v), 10, -14);
  if (size >= 65536) return {static_cast<uint16_t>(sign | 0x7c00)};
  if (size < std::ldexp(1, -14)) return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::ldexp(size, 24)))};
  const int exponent = std::ilogb(size);
  const auto fraction = static_cast<uint16_t>(std::ldexp(size, 10 - exponent));  // with the leading 1
  return {static_cast<uint16_t>(sign | ((exponent + 14) * 1024 + fraction))};
}
