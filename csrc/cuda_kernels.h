// The CUDA kernels. Whoever includes this has defined CUDA's own words before (__device__, threadIdx, __nv_bfloat16,
// ...): nvcc's headers and cuda.cu, or tests/cuda_stand_in.h, with which the tests run them on a CPU.
//
// A tensor is a table of rows; a thread has one column of it, a vector of 16 bytes wide, and goes down the rows:
//
//                 span                 channels_last, 2-D: a row is a position, a vector has 4 or 8 channels, a span is
//               |-------|              one column. Contiguous: a row is a picture, a channel has hw values of it, and a
//               . . . . . . . .        vector lies in one channel. Where 16 bytes do not fit, a vector is one element.
//   rank 0   -> a b c d e f g h  row 0
//   rank 1   -> a b c d e f g h  row 1       a..h: columns of one block, `width` of them, of one channel or several
//   rank 0   -> a b c d e f g h  row 2       a thread: one letter and one rank, up to 256 of them
//   rank 1   -> a b c d e f g h  row 3       `chunk` rows; the blocks below do the rest, and those beside it the other
//               . . . . . . . .              channels (`groups`) or the rest of the same one (`pieces`)
//
// Statistics take two launches. `reduce` leaves two sums for each part of a channel in the workspace, and the part that
// comes last adds them up, in an order of its own: there are no floating-point atomics, and equal calls give equal bits.
// `apply` goes over the blocks in reverse, since the L2 cache holds what reduce has read last.
#pragma once
#include <cstring>
#include <type_traits>

#include "cuda_plan.h"
#include "params.h"

namespace gan_ops {

__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }
__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ inline void narrow(float v, __half& to) { to = __float2half_rn(v); }

// A NaN takes the second way, and stays NaN. `test` decides: of a gradient, what was activated.
__device__ inline float leaky(float v, float test, float slope) { return test > 0 ? v : v * slope; }

// The normalised value. x - mean comes first: x * scale + shift would lose a small spread around a large mean. Forward
// and backward must agree on its sign, so the fused multiplication is not left to the compiler.
__device__ inline float affine(float apart, float scale, float bias) { return fmaf(apart, scale, bias); }

// Channel c's `weight` or `bias`.
__device__ inline float at(const void* numbers, int64_t c, float otherwise) {
  return numbers ? static_cast<const float*>(numbers)[c] : otherwise;
}

// The naive way: a thread for each channel, value after value, in double. The tests hold the fast way against it, and have its gradient. --

// Where value i of channel c lies, of `channels` in all.
__device__ inline int64_t place(const Shape& s, int64_t i, int64_t c, int64_t channels) {
  return (i / s.hw * channels + c) * s.hw + i % s.hw;
}

template <typename T>
__global__ void naive_forward(Forward f) {
  const int64_t c = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, half = f.shape.c / (f.out[1] ? 2 : 1);
  const double count = f.shape.n * f.shape.hw;
  if (c >= f.shape.c) return;
  double mean = 0, variance = 0;
  for (int pass = 0; pass < 3; ++pass) {  // mean, variance, output
    for (int64_t i = 0; i < count; ++i) {
      T v = static_cast<const T*>(f.x)[place(f.shape, i, c, f.shape.c)];
      if (f.right) narrow(widen(v) + widen(static_cast<const T*>(f.right)[place(f.shape, i, c, f.shape.c)]), v);
      if (f.sum) static_cast<T*>(f.sum)[place(f.shape, i, c, f.shape.c)] = v;
      const double a = f.activate_first && !(widen(v) > 0) ? widen(v) * f.slope : widen(v);
      if (pass == 0) mean += a / count;
      if (pass == 1) variance += (a - mean) * (a - mean) / count;
      double y = f.normalise ? (a - mean) / sqrt(variance + f.eps) * at(f.weight, c, 1) + at(f.bias, c, 0) : a;
      if (f.normalise && !f.activate_first && !(y > 0)) y *= f.slope;
      if (pass == 2) narrow(float(y), static_cast<T*>(f.out[c / half])[place(f.shape, i, c % half, half)]);
    }
    if (pass == 1 && !f.training) mean = at(f.running_mean, c, 0), variance = at(f.running_var, c, 1);
  }
  if (!f.normalise) return;
  static_cast<float*>(f.mean)[c] = mean, static_cast<float*>(f.rstd)[c] = 1 / sqrt(variance + f.eps);
  if (!f.training || !f.running_mean) return;
  const double spread = f.biased ? variance : variance * count / (count - 1);
  static_cast<float*>(f.running_mean)[c] += f.momentum * (mean - at(f.running_mean, c, 0));
  static_cast<float*>(f.running_var)[c] += f.momentum * (spread - at(f.running_var, c, 0));
}

