// The CUDA kernels. Whoever includes this has defined CUDA's own words before (__device__, threadIdx, __nv_bfloat16,
// ...): nvcc's headers and cuda.cu, or tests/cuda_stand_in.h, with which the tests run them on a CPU.
//
// What they and cpu.cpp compute for a channel of `count` values x; scale is weight * rstd, via_mean and via_var are of
// what reaches x through the statistics, and in brackets is what differs where LeakyReLU comes first:
//   forward   distance = x - mean [leaky(x) - mean]   normal = distance * scale + bias   y = leaky(normal) [normal]
//   training  mean = Σ x / count [Σ leaky(x) / count]   var = Σ distance² / count   rstd = 1 / sqrt(var + eps)
//             running_mean and running_var move by momentum, to mean and var * count / (count - 1), or var if `biased`
//   backward  g = dy, times slope where normal is not positive [dy]   dbias = Σ g   dweight = Σ g * distance * rstd
//             dx = g * scale - (via_mean + distance * via_var) [the same, times slope where x is not positive]
//   training  via_mean = scale * Σ g / count   via_var = scale * Σ g * distance * rstd² / count   (in evaluation 0)
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
// `reduce`, a launch of its own, sums up term and term * distance of each part of a channel. Term is g or, in forward,
// the distance, there from the channel's first value (`origin`). The part that comes last adds them up, in an order of
// its own: no floating-point atomics, the same bits again. `apply` goes over the blocks in reverse: L2 has the last.
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

// `normal`. The distance comes first: x * scale + shift would lose a small spread around a large mean. Forward and
// backward must agree on the sign, so the fused multiplication is not left to the compiler.
__device__ inline float affine(float distance, float scale, float bias) { return fmaf(distance, scale, bias); }

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
  double mean = f.training ? 0 : f.mean[c], var = 0, rstd = f.rstd[c];
  for (int pass = f.training ? 0 : 2; pass < 3; ++pass) {  // mean, var, y
    for (int64_t i = 0; i < count; ++i) {
      const float x = widen(static_cast<const T*>(f.x)[place(f.shape, i, c, f.shape.c)]);
      const double a = f.activate_first && !(x > 0) ? x * f.slope : x, distance = a - mean;
      if (pass == 0) mean += a / count;
      if (pass == 1) var += distance * distance / count;
      double y = distance * rstd * f.weight[c] + f.bias[c];
      if (!f.activate_first && !(y > 0)) y *= f.slope;
      if (pass == 2) narrow(float(y), static_cast<T*>(f.halves[c / half])[place(f.shape, i, c % half, half)]);
    }
    if (pass == 1) rstd = 1 / sqrt(var + f.eps);
  }
  f.mean[c] = mean, f.rstd[c] = rstd;
  if (!f.running_mean) return;
  f.running_mean[c] += f.momentum * (mean - f.running_mean[c]);
  f.running_var[c] += f.momentum * (var * (f.biased ? 1 : count / (count - 1)) - f.running_var[c]);
}

// The fast way ------------------------------------------------------------------------------------------------------

// What one load brings, in words: 16-bit elements apart would occupy a register each.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  std::conditional_t<V == 1, T, uint32_t> words[V == 1 ? 1 : sizeof(T) * V / 4];
};

