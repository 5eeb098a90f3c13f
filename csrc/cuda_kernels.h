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
// comes last adds them up, in an order of its own: there are no floating-point atomics, and equal calls give the same
// bits. `apply` goes over the blocks in reverse, since the L2 cache holds what reduce has read last.
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

// The naive way: a thread for each channel, value after value, in double. The tests hold the fast way against it, and
// have its gradient. ------------------------------------------------------------------------------------------------

// Where value i of channel c lies, of `channels` in all.
__device__ inline int64_t place(const Shape& s, int64_t i, int64_t c, int64_t channels) {
  return (i / s.hw * channels + c) * s.hw + i % s.hw;
}

template <typename T>
__global__ void naive_forward(Forward f) {
  const int64_t c = blockIdx.x * int64_t{blockDim.x} + threadIdx.x, half = f.shape.c / (f.halves[1] ? 2 : 1);
  const double count = f.shape.n * f.shape.hw;
  if (c >= f.shape.c) return;
  double mean = f.training ? 0 : f.mean[c], variance = 0, rstd = f.rstd[c];
  for (int pass = f.training ? 0 : 2; pass < 3; ++pass) {  // mean, variance, output
    for (int64_t i = 0; i < count; ++i) {
      const float v = widen(static_cast<const T*>(f.x)[place(f.shape, i, c, f.shape.c)]);
      const double a = f.activate_first && !(v > 0) ? v * f.slope : v;
      if (pass == 0) mean += a / count;
      if (pass == 1) variance += (a - mean) * (a - mean) / count;
      double y = (a - mean) * rstd * f.weight[c] + f.bias[c];
      if (!f.activate_first && !(y > 0)) y *= f.slope;
      if (pass == 2) narrow(float(y), static_cast<T*>(f.halves[c / half])[place(f.shape, i, c % half, half)]);
    }
    if (pass == 1) rstd = 1 / sqrt(variance + f.eps);
  }
  f.mean[c] = mean, f.rstd[c] = rstd;
  if (!f.running_mean) return;
  f.running_mean[c] += f.momentum * (mean - f.running_mean[c]);
  f.running_var[c] += f.momentum * (variance * (f.biased ? 1 : count / (count - 1)) - f.running_var[c]);
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
  int64_t row, half_row, at, half_at;  // vectors of a row; its column in the block's first: of a tensor, of a half
  bool second;                         // of the halves

  template <typename P>
  using Vectors = std::conditional_t<std::is_const_v<P>, const Vector<T, V>, Vector<T, V>>;

  __device__ Place(const Geometry& g, bool split, int block) : row(g.row), half_row(split ? g.row / 2 : g.row) {
    group = block % g.groups, part = block / g.groups;
    const int x = threadIdx.x % g.width, channels = g.width / g.span, inner = part % g.pieces * g.span + x % g.span;
    rank = threadIdx.x / g.width, ranks = blockDim.x / g.width;
    slot = (rank * g.span + x % g.span) * channels + x / g.span;
    sharers = ranks * g.span;
    const int span = group * channels + x / g.span;
    channel = span * LANES;
    const int64_t first = int64_t{part / g.pieces} * g.chunk, column = int64_t{span} * g.plane + inner;
    const bool inside = channel < g.c && inner < g.plane;
    rows = inside ? static_cast<int>(g.rows - first < g.chunk ? g.rows - first : g.chunk) : 0;
    second = column >= half_row;
    at = first * row + column, half_at = first * half_row + column - (second ? half_row : 0);
  }

  template <typename P>
  __device__ auto* in(P* tensor) const { return static_cast<Vectors<P>*>(tensor) + at; }
  template <typename P>
  __device__ auto* in_half(P* const (&halves)[2]) const {
    return static_cast<Vectors<P>*>(second ? halves[1] : halves[0]) + half_at;
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

// The value of channel c in the first row: statistics are sums of differences from it, which lose little unless it lies
// very many deviations from the mean.
template <typename T, bool FIRST, class Work>
__device__ float origin_of(const Work& w, int c) {
  const float v = widen(static_cast<const T*>(w.x)[c * w.shape.hw]), a = FIRST ? leaky(v, v, w.slope) : v;
  return isfinite(a) ? a : 0;
}

// What the thread's channels are normalised with.
template <int LANES>
struct Norm {
  float mean[LANES] = {}, scale[LANES] = {}, bias[LANES] = {};
};

// Down the thread's column, use(x, distances from the mean, y), a vector of each; in backward y is the gradient of what
// was normalised. FIRST: LeakyReLU comes first. APPLIES: what becomes of y is written, to the output or dx; else, in
// forward, the mean is not known yet, and distances are from the origin.
template <bool FIRST, bool APPLIES, typename T, int V, int LANES, class Work, class Use>
__device__ void down(const Work& w, const Place<T, V, LANES>& p, Norm<LANES>& norm, const Use& use) {
  constexpr bool BACK = std::is_same_v<Work, Backward>, known = APPLIES || BACK;
  const auto* const x = p.in(w.x);
  auto* const half = p.in_half(w.halves);
  const int row = static_cast<int>(p.row), half_row = static_cast<int>(p.half_row), to_row = BACK ? row : half_row;
  Vector<T, V>* to;
  if constexpr (BACK) to = p.in(w.dx);
  if constexpr (!BACK) to = half;
  const float slope = w.slope;
  for (int r = p.rank; r < p.rows; r += kUnroll * p.ranks) {
    Vector<T, V> held[kUnroll], grads[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // loads that do not wait for each other
      const int at = r + u * p.ranks;
      if (at < p.rows) held[u] = x[at * row];
      if (BACK && at < p.rows) grads[u] = half[at * half_row];
    }
    for (int i = 0, c = p.channel; i < LANES && r == p.rank; ++i, ++c) {  // behind the first loads, which take as long
      norm.mean[i] = known ? w.mean[c] : origin_of<T, FIRST>(w, c);
      if (known) norm.scale[i] = w.weight[c] * w.rstd[c], norm.bias[i] = w.bias[c];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (r + u * p.ranks >= p.rows) break;
      float v[V], apart[V], y[V];
      unpack(held[u], v);
      if (BACK) unpack(grads[u], y);
      for (int j = 0; j < V; ++j) {
        apart[j] = (FIRST ? leaky(v[j], v[j], slope) : v[j]) - norm.mean[j % LANES];
        const float normal = affine(apart[j], norm.scale[j % LANES], norm.bias[j % LANES]);
        if (!BACK) y[j] = normal;
        if (!FIRST) y[j] = leaky(y[j], normal, slope);
      }
      use(v, apart, y);
      if (!APPLIES) continue;
      pack(y, held[u]);
      to[(r + u * p.ranks) * to_row] = held[u];
    }
  }
}

// Mean and 1/deviation of channel c, and running statistics, from the sums of differences and of their squares.
template <typename T, bool FIRST>
__device__ void settle(const Forward& f, const Geometry&, int c, float sum, float product) {
  const float count = static_cast<float>(f.shape.n * f.shape.hw), apart = sum / count;
  const float mean = origin_of<T, FIRST>(f, c) + apart, rest = product - sum * apart, squares = rest < 0 ? 0 : rest;
  f.mean[c] = mean, f.rstd[c] = 1 / sqrtf(squares / count + float(f.eps));
  if (!f.running_mean) return;
  f.running_mean[c] += float(f.momentum) * (mean - f.running_mean[c]);
  f.running_var[c] += float(f.momentum) * (squares / (f.biased ? count : count - 1) - f.running_var[c]);
}

// dweight, dbias, and for dx what each value and each distance from the mean is to have less.
template <typename T, bool FIRST>
__device__ void settle(const Backward& b, const Geometry& g, int c, float sum, float product) {
  const float own = b.rstd[c], factor = b.weight[c] * own / static_cast<float>(b.shape.n * b.shape.hw);
  b.dweight[c] = product * own, b.dbias[c] = sum;
  g.terms[c] = factor * sum, g.terms[g.padded + c] = factor * product * own * own;
}

// Two sums for each channel, and what follows from them.
template <typename T, int V, int LANES, bool FIRST, class Work>
__global__ void __launch_bounds__(kThreads, kResident) reduce(Work w, Geometry g) {
  constexpr bool BACK = std::is_same_v<Work, Backward>;
  __shared__ float shared[2 * LANES][kThreads];
  const Place<T, V, LANES> p(g, w.halves[1], blockIdx.x);
  Norm<LANES> norm;
  float sums[2 * LANES] = {};
  down<FIRST, false>(w, p, norm, [&](const float (&)[V], const float (&apart)[V], const float (&y)[V]) {
    for (int j = 0; j < V; ++j) {
      const float one = BACK ? y[j] : apart[j];
      sums[j % LANES] += one;
      sums[LANES + j % LANES] = fmaf(one, apart[j], sums[LANES + j % LANES]);
    }
  });
  if (!add_up_all<LANES>(sums, p, g, shared)) return;
  const int channels = g.width / g.span * LANES;
  for (int i = threadIdx.x; i < channels && p.group * channels + i < g.c; i += blockDim.x) {
    const float sum = shared[i % LANES][i / LANES], product = shared[LANES + i % LANES][i / LANES];
    settle<T, FIRST>(w, g, p.group * channels + i, sum, product);
  }
}

// The output or its halves; in backward dx.
template <typename T, int V, int LANES, bool FIRST, class Work>
__global__ void __launch_bounds__(kThreads, kResident) apply(Work w, Geometry g) {
  constexpr bool BACK = std::is_same_v<Work, Backward>;
  const Place<T, V, LANES> p(g, w.halves[1], gridDim.x - 1 - blockIdx.x);
  Norm<LANES> norm;
  float level[LANES] = {}, tilt[LANES] = {};
  for (int i = 0; BACK && w.training && i < LANES && p.rows > 0; ++i) {
    level[i] = g.terms[p.channel + i], tilt[i] = g.terms[g.padded + p.channel + i];
  }
  const float slope = w.slope;
  down<FIRST, true>(w, p, norm, [&](const float (&v)[V], const float (&apart)[V], float (&d)[V]) {
    for (int j = 0; BACK && j < V; ++j) {
      d[j] *= norm.scale[j % LANES];
      if (w.training) d[j] -= fmaf(apart[j], tilt[j % LANES], level[j % LANES]);
      if (FIRST) d[j] = leaky(d[j], v[j], slope);
    }
  });
}

// Choice ------------------------------------------------------------------------------------------------------------

template <typename T, int V, int LANES, class Work>
auto kernel_in(const Work& work, bool reduces) {
  if (reduces) return work.activate_first ? reduce<T, V, LANES, true, Work> : reduce<T, V, LANES, false, Work>;
  return work.activate_first ? apply<T, V, LANES, true, Work> : apply<T, V, LANES, false, Work>;
}

template <typename T, class Work>
auto kernel_of(const Work& work, int vector, bool reduces) {
  constexpr int full = 16 / sizeof(T);
  if (vector == 1) return kernel_in<T, 1, 1>(work, reduces);
  return work.shape.hw == 1 ? kernel_in<T, full, full>(work, reduces) : kernel_in<T, full, 1>(work, reduces);
}

template <class Work>
auto kernel_for(const Work& work, int vector, bool reduces) {
  if (work.shape.type == Type::f32) return kernel_of<float>(work, vector, reduces);
  if (work.shape.type == Type::bf16) return kernel_of<__nv_bfloat16>(work, vector, reduces);
  return kernel_of<__half>(work, vector, reduces);
}

// Calls launch(kernel, blocks, threads, arguments) for all of a call, in order.
template <class Work, class Launch>
void run(const Work& work, Launch& launch) {
  constexpr bool BACK = std::is_same_v<Work, Backward>;
  const void* dx = nullptr;
  if constexpr (BACK) dx = work.dx;
  const int vector = vector_of(work.shape, work.halves[1], {work.halves[0], work.halves[1], work.x, dx});
  Geometry g = plan(work.shape, vector, launch.processors, launch.threads);
  g.use(launch.allocate(g.bytes()));
  for (bool reduces : {true, false}) {
    if (reduces && !BACK && !work.training) continue;  // mean and rstd are given
    if (reduces) launch.clear(g.done, g.groups * sizeof(unsigned));
    launch(kernel_for(work, vector, reduces), g.blocks(), g.width * g.ranks, work, g);
  }
}

}  // namespace gan_ops