// The fast way ------------------------------------------------------------------------------------------------------

// What one load brings, in words: 16-bit elements apart would occupy a register each.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  uint32_t words[sizeof(T) * V / 4];
};
template <typename T>
struct Vector<T, 1> {
  T value;
};

template <typename T, int V>
__device__ void unpack(const Vector<T, V>& from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = widen(from.value);
  } else if constexpr (sizeof(T) == 4) {
    memcpy(to, from.words, sizeof to);
  } else {
    for (int i = 0; i < V / 2; ++i) {
      const float2 two = widen_two(from.words[i], T{});
      to[2 * i] = two.x, to[2 * i + 1] = two.y;
    }
  }
}

template <typename T, int V>
__device__ void pack(const float (&from)[V], Vector<T, V>& to) {
  if constexpr (V == 1) {
    narrow(from[0], to.value);
  } else if constexpr (sizeof(T) == 4) {
    memcpy(to.words, from, sizeof from);
  } else {
    for (int i = 0; i < V / 2; ++i) to.words[i] = narrow_two(from[2 * i], from[2 * i + 1], T{});
  }
}

// Where a thread works. LANES: channels of a vector.
template <typename T, int V, int LANES>
struct Place {
  int group, part, rank, ranks, rows;  // rank of ranks; rows of the block, 0 where the thread has no column
  int channel, slot, sharers;          // its first; among the block's sums; slots of one channel
  int64_t first, column, half_row, half_column;         // first: row of the block
  bool inside, second;                                  // of the tensor; of its halves

  __device__ Place(const Geometry& g, bool split, int block) {
    group = block % g.groups, part = block / g.groups;
    const int x = threadIdx.x % g.width, channels = g.width / g.span, inner = part % g.pieces * g.span + x % g.span;
    rank = threadIdx.x / g.width, ranks = blockDim.x / g.width;
    slot = (rank * g.span + x % g.span) * channels + x / g.span;
    sharers = ranks * g.span;
    const int span = group * channels + x / g.span;
    channel = span * LANES;
    inside = channel < g.c && inner < g.plane;
    first = int64_t{part / g.pieces} * g.chunk;
    rows = inside ? static_cast<int>(g.rows - first < g.chunk ? g.rows - first : g.chunk) : 0;
    column = int64_t{span} * g.plane + inner;
    half_row = split ? g.row / 2 : g.row;
    second = column >= half_row;
    half_column = second ? column - half_row : column;
  }

  // The thread's column in the block's first row, of a tensor and of one that has half its channels.
  template <typename P>
  __device__ auto* in(P* tensor, const Geometry& g) const {
    using Vectors = std::conditional_t<std::is_const_v<P>, const Vector<T, V>, Vector<T, V>>;
    return static_cast<Vectors*>(tensor) + first * g.row + column;
  }
  template <typename P>
  __device__ auto* in_half(P* const (&halves)[2]) const {
    using Vectors = std::conditional_t<std::is_const_v<P>, const Vector<T, V>, Vector<T, V>>;
    return static_cast<Vectors*>(second ? halves[1] : halves[0]) + first * half_row + half_column;
  }
};

// The thread's vectors of kUnroll rows from r on: loads that do not wait for each other.
template <typename T, int V, class P>
__device__ void fetch(const Vector<T, V>* from, int row, int r, const P& p, Vector<T, V> (&to)[kUnroll]) {
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (r + u * p.ranks < p.rows) to[u] = from[(r + u * p.ranks) * row];
  }
}