template <typename T, int V>
__device__ void unpack(const Vector<T, V>& from, float (&to)[V]) {
  if constexpr (V == 1) {
    to[0] = widen(from.words[0]);
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
    narrow(from[0], to.words[0]);
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

// The same over all blocks, two sums a channel: true in the block of a group that comes last, whose `shared` has them.
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

// Channel c's first value: sums of distances from it lose little unless it lies very many deviations from the mean.
template <typename T, bool FIRST, class Call>
__device__ float origin_of(const Call& call, int c) {
  const float x = widen(static_cast<const T*>(call.x)[c * call.shape.hw]), a = FIRST ? leaky(x, x, call.slope) : x;
  return isfinite(a) ? a : 0;
}

// What the thread's channels are normalised with.
template <int LANES>
struct Norm {
  float mean[LANES] = {}, scale[LANES] = {}, bias[LANES] = {};
};

// Down the thread's column, use(x, distance, y), a vector of each; in backward y is g. FIRST: LeakyReLU comes first.
// APPLIES: what becomes of y is written, to the output or dx; else, in forward, distances are from the origin.
template <bool FIRST, bool APPLIES, typename T, int V, int LANES, class Call, class Use>
__device__ void down(const Call& call, const Place<T, V, LANES>& p, Norm<LANES>& norm, const Use& use) {
  constexpr bool BACK = std::is_same_v<Call, Backward>, known = APPLIES || BACK;
  using Values = Vector<T, V>;
  const auto* const source = static_cast<const Values*>(call.x) + p.at;
  auto* const half = p.second ? call.halves[1] : call.halves[0];
  const auto* const dy = static_cast<const Values*>(half) + p.half_at;
  Values* to;
  if constexpr (BACK) to = static_cast<Values*>(call.dx) + p.at;
  if constexpr (!BACK) to = static_cast<Values*>(half) + p.half_at;
  const int row = static_cast<int>(p.row), half_row = static_cast<int>(p.half_row), to_row = BACK ? row : half_row;
  const float slope = call.slope;
  for (int r = p.rank; r < p.rows; r += kUnroll * p.ranks) {
    Values held[kUnroll], grads[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {  // loads that do not wait for each other
      const int at = r + u * p.ranks;
      if (at < p.rows) held[u] = source[at * row];
      if (BACK && at < p.rows) grads[u] = dy[at * half_row];
    }
    for (int i = 0, c = p.channel; i < LANES && r == p.rank; ++i, ++c) {  // behind the first loads, which take as long
      norm.mean[i] = known ? call.mean[c] : origin_of<T, FIRST>(call, c);
      if (known) norm.scale[i] = call.weight[c] * call.rstd[c], norm.bias[i] = call.bias[c];
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (r + u * p.ranks >= p.rows) break;
      float x[V], distance[V], y[V];
      unpack(held[u], x);
      if (BACK) unpack(grads[u], y);
      for (int j = 0; j < V; ++j) {
        distance[j] = (FIRST ? leaky(x[j], x[j], slope) : x[j]) - norm.mean[j % LANES];
        const float normal = affine(distance[j], norm.scale[j % LANES], norm.bias[j % LANES]);
        if (!BACK) y[j] = normal;
        if (!FIRST) y[j] = leaky(y[j], normal, slope);
      }
      use(x, distance, y);
      if (!APPLIES) continue;
      pack(y, held[u]);
      to[(r + u * p.ranks) * to_row] = held[u];
    }
  }
}

template <typename T, bool FIRST>
__device__ void settle(const Forward& f, const Geometry&, int c, float sum, float product) {
  const float count = static_cast<float>(f.shape.n * f.shape.hw), shift = sum / count;
  const float mean = origin_of<T, FIRST>(f, c) + shift, rest = product - sum * shift, squares = rest < 0 ? 0 : rest;
  f.mean[c] = mean, f.rstd[c] = 1 / sqrtf(squares / count + float(f.eps));
  if (!f.running_mean) return;
  f.running_mean[c] += float(f.momentum) * (mean - f.running_mean[c]);
  f.running_var[c] += float(f.momentum) * (squares / (f.biased ? count : count - 1) - f.running_var[c]);
}

template <typename T, bool FIRST>
__device__ void settle(const Backward& b, const Geometry& g, int c, float sum, float product) {
  const float rstd = b.rstd[c], share = b.weight[c] * rstd / static_cast<float>(b.shape.n * b.shape.hw);
  b.dweight[c] = product * rstd, b.dbias[c] = sum;
  g.via_mean[c] = share * sum, g.via_var[c] = share * product * rstd * rstd;
}

template <typename T, int V, int LANES, bool FIRST, class Call>
__global__ void __launch_bounds__(kThreads, kResident) reduce(Call call, Geometry g) {
  constexpr bool BACK = std::is_same_v<Call, Backward>;
  __shared__ float shared[2 * LANES][kThreads];
  const Place<T, V, LANES> p(g, call.halves[1], blockIdx.x);
  Norm<LANES> norm;
  float sums[2 * LANES] = {};
  down<FIRST, false>(call, p, norm, [&](const float (&)[V], const float (&distance)[V], const float (&y)[V]) {
    for (int j = 0; j < V; ++j) {
      const float term = BACK ? y[j] : distance[j];
      sums[j % LANES] += term;
      sums[LANES + j % LANES] = fmaf(term, distance[j], sums[LANES + j % LANES]);
    }
  });
  if (!add_up_all<LANES>(sums, p, g, shared)) return;
  const int channels = g.width / g.span * LANES;
  for (int i = threadIdx.x; i < channels && p.group * channels + i < g.c; i += blockDim.x) {
    const float sum = shared[i % LANES][i / LANES], product = shared[LANES + i % LANES][i / LANES];
    settle<T, FIRST>(call, g, p.group * channels + i, sum, product);
  }
}

template <typename T, int V, int LANES, bool FIRST, class Call>
__global__ void __launch_bounds__(kThreads, kResident) apply(Call call, Geometry g) {
  constexpr bool BACK = std::is_same_v<Call, Backward>;
  const Place<T, V, LANES> p(g, call.halves[1], gridDim.x - 1 - blockIdx.x);
  Norm<LANES> norm;
  float via_mean[LANES] = {}, via_var[LANES] = {};
  for (int i = 0; BACK && call.training && i < LANES && p.rows > 0; ++i) {
    via_mean[i] = g.via_mean[p.channel + i], via_var[i] = g.via_var[p.channel + i];
  }
  const float slope = call.slope;
  down<FIRST, true>(call, p, norm, [&](const float (&x)[V], const float (&distance)[V], float (&dx)[V]) {
    for (int j = 0; BACK && j < V; ++j) {
      dx[j] *= norm.scale[j % LANES];  // it comes as g
      if (call.training) dx[j] -= fmaf(distance[j], via_var[j % LANES], via_mean[j % LANES]);
      if (FIRST) dx[j] = leaky(dx[j], x[j], slope);
    }
  });
}

// Choice ------------------------------------------------------------------------------------------------------------

template <typename T, int V, int LANES, class Call>
auto kernel_in(const Call& call, bool reduces) {
  if (reduces) return call.activate_first ? reduce<T, V, LANES, true, Call> : reduce<T, V, LANES, false, Call>;
  return call.activate_first ? apply<T, V, LANES, true, Call> : apply<T, V, LANES, false, Call>;
}

template <typename T, class Call>
auto kernel_of(const Call& call, int vector, bool reduces) {
  constexpr int full = 16 / sizeof(T);
  if (vector == 1) return kernel_in<T, 1, 1>(call, reduces);
  return call.shape.hw == 1 ? kernel_in<T, full, full>(call, reduces) : kernel_in<T, full, 1>(call, reduces);
}

template <class Call>
auto kernel_for(const Call& call, int vector, bool reduces) {
  if (call.shape.type == Type::f32) return kernel_of<float>(call, vector, reduces);
  if (call.shape.type == Type::bf16) return kernel_of<__nv_bfloat16>(call, vector, reduces);
  return kernel_of<__half>(call, vector, reduces);
}

// Calls launch(kernel, blocks, threads, arguments) for all of a call, in order.
template <class Call, class Launch>
void run(const Call& call, Launch& launch) {
  constexpr bool BACK = std::is_same_v<Call, Backward>;
  const void* dx = nullptr;
  if constexpr (BACK) dx = call.dx;
  const int vector = vector_of(call.shape, call.halves[1], {call.halves[0], call.halves[1], call.x, dx});
  Geometry g = plan(call.shape, vector, launch.processors, launch.threads);
  g.use(launch.allocate(g.bytes()));
  for (bool reduces : {true, false}) {
    if (reduces && !BACK && !call.training) continue;  // mean and rstd are given
    if (reduces) launch.clear(g.done, g.groups * sizeof(unsigned));
    launch(kernel_for(call, vector, reduces), g.blocks(), g.width * g.ranks, call, g);
  }
}

}  // namespace gan_ops
