// Stands in for CUDA on a CPU, as far as csrc/cuda_kernels.h needs: blocks in turn, and in a block one system thread
// for each CUDA thread, so that ThreadSanitizer finds what a missing barrier lets happen. Shared memory is static, so
// that AddressSanitizer finds what overruns it.
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
#define __launch_bounds__(threads, blocks)
#define __shared__ static

using std::isfinite;

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

inline thread_local dim3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace stand_in {

// All of a block's threads wait for each other. Two barriers by turns: ThreadSanitizer takes a thread that leaves a
// barrier late for one that has also met those who are at that barrier again, and would miss their races.
inline pthread_barrier_t barriers[2];
inline thread_local int turn;
inline bool fenced[1024];

inline void wait_for_block() {
  pthread_barrier_wait(&barriers[turn]);
  turn = 1 - turn;
}

// Calls body() as each thread of each block; in_reverse: the last block first.
template <class Body>
void launch(int blocks, int threads, bool in_reverse, const Body& body) {
  for (auto& barrier : barriers) pthread_barrier_init(&barrier, nullptr, threads);
  gridDim.x = blocks, blockDim.x = threads;
  const auto live = [&](unsigned thread) {
    threadIdx.x = thread;
    for (int i = 0; i < blocks; ++i) {
      blockIdx.x = in_reverse ? blocks - 1 - i : i;
      body();
      wait_for_block();
    }
  };
  {
    std::vector<std::jthread> running;
    for (int thread = 0; thread < threads; ++thread) running.emplace_back(live, thread);
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

inline void __syncthreads() { stand_in::wait_for_block(); }

// What a block counts as done must be written and fenced by all of its threads: a barrier that is missing between the
// two would show only in another block, so it is made a race in this one.
inline void __threadfence() { stand_in::fenced[threadIdx.x] = true; }
inline unsigned atomicAdd(unsigned* to, unsigned v) {
  for (unsigned i = 0; i < blockDim.x; ++i) v = stand_in::fenced[i] ? v : 0;
  return __atomic_fetch_add(to, v, __ATOMIC_RELAXED);
}
inline float __ldcg(const float* from) { return *from; }

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

struct float2 {
  float x, y;
};

namespace gan_ops {

inline float2 widen_two(uint32_t word, __nv_bfloat16) {
  return {__bfloat162float({static_cast<uint16_t>(word)}), __bfloat162float({static_cast<uint16_t>(word >> 16)})};
}
inline float2 widen_two(uint32_t word, __half) {
  return {__half2float({static_cast<uint16_t>(word)}), __half2float({static_cast<uint16_t>(word >> 16)})};
}
inline uint32_t narrow_two(float a, float b, __nv_bfloat16) {
  return __float2bfloat16_rn(a).bits | uint32_t{__float2bfloat16_rn(b).bits} << 16;
}
inline uint32_t narrow_two(float a, float b, __half) {
  return __float2half_rn(a).bits | uint32_t{__float2half_rn(b).bits} << 16;
}

}  // namespace gan_ops