// What the thread's channels are normalised with.
template <int LANES>
struct Norm {
  float mean[LANES] = {}, scale[LANES] = {}, bias[LANES] = {};

  template <class Work>
  __device__ Norm(const Work& w, int channel, bool inside) {
    for (int i = 0; i < LANES && inside; ++i) {
      mean[i] = at(w.mean, channel + i, 0), bias[i] = at(w.bias, channel + i, 0);
      scale[i] = at(w.weight, channel + i, 1) * at(w.rstd, channel + i, 0);
    }
  }
};

// Adds up the sums of all threads of a channel: in `shared`, by lane, where the slots of the first sharers were.
template <int N, class P>
__device__ void add_up(const float (&sums)[N], const P& p, int channels, float (*shared)[kThreads]) {
  for (int i = 0; i < N; ++i) shared[i][p.slot] = sums[i];
  for (int live = p.sharers, keep; live > 1; live = keep) {
    keep = (live + 1) / 2;
    __syncthreads();
    if (p.slot >= (live - keep) * channels) continue;
    for (int i = 0; i < N; ++i) shared[i][p.slot] += shared[i][p.slot + keep * channels];
  }
  __syncthreads();
}

// Adds up two sums for each of the thread's channels over all blocks: true in the block of a group that comes last, for
// which `shared` has the result.
template <int LANES, class P>
__device__ bool add_up_all(float (&sums)[2 * LANES], const P& p, const Geometry& g, float (*shared)[kThreads]) {
  __shared__ bool last;
  const int channels = g.width / g.span, channel = p.group * channels * LANES;  // the group's first
  add_up(sums, p, channels, shared);
  for (int i = threadIdx.x; i < channels * LANES; i += blockDim.x) {
    float* const to = g.partials + 2 * int64_t{p.part} * g.padded + channel + i;
    to[0] = shared[i % LANES][i / LANES], to[g.padded] = shared[LANES + i % LANES][i / LANES];
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(g.done + p.group, 1u) == g.parts - 1u;
  __syncthreads();
  if (!last) return false;
  __threadfence();
  for (int i = 0; i < 2 * LANES; ++i) sums[i] = 0;
#pragma unroll 4
  for (int part = p.slot / channels; part < g.parts; part += p.sharers) {
    const float* const from = g.partials + 2 * int64_t{part} * g.padded + channel + p.slot % channels * LANES;
    for (int i = 0; i < 2 * LANES; ++i) sums[i] += __ldcg(from + (i < LANES ? i : i - LANES + g.padded));
  }
  add_up(sums, p, channels, shared);
  return true;
}

enum class Mode { sum, norm, activate_first };  // of a seam that is not normalised; the two orders

// The value of channel c in the first row: statistics are sums of differences from it, which lose little unless it lies
// very many deviations from the mean. A seam's is rounded, as all its values are.
template <typename T, Mode MODE>
__device__ float origin_of(const Forward& f, int c) {
  const int64_t place = c * f.shape.hw;
  T v = static_cast<const T*>(f.x)[place];
  if (MODE == Mode::sum) narrow(widen(v) + widen(static_cast<const T*>(f.right)[place]), v);
  const float a = MODE == Mode::activate_first ? leaky(widen(v), widen(v), f.slope) : widen(v);
  return isfinite(a) ? a : 0;
}

// Mean and 1/deviation of each channel, and running statistics. Mode::sum: of left + right, which is written.
template <typename T, int V, int LANES, Mode MODE>
__global__ void __launch_bounds__(kThreads, kResident) forward_reduce(Forward f, Geometry g) {
  __shared__ float shared[2 * LANES][kThreads];
  start_next_launch();
  const Place<T, V, LANES> p(g, false, blockIdx.x);
  const auto *const x = p.in(f.x, g), *const right = p.in(f.right, g);
  auto* const sum = p.in(f.sum, g);
  const int row = static_cast<int>(g.row);
  const float slope = f.slope;
  float origin[LANES] = {}, sums[2 * LANES] = {};
  for (int r = p.rank; r < p.rows; r += kUnroll * p.ranks) {
    Vector<T, V> held[kUnroll], other[kUnroll];
    fetch(x, row, r, p, held);
    if (MODE == Mode::sum) fetch(right, row, r, p, other);
    if (r == p.rank) {  // behind the first loads, which take as long
      for (int i = 0; i < LANES; ++i) origin[i] = origin_of<T, MODE>(f, p.channel + i);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (r + u * p.ranks >= p.rows) break;
      float v[V];
      unpack(held[u], v);
      if (MODE == Mode::sum) {
        float w[V];
        unpack(other[u], w);
        for (int j = 0; j < V; ++j) v[j] += w[j];
        pack(v, held[u]);
        sum[(r + u * p.ranks) * row] = held[u];
        unpack(held[u], v);
      }
      for (int j = 0; j < V; ++j) {
        const float apart = (MODE == Mode::activate_first ? leaky(v[j], v[j], slope) : v[j]) - origin[j % LANES];
        sums[j % LANES] += apart;
        sums[LANES + j % LANES] = fmaf(apart, apart, sums[LANES + j % LANES]);
      }
    }
  }
  if (!add_up_all<LANES>(sums, p, g, shared)) return;
  const int channels = g.width / g.span * LANES;
  const float count = static_cast<float>(f.shape.n * f.shape.hw);
  for (int i = threadIdx.x; i < channels && p.group * channels + i < g.c; i += blockDim.x) {
    const int c = p.group * channels + i;
    const float total = shared[i % LANES][i / LANES], apart = total / count;
    const float rest = shared[LANES + i % LANES][i / LANES] - total * apart, squares = rest < 0 ? 0 : rest;
    const float mean = origin_of<T, MODE>(f, c) + apart;
    static_cast<float*>(f.mean)[c] = mean;
    static_cast<float*>(f.rstd)[c] = 1 / sqrtf(squares / count + float(f.eps));
    if (!f.running_mean) continue;
    float &moved = static_cast<float*>(f.running_mean)[c], &spread = static_cast<float*>(f.running_var)[c];
    moved += float(f.momentum) * (mean - moved);
    spread += float(f.momentum) * (squares / (f.biased ? count : count - 1) - spread);
  }
}

// In evaluation, in place of forward_reduce.
__global__ void forward_recall(Forward f) {
  const int c = blockIdx.x * blockDim.x + threadIdx.x;
  start_next_launch(), wait_for_previous_launch();  // a seam's sum, which the next launch reads
  if (c >= f.shape.c) return;
  static_cast<float*>(f.mean)[c] = at(f.running_mean, c, 0);
  static_cast<float*>(f.rstd)[c] = 1 / sqrtf(at(f.running_var, c, 1) + float(f.eps));
}

// The output, or its two halves. Mode::sum: of left + right, not normalised.
template <typename T, int V, int LANES, Mode MODE>
__global__ void __launch_bounds__(kThreads, kResident) forward_apply(Forward f, Geometry g) {
  const Place<T, V, LANES> p(g, f.out[1], gridDim.x - 1 - blockIdx.x);
  if (!p.inside) return;
  const auto *const x = p.in(f.x, g), *const right = p.in(f.right, g);
  auto* const out = p.in_half(f.out);
  const int row = static_cast<int>(g.row), half_row = static_cast<int>(p.half_row);
  const float slope = f.slope;
  wait_for_previous_launch();
  const Norm<LANES> norm(f, p.channel, MODE != Mode::sum);
  for (int r = p.rank; r < p.rows; r += kUnroll * p.ranks) {
    Vector<T, V> held[kUnroll], other[kUnroll];
    fetch(x, row, r, p, held);
    if (MODE == Mode::sum) fetch(right, row, r, p, other);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (r + u * p.ranks >= p.rows) break;
      float v[V], w[V];
      unpack(held[u], v);
      if (MODE == Mode::sum) unpack(other[u], w);
      for (int j = 0; j < V; ++j) {
        const int i = j % LANES;
        if (MODE == Mode::sum) v[j] += w[j];
        if (MODE == Mode::activate_first) v[j] = leaky(v[j], v[j], slope);
        if (MODE != Mode::sum) v[j] = affine(v[j] - norm.mean[i], norm.scale[i], norm.bias[i]);
        if (MODE == Mode::norm) v[j] = leaky(v[j], v[j], slope);
      }
      pack(v, held[u]);
      out[(r + u * p.ranks) * half_row] = held[u];
    }
  }
}

// dweight, dbias, and for dx what each value and each distance from the mean is to have less.
template <typename T, int V, int LANES, bool FIRST>
__global__ void __launch_bounds__(kThreads, kResident) backward_reduce(Backward b, Geometry g) {
  __shared__ float shared[2 * LANES][kThreads];
  start_next_launch();
  const Place<T, V, LANES> p(g, b.grad[1], blockIdx.x);
  const auto *const x = p.in(b.x, g), *const grad = p.in_half(b.grad);
  const int row = static_cast<int>(g.row), half_row = static_cast<int>(p.half_row);
  const float slope = b.slope;
  const Norm<LANES> norm(b, p.channel, p.inside);
  float sums[2 * LANES] = {};
  for (int r = p.rank; r < p.rows; r += kUnroll * p.ranks) {
    Vector<T, V> held[kUnroll], grads[kUnroll];
    fetch(x, row, r, p, held), fetch(grad, half_row, r, p, grads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (r + u * p.ranks >= p.rows) break;
      float v[V], d[V];
      unpack(held[u], v), unpack(grads[u], d);
      for (int j = 0; j < V; ++j) {
        const int i = j % LANES;
        const float apart = (FIRST ? leaky(v[j], v[j], slope) : v[j]) - norm.mean[i];
        if (!FIRST) d[j] = leaky(d[j], affine(apart, norm.scale[i], norm.bias[i]), slope);
        sums[i] += d[j];
        sums[LANES + i] = fmaf(d[j], apart, sums[LANES + i]);
      }
    }
  }
  if (!add_up_all<LANES>(sums, p, g, shared)) return;
  const int channels = g.width / g.span * LANES;
  const float count = static_cast<float>(b.shape.n * b.shape.hw);
  for (int i = threadIdx.x; i < channels && p.group * channels + i < g.c; i += blockDim.x) {
    const int c = p.group * channels + i;
    const float sum = shared[i % LANES][i / LANES], product = shared[LANES + i % LANES][i / LANES];
    const float own = at(b.rstd, c, 0), factor = at(b.weight, c, 1) * own / count;
    if (b.dweight) static_cast<float*>(b.dweight)[c] = product * own;
    if (b.dbias) static_cast<float*>(b.dbias)[c] = sum;
    g.terms[c] = factor * sum;
    g.terms[g.padded + c] = factor * product * own * own;
  }
}

template <typename T, int V, int LANES, bool FIRST, bool TRAINING>
__global__ void __launch_bounds__(kThreads, kResident) backward_apply(Backward b, Geometry g) {
  const Place<T, V, LANES> p(g, b.grad[1], gridDim.x - 1 - blockIdx.x);
  if (!p.inside) return;
  const auto *const x = p.in(b.x, g), *const grad = p.in_half(b.grad);
  auto* const dx = p.in(b.dx, g);
  const int row = static_cast<int>(g.row), half_row = static_cast<int>(p.half_row);
  const float slope = b.slope;
  wait_for_previous_launch();
  const Norm<LANES> norm(b, p.channel, true);
  float level[LANES] = {}, tilt[LANES] = {};
  for (int i = 0; i < LANES && TRAINING; ++i) {
    level[i] = g.terms[p.channel + i], tilt[i] = g.terms[g.padded + p.channel + i];
  }
  for (int r = p.rank; r < p.rows; r += kUnroll * p.ranks) {
    Vector<T, V> held[kUnroll], grads[kUnroll];
    fetch(x, row, r, p, held), fetch(grad, half_row, r, p, grads);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (r + u * p.ranks >= p.rows) break;
      float v[V], d[V];
      unpack(held[u], v), unpack(grads[u], d);
      for (int j = 0; j < V; ++j) {
        const int i = j % LANES;
        const float apart = (FIRST ? leaky(v[j], v[j], slope) : v[j]) - norm.mean[i];
        if (!FIRST) d[j] = leaky(d[j], affine(apart, norm.scale[i], norm.bias[i]), slope);
        d[j] *= norm.scale[i];
        if (TRAINING) d[j] -= fmaf(apart, tilt[i], level[i]);
        if (FIRST) d[j] = leaky(d[j], v[j], slope);
      }
      pack(d, held[u]);
      dx[(r + u * p.ranks) * row] = held[u];
    }
  }
}

// Choice ------------------------------------------------------------------------------------------------------------

template <typename T, int V, int LANES>
void (*kernel_of(const Forward& f, bool reduces))(Forward, Geometry) {
  constexpr Mode first = Mode::activate_first, norm = Mode::norm, sum = Mode::sum;
  if (f.right) return reduces ? forward_reduce<T, V, LANES, sum> : forward_apply<T, V, LANES, sum>;
  if (f.activate_first) return reduces ? forward_reduce<T, V, LANES, first> : forward_apply<T, V, LANES, first>;
  return reduces ? forward_reduce<T, V, LANES, norm> : forward_apply<T, V, LANES, norm>;
}

template <typename T, int V, int LANES>
void (*kernel_of(const Backward& b, bool reduces))(Backward, Geometry) {
  if (reduces) return b.activate_first ? backward_reduce<T, V, LANES, true> : backward_reduce<T, V, LANES, false>;
  if (b.activate_first) return b.training ? backward_apply<T, V, LANES, true, true> : backward_apply<T, V, LANES, true, false>;
  return b.training ? backward_apply<T, V, LANES, false, true> : backward_apply<T, V, LANES, false, false>;
}

template <typename T, class Work>
auto kernel_in(const Work& work, int vector, bool reduces) {
  constexpr int full = 16 / sizeof(T);
  if (vector == 1) return kernel_of<T, 1, 1>(work, reduces);
  return work.shape.hw == 1 ? kernel_of<T, full, full>(work, reduces) : kernel_of<T, full, 1>(work, reduces);
}

template <class Work>
auto kernel_for(const Work& work, int vector, bool reduces) {
  if (work.shape.type == Type::f32) return kernel_in<float>(work, vector, reduces);
  return work.shape.type == Type::bf16 ? kernel_in<__nv_bfloat16>(work, vector, reduces) : kernel_in<__half>(work, vector, reduces);
}

// Calls launch(kernel, blocks, threads, arguments) for all of a call, in order.
template <class Launch>
void run(const Forward& f, void* workspace, Launch& launch) {
  const int vector = vector_of(f.shape, f.out[1], {f.x, f.right, f.sum, f.out[0], f.out[1]});
  const Geometry g = plan(f.shape, vector, workspace, launch.processors, launch.threads);
  const auto launch_one = [&](const Forward& work, bool reduces) {
    launch(kernel_for(work, vector, reduces), g.blocks(), g.width * g.ranks, work, g);
  };
  Forward rest = f;
  if (f.normalise && f.right) rest.x = f.sum, rest.right = nullptr;
  if (f.normalise && f.training) {
    launch.clear(g.done, g.groups * sizeof(unsigned));
    launch_one(f, true);
  } else if (f.normalise) {
    Forward sum = f;
    sum.out[0] = f.sum, sum.out[1] = nullptr;
    if (f.right) launch_one(sum, false);
    launch(forward_recall, static_cast<int>(ceil_div(g.c, launch.threads)), launch.threads, f);
  }
  launch_one(rest, false);
}

template <class Launch>
void run(const Backward& b, void* workspace, Launch& launch) {
  const int vector = vector_of(b.shape, b.grad[1], {b.grad[0], b.grad[1], b.x, b.dx});
  const Geometry g = plan(b.shape, vector, workspace, launch.processors, launch.threads);
  if (b.training || b.dweight || b.dbias) {
    launch.clear(g.done, g.groups * sizeof(unsigned));
    launch(kernel_for(b, vector, true), g.blocks(), g.width * g.ranks, b, g);
  }
  launch(kernel_for(b, vector, false), g.blocks(), g.width * g.ranks, b, g);
}

}  // namespace gan_ops
