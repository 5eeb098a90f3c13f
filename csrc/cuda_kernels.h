// The bodies of the CUDA kernels. Whoever includes this has defined CUDA's own words before (__device__, threadIdx,
// __nv_bfloat16, ...), and `void* dynamic_shared()`, the block's dynamic shared memory: nvcc's headers and cuda.cu, or
// tests/cuda_stand_in.h, with which the tests run these bodies on a CPU. cuda_plan.h explains the geometry.
//
// Every sum has one order, fixed by the geometry: there are no floating-point atomics, and equal calls give equal bits.
#pragma once
#include <cstring>
#include <type_traits>

#include "cuda_plan.h"
#include "params.h"

namespace gan_ops {

// What a type is computed in: parameters and statistics have this type too.
template <typename T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};
template <typename T>
using Acc = typename Accumulate<T>::type;

__device__ inline double widen(double v) { return v; }
__device__ inline float widen(float v) { return v; }
__device__ inline float widen(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float widen(__half v) { return __half2float(v); }

__device__ inline void narrow(double v, double& to) { to = v; }
__device__ inline void narrow(float v, float& to) { to = v; }
__device__ inline void narrow(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }
__device__ inline void narrow(float v, __half& to) { to = __float2half_rn(v); }

// What one load brings. Kept as words and taken apart at its use: 16-bit elements would occupy a register each.
template <typename T, int V>
struct alignas(sizeof(T) * V) Vector {
  using Word = typename std::conditional<sizeof(T) * V % 4 == 0, uint32_t, uint16_t>::type;
  Word words[sizeof(T) * V / sizeof(Word)];

  __device__ Acc<T> get(int j) const {
    T v;
    memcpy(&v, reinterpret_cast<const char*>(words) + j * sizeof(T), sizeof(T));
    return widen(v);
  }

  __device__ void set(int j, Acc<T> v) {
    T narrowed;
    narrow(v, narrowed);
    memcpy(reinterpret_cast<char*>(words) + j * sizeof(T), &narrowed, sizeof(T));
  }
};

// A NaN takes the second way, and stays NaN.
template <typename A>
__device__ inline A leaky(A v, A slope) {
  return v > 0 ? v : v * slope;
}

// The gradient of leaky's input.
template <typename A>
__device__ inline A leaky_back(A grad, A input, A slope) {
  return input > 0 ? grad : grad * slope;
}

// The normalised value. `centred` is x - mean: x * scale + shift would lose a small spread around a large mean. Forward
// and backward must agree on its sign, so the fused multiplication is not left to the compiler.
template <typename A>
__device__ inline A affine(A centred, A scale, A bias) {
  return fma(centred, scale, bias);
}

// Statistics of each of N channels: of `count` values, mean and squared deviations from it; or two sums.
template <typename A, int N>
struct Partial {
  A count;
  A first[N], second[N];
};

struct Moments {
  template <typename A, int N>
  __device__ static void merge(Partial<A, N>& to, const Partial<A, N>& from) {
    if (from.count == 0) return;
    const A count = to.count + from.count;
    const A share = from.count / count;
    const A weight = to.count * share;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const A apart = from.first[i] - to.first[i];
      to.first[i] += apart * share;
      to.second[i] += from.second[i] + apart * weight * apart;
    }
    to.count = count;
  }
};

struct Sums {
  template <typename A, int N>
  __device__ static void merge(Partial<A, N>& to, const Partial<A, N>& from) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      to.first[i] += from.first[i];
      to.second[i] += from.second[i];
    }
  }
};

// A thread's vector: its position in the chunk, and which image and where in the image's channel that is.
struct Place {
  int64_t position, image, inner;
};

// A thread's column and positions.
template <int V, bool ROWS>
struct Tile {
  static constexpr int kLanes = ROWS ? V : 1;   // channels of a vector
  static constexpr int kCounts = ROWS ? 1 : V;  // values of one channel in a vector
  const Geometry& g;
  const int64_t chunk;
  int64_t column, half_columns, half_column;
  int64_t begin, positions;
  bool second_half;

  __device__ Tile(const Geometry& geometry, bool split, int64_t chunk_of_block) : g(geometry), chunk(chunk_of_block) {
    column = int64_t{blockIdx.x} * g.width + threadIdx.x;
    half_columns = split ? g.columns / 2 : g.columns;
    second_half = column >= half_columns;
    half_column = second_half ? column - half_columns : column;
    begin = chunk * g.chunk_size;
    positions = positions_of(chunk);
  }

  // The last chunk may be shorter.
  __device__ int64_t positions_of(int64_t any_chunk) const {
    const int64_t left = g.positions - any_chunk * g.chunk_size;
    return left < g.chunk_size ? left : g.chunk_size;
  }

  // The last strip may have columns to spare; their threads only keep the others company at barriers.
  __device__ bool active() const { return column < g.columns; }
  __device__ int64_t channel() const { return column * kLanes; }

  // Where a vector lies: in a tensor, in a tensor of half the channels, in the strip that a block holds.
  __device__ int64_t in_tensor(const Place& p) const {
    return ROWS ? p.image * g.columns + column : (p.image * g.columns + column) * g.plane + p.inner;
  }
  __device__ int64_t in_half(const Place& p) const {
    return ROWS ? p.image * half_columns + half_column : (p.image * half_columns + half_column) * g.plane + p.inner;
  }
  __device__ int64_t in_strip(const Place& p) const { return p.position * g.width + threadIdx.x; }

  // Calls use(place, load(place)) for each position of this thread in order, kUnroll loads ahead.
  template <typename Load, typename Use>
  __device__ void visit(const Load& load, const Use& use) const {
    if (!active()) return;
    Place next{threadIdx.y, begin + threadIdx.y, 0};
    if (!ROWS) {
      next.inner = next.image % g.plane;
      next.image /= g.plane;
    }
    while (next.position < positions) {
      Place place[kUnroll];
      decltype(load(next)) held[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        place[u] = next;
        if (next.position < positions) held[u] = load(next);
        next.position += g.ranks;
        next.image += g.step_images;
        if (!ROWS) next.inner += g.step_inner;
        if (!ROWS && next.inner >= g.plane) {
          next.inner -= g.plane;
          ++next.image;
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (place[u].position < positions) use(place[u], held[u]);
      }
    }
  }
};

// The chunk of a block of apply: L2 has most of those that reduce read last.
__device__ inline int64_t last_first(const Geometry& g) { return g.chunks - 1 - blockIdx.y; }

// Shared memory: partial results that are being combined, then two numbers per channel for all threads, then (at
// g.kept_at) the strip.
template <typename A, int N>
struct Shared {
  A* const partials;
  A* const totals;
  const int slots;

  __device__ explicit Shared(const Geometry& g)
      : partials(static_cast<A*>(dynamic_shared())), totals(partials + g.slots * (2 * N + 1)), slots(g.slots) {}

  // Neighbouring threads write neighbouring words.
  __device__ void put(int slot, const Partial<A, N>& p) const {
    partials[slot] = p.count;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      partials[(1 + i) * slots + slot] = p.first[i];
      partials[(1 + N + i) * slots + slot] = p.second[i];
    }
  }

  __device__ Partial<A, N> get(int slot) const {
    Partial<A, N> p;
    p.count = partials[slot];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      p.first[i] = partials[(1 + i) * slots + slot];
      p.second[i] = partials[(1 + N + i) * slots + slot];
    }
    return p;
  }

  // Merges the partial results of the first `live` ranks into rank 0's, column by column.
  template <typename Merge>
  __device__ void combine(Partial<A, N>& mine, int live) const {
    const int rank = threadIdx.y, width = blockDim.x;
    while (live > 1) {
      const int keep = (live + kRadix - 1) / kRadix;
      if (rank >= keep && rank < live) put((rank - keep) * width + threadIdx.x, mine);
      __syncthreads();
      if (rank < keep) {
        for (int other = rank + keep; other < live; other += keep) {
          Merge::merge(mine, get((other - keep) * width + threadIdx.x));
        }
      }
      __syncthreads();
      live = keep;
    }
  }

  // Calls finish_one(lane, first, second) once for each channel, with rank 0's numbers, which it replaces, and gives
  // all ranks the results in `first` and `second`. The ranks share the channels out: one alone would hold up the
  // others. Once in a kernel.
  template <typename Finish>
  __device__ void finish(const Partial<A, N>& total, A (&first)[N], A (&second)[N], const Finish& finish_one) const {
    A* const own = totals + threadIdx.x;
    const int stride = blockDim.x;
    if (threadIdx.y == 0) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        own[i * stride] = total.first[i];
        own[(N + i) * stride] = total.second[i];
      }
    }
    __syncthreads();
    for (int i = threadIdx.y; i < N; i += blockDim.y) finish_one(i, own[i * stride], own[(N + i) * stride]);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) {
      first[i] = own[i * stride];
      second[i] = own[(N + i) * stride];
    }
  }
};

// The strip that `whole` holds; tensors after one another.
template <typename T, int V>
__device__ Vector<T, V>* kept_strip(const Geometry& g, int tensor) {
  char* const start = static_cast<char*>(dynamic_shared()) + g.kept_at;
  return reinterpret_cast<Vector<T, V>*>(start) + tensor * g.positions * g.width;
}

// Of one channel of a chunk, in the workspace: [chunk][channel].
template <typename A>
struct alignas(2 * sizeof(A)) Pair {
  A first, second;
};

// Rank 0's statistics of the block's chunk.
template <typename A, int V, bool ROWS>
__device__ void write_partial(const Partial<A, Tile<V, ROWS>::kLanes>& p, const Tile<V, ROWS>& tile, int64_t channels,
                              void* workspace) {
  if (threadIdx.y != 0 || !tile.active()) return;
  auto* const to = static_cast<Pair<A>*>(workspace) + tile.chunk * channels + tile.channel();
#pragma unroll
  for (int i = 0; i < Tile<V, ROWS>::kLanes; ++i) to[i] = {p.first[i], p.second[i]};
}

// All chunks' statistics of the block's columns, in rank 0.
template <typename Merge, typename A, int V, bool ROWS>
__device__ Partial<A, Tile<V, ROWS>::kLanes> combine_chunks(const Tile<V, ROWS>& tile, int64_t channels,
                                                            const void* workspace) {
  constexpr int kLanes = Tile<V, ROWS>::kLanes;
  const Geometry& g = tile.g;
  Partial<A, kLanes> mine{};
  if (tile.active()) {
    for (int64_t chunk = threadIdx.y; chunk < g.chunks; chunk += g.ranks) {
      const auto* const from = static_cast<const Pair<A>*>(workspace) + chunk * channels + tile.channel();
      Partial<A, kLanes> other;
      other.count = static_cast<A>(tile.positions_of(chunk) * Tile<V, ROWS>::kCounts);
#pragma unroll
      for (int i = 0; i < kLanes; ++i) {
        const Pair<A> pair = from[i];
        other.first[i] = pair.first;
        other.second[i] = pair.second;
      }
      Merge::merge(mine, other);
    }
  }
  Shared<A, kLanes>(g).template combine<Merge>(mine, static_cast<int>(g.chunks < g.ranks ? g.chunks : g.ranks));
  return mine;
}

// Weight or bias of the lanes of a tile; `otherwise` where there is none.
template <typename A, int V, bool ROWS>
__device__ void read_channels(const void* from, A otherwise, const Tile<V, ROWS>& tile,
                              A (&to)[Tile<V, ROWS>::kLanes]) {
  if (from && tile.active()) {
    const A* const given = static_cast<const A*>(from) + tile.channel();
#pragma unroll
    for (int i = 0; i < Tile<V, ROWS>::kLanes; ++i) to[i] = given[i];
  } else {
#pragma unroll
    for (int i = 0; i < Tile<V, ROWS>::kLanes; ++i) to[i] = otherwise;
  }
}

template <typename T, int V>
struct Two {
  Vector<T, V> first, second;
};

// ---- forward

// The input, with a seam added up and its sum written.
template <typename T, int V, bool ROWS>
struct Input {
  const Tile<V, ROWS>& tile;
  const Vector<T, V>* x;
  const Vector<T, V>* right;
  Vector<T, V>* sum;

  __device__ Input(const Forward& f, const Tile<V, ROWS>& t)
      : tile(t),
        x(static_cast<const Vector<T, V>*>(f.x)),
        right(static_cast<const Vector<T, V>*>(f.right)),
        sum(static_cast<Vector<T, V>*>(f.sum)) {}

  __device__ Two<T, V> load(const Place& place) const {
    Two<T, V> both;
    both.first = x[tile.in_tensor(place)];
    if (right) both.second = right[tile.in_tensor(place)];
    return both;
  }

  // Rounded, so that statistics are those of the tensor that backward gets.
  __device__ Vector<T, V> join(const Place& place, const Two<T, V>& both) const {
    Vector<T, V> value = both.first;
    if (right) {
#pragma unroll
      for (int j = 0; j < V; ++j) value.set(j, both.first.get(j) + both.second.get(j));
      if (sum) sum[tile.in_tensor(place)] = value;
    }
    return value;
  }
};

// Mean and squared deviations of the block's chunk, in rank 0. KEEP: values are held in shared memory.
template <typename T, int V, bool ROWS, bool KEEP>
__device__ Partial<Acc<T>, Tile<V, ROWS>::kLanes> moments(const Forward& f, const Tile<V, ROWS>& tile) {
  using A = Acc<T>;
  constexpr int kLanes = Tile<V, ROWS>::kLanes;
  const Input<T, V, ROWS> input(f, tile);
  const A slope = static_cast<A>(f.slope);
  Vector<T, V>* const kept = kept_strip<T, V>(tile.g, 0);
  // Sums of differences from the thread's first value: with n values, one of which is the origin, the squares are at
  // most about n times the squared deviations, so little is lost whatever the mean and the spread.
  A origin[kLanes] = {}, sum[kLanes] = {}, squares[kLanes] = {};
  int visits = 0;
  tile.visit([&](const Place& place) { return input.load(place); },
             [&](const Place& place, const Two<T, V>& both) {
               const Vector<T, V> value = input.join(place, both);
               if (KEEP) kept[tile.in_strip(place)] = value;
               A v[V];
#pragma unroll
               for (int j = 0; j < V; ++j) {
                 v[j] = value.get(j);
                 if (f.activate_first) v[j] = leaky(v[j], slope);
               }
               if (visits == 0) {
#pragma unroll
                 for (int i = 0; i < kLanes; ++i) origin[i] = v[i];
               }
#pragma unroll
               for (int j = 0; j < V; ++j) {
                 const int i = ROWS ? j : 0;
                 const A apart = v[j] - origin[i];
                 sum[i] += apart;
                 squares[i] = fma(apart, apart, squares[i]);
               }
               ++visits;
             });
  Partial<A, kLanes> mine{};
  if (visits > 0) {
    mine.count = static_cast<A>(visits) * Tile<V, ROWS>::kCounts;
    const A share = 1 / mine.count;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const A offset = sum[i] * share;
      mine.first[i] = origin[i] + offset;
      mine.second[i] = squares[i] - sum[i] * offset;
    }
  }
  Shared<A, kLanes>(tile.g).template combine<Moments>(mine, tile.g.ranks);
  return mine;
}

// Mean and 1 / standard deviation for all threads, from rank 0's total; the first chunk's block writes them and moves
// the running statistics.
template <typename A, int V, bool ROWS>
__device__ void finish(const Forward& f, const Tile<V, ROWS>& tile, const Partial<A, Tile<V, ROWS>::kLanes>& total,
                       A (&mean)[Tile<V, ROWS>::kLanes], A (&rstd)[Tile<V, ROWS>::kLanes]) {
  constexpr int kLanes = Tile<V, ROWS>::kLanes;
  const A momentum = static_cast<A>(f.momentum), count = static_cast<A>(f.shape.n * f.shape.hw);
  const auto finish_one = [&](int lane, A& first, A& second) {
    const A squares = second < 0 ? 0 : second;  // rounding; a NaN stays
    second = 1 / sqrt(squares / count + static_cast<A>(f.eps));
    if (tile.chunk > 0 || !tile.active()) return;
    const int64_t c = tile.channel() + lane;
    static_cast<A*>(f.mean)[c] = first;
    static_cast<A*>(f.rstd)[c] = second;
    if (f.running_mean) {
      A& moved = static_cast<A*>(f.running_mean)[c];
      moved += momentum * (first - moved);
    }
    if (f.running_var) {
      A& moved = static_cast<A*>(f.running_var)[c];
      moved += momentum * (squares / (f.biased ? count : count - 1) - moved);
    }
  };
  Shared<A, kLanes>(tile.g).finish(total, mean, rstd, finish_one);
}

// In evaluation: from the running statistics.
template <typename A, int V, bool ROWS>
__device__ void recall(const Forward& f, const Tile<V, ROWS>& tile, A (&mean)[Tile<V, ROWS>::kLanes],
                       A (&rstd)[Tile<V, ROWS>::kLanes]) {
  read_channels(f.running_mean, A{0}, tile, mean);
  read_channels(f.running_var, A{1}, tile, rstd);
#pragma unroll
  for (int i = 0; i < Tile<V, ROWS>::kLanes; ++i) {
    rstd[i] = 1 / sqrt(rstd[i] + static_cast<A>(f.eps));
    if (tile.chunk == 0 && threadIdx.y == 0 && tile.active()) {
      static_cast<A*>(f.mean)[tile.channel() + i] = mean[i];
      static_cast<A*>(f.rstd)[tile.channel() + i] = rstd[i];
    }
  }
}

// Writes the output of the block's chunk. KEPT: the input is in shared memory.
template <typename T, int V, bool ROWS, bool KEPT>
__device__ void write_output(const Forward& f, const Tile<V, ROWS>& tile,
                             const Acc<T> (&mean)[Tile<V, ROWS>::kLanes], const Acc<T> (&rstd)[Tile<V, ROWS>::kLanes]) {
  using A = Acc<T>;
  const Input<T, V, ROWS> input(f, tile);
  const A slope = static_cast<A>(f.slope);
  const Vector<T, V>* const kept = kept_strip<T, V>(tile.g, 0);
  auto* const out = static_cast<Vector<T, V>*>(tile.second_half ? f.out[1] : f.out[0]);
  A scale[Tile<V, ROWS>::kLanes], bias[Tile<V, ROWS>::kLanes];
  read_channels(f.weight, A{1}, tile, scale);
  read_channels(f.bias, A{0}, tile, bias);
#pragma unroll
  for (int i = 0; i < Tile<V, ROWS>::kLanes; ++i) scale[i] *= rstd[i];
  const auto finish_one = [&](const Place& place, const Vector<T, V>& value) {
    Vector<T, V> y = value;
    if (f.normalise) {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int i = ROWS ? j : 0;
        A v = value.get(j);
        if (f.activate_first) v = leaky(v, slope);
        v = affine(v - mean[i], scale[i], bias[i]);
        if (!f.activate_first) v = leaky(v, slope);
        y.set(j, v);
      }
    }
    out[tile.in_half(place)] = y;
  };
  if constexpr (KEPT) {
    tile.visit([&](const Place& place) { return kept[tile.in_strip(place)]; }, finish_one);
  } else {
    tile.visit([&](const Place& place) { return input.load(place); },
               [&](const Place& place, const Two<T, V>& both) { finish_one(place, input.join(place, both)); });
  }
}

template <typename T, int V, bool ROWS>
__global__ void __launch_bounds__(kThreads) forward_reduce(Forward f, Geometry g, void* workspace) {
  const Tile<V, ROWS> tile(g, f.out[1], blockIdx.y);
  write_partial(moments<T, V, ROWS, false>(f, tile), tile, f.shape.c, workspace);
}

template <typename T, int V, bool ROWS>
__global__ void __launch_bounds__(kThreads) forward_apply(Forward f, Geometry g, void* workspace) {
  using A = Acc<T>;
  const Tile<V, ROWS> tile(g, f.out[1], last_first(g));
  A mean[Tile<V, ROWS>::kLanes] = {}, rstd[Tile<V, ROWS>::kLanes] = {};
  if (f.normalise && f.training) {
    finish<A>(f, tile, combine_chunks<Moments, A>(tile, f.shape.c, workspace), mean, rstd);
  } else if (f.normalise) {
    recall<A>(f, tile, mean, rstd);
  }
  write_output<T, V, ROWS, false>(f, tile, mean, rstd);
}

template <typename T, int V, bool ROWS>
__global__ void __launch_bounds__(kThreads) forward_whole(Forward f, Geometry g, void*) {
  using A = Acc<T>;
  const Tile<V, ROWS> tile(g, f.out[1], 0);
  A mean[Tile<V, ROWS>::kLanes] = {}, rstd[Tile<V, ROWS>::kLanes] = {};
  finish<A>(f, tile, moments<T, V, ROWS, true>(f, tile), mean, rstd);
  write_output<T, V, ROWS, true>(f, tile, mean, rstd);
}

// ---- backward

// What the gradient needs of a tile's channels, and the gradient of the normalised value.
template <typename T, int V, bool ROWS>
struct Gradient {
  using A = Acc<T>;
  static constexpr int kLanes = Tile<V, ROWS>::kLanes;
  const Tile<V, ROWS>& tile;
  const Vector<T, V>* x;
  const Vector<T, V>* grad;
  bool activate_first;
  A slope;
  A mean[kLanes], scale[kLanes], bias[kLanes];

  __device__ Gradient(const Backward& b, const Tile<V, ROWS>& t)
      : tile(t),
        x(static_cast<const Vector<T, V>*>(b.x)),
        grad(static_cast<const Vector<T, V>*>(tile.second_half ? b.grad[1] : b.grad[0])),
        activate_first(b.activate_first),
        slope(static_cast<A>(b.slope)) {
    read_channels(b.mean, A{0}, tile, mean);
    A rstd[kLanes];
    read_channels(b.rstd, A{0}, tile, rstd);
    read_channels(b.weight, A{1}, tile, scale);
    read_channels(b.bias, A{0}, tile, bias);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) scale[i] *= rstd[i];
  }

  __device__ Two<T, V> load(const Place& place) const { return {x[tile.in_tensor(place)], grad[tile.in_half(place)]}; }

  // Element j: what was normalised, less the mean, and the gradient of the normalised value.
  __device__ void at(const Two<T, V>& both, int j, A& centred, A& g) const {
    const int i = ROWS ? j : 0;
    A v = both.first.get(j);
    g = both.second.get(j);
    if (activate_first) v = leaky(v, slope);
    centred = v - mean[i];
    if (!activate_first) g = leaky_back(g, affine(centred, scale[i], bias[i]), slope);
  }
};

// The sums of the gradient and of gradient times centred value over the block's chunk, in rank 0.
template <typename T, int V, bool ROWS, bool KEEP>
__device__ Partial<Acc<T>, Tile<V, ROWS>::kLanes> gradient_sums(const Gradient<T, V, ROWS>& gradient,
                                                               const Tile<V, ROWS>& tile) {
  using A = Acc<T>;
  Vector<T, V>* const kept_x = kept_strip<T, V>(tile.g, 0);
  Vector<T, V>* const kept_grad = kept_strip<T, V>(tile.g, 1);
  Partial<A, Tile<V, ROWS>::kLanes> mine{};
  tile.visit([&](const Place& place) { return gradient.load(place); },
             [&](const Place& place, const Two<T, V>& both) {
               if (KEEP) {
                 kept_x[tile.in_strip(place)] = both.first;
                 kept_grad[tile.in_strip(place)] = both.second;
               }
#pragma unroll
               for (int j = 0; j < V; ++j) {
                 const int i = ROWS ? j : 0;
                 A centred, g;
                 gradient.at(both, j, centred, g);
                 mine.first[i] += g;
                 mine.second[i] = fma(g, centred, mine.second[i]);
               }
             });
  Shared<A, Tile<V, ROWS>::kLanes>(tile.g).template combine<Sums>(mine, tile.g.ranks);
  return mine;
}

// From the total of the sums in rank 0: dweight and dbias, which the first chunk's block writes, and for all threads
// what dx has less because the statistics depend on x too: per value, and per centred value.
template <typename A, int V, bool ROWS>
__device__ void finish(const Backward& b, const Tile<V, ROWS>& tile, const Partial<A, Tile<V, ROWS>::kLanes>& total,
                       A (&level)[Tile<V, ROWS>::kLanes], A (&tilt)[Tile<V, ROWS>::kLanes]) {
  const A count = static_cast<A>(b.shape.n * b.shape.hw);
  const auto finish_one = [&](int lane, A& first, A& second) {
    if (!tile.active()) return;
    const int64_t c = tile.channel() + lane;
    const A rstd = static_cast<const A*>(b.rstd)[c];
    if (tile.chunk == 0 && b.dweight) static_cast<A*>(b.dweight)[c] = second * rstd;
    if (tile.chunk == 0 && b.dbias) static_cast<A*>(b.dbias)[c] = first;
    first /= count;
    second *= rstd * rstd / count;
  };
  Shared<A, Tile<V, ROWS>::kLanes>(tile.g).finish(total, level, tilt, finish_one);
}

// Writes dx of the block's chunk. KEPT: x and the gradient are in shared memory.
template <typename T, int V, bool ROWS, bool KEPT>
__device__ void write_dx(const Backward& b, const Tile<V, ROWS>& tile, const Gradient<T, V, ROWS>& gradient,
                         const Acc<T> (&level)[Tile<V, ROWS>::kLanes], const Acc<T> (&tilt)[Tile<V, ROWS>::kLanes]) {
  using A = Acc<T>;
  const Vector<T, V>* const kept_x = kept_strip<T, V>(tile.g, 0);
  const Vector<T, V>* const kept_grad = kept_strip<T, V>(tile.g, 1);
  auto* const dx = static_cast<Vector<T, V>*>(b.dx);
  tile.visit(
      [&](const Place& place) {
        if constexpr (KEPT) {
          return Two<T, V>{kept_x[tile.in_strip(place)], kept_grad[tile.in_strip(place)]};
        } else {
          return gradient.load(place);
        }
      },
      [&](const Place& place, const Two<T, V>& both) {
        Vector<T, V> result;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const int i = ROWS ? j : 0;
          A centred, g;
          gradient.at(both, j, centred, g);
          if (b.training) g -= level[i] + centred * tilt[i];
          g *= gradient.scale[i];
          if (b.activate_first) g = leaky_back(g, both.first.get(j), gradient.slope);
          result.set(j, g);
        }
        dx[tile.in_tensor(place)] = result;
      });
}

template <typename T, int V, bool ROWS>
__global__ void __launch_bounds__(kThreads) backward_reduce(Backward b, Geometry g, void* workspace) {
  const Tile<V, ROWS> tile(g, b.grad[1], blockIdx.y);
  const Gradient<T, V, ROWS> gradient(b, tile);
  write_partial(gradient_sums<T, V, ROWS, false>(gradient, tile), tile, b.shape.c, workspace);
}

template <typename T, int V, bool ROWS>
__global__ void __launch_bounds__(kThreads) backward_apply(Backward b, Geometry g, void* workspace) {
  using A = Acc<T>;
  const Tile<V, ROWS> tile(g, b.grad[1], last_first(g));
  const Gradient<T, V, ROWS> gradient(b, tile);
  A level[Tile<V, ROWS>::kLanes] = {}, tilt[Tile<V, ROWS>::kLanes] = {};
  if (b.training || b.dweight || b.dbias) {
    finish<A>(b, tile, combine_chunks<Sums, A>(tile, b.shape.c, workspace), level, tilt);
  }
  write_dx<T, V, ROWS, false>(b, tile, gradient, level, tilt);
}

template <typename T, int V, bool ROWS>
__global__ void __launch_bounds__(kThreads) backward_whole(Backward b, Geometry g, void*) {
  using A = Acc<T>;
  const Tile<V, ROWS> tile(g, b.grad[1], 0);
  const Gradient<T, V, ROWS> gradient(b, tile);
  A level[Tile<V, ROWS>::kLanes] = {}, tilt[Tile<V, ROWS>::kLanes] = {};
  finish<A>(b, tile, gradient_sums<T, V, ROWS, true>(gradient, tile), level, tilt);
  write_dx<T, V, ROWS, true>(b, tile, gradient, level, tilt);
}

// ---- choice

template <class Work>
using Kernel = void (*)(Work, Geometry, void*);

template <typename T, int V, bool ROWS>
Kernel<Forward> kernel_of(Step step, const Forward&) {
  switch (step) {
    case Step::reduce: return forward_reduce<T, V, ROWS>;
    case Step::apply: return forward_apply<T, V, ROWS>;
    default: return forward_whole<T, V, ROWS>;
  }
}

template <typename T, int V, bool ROWS>
Kernel<Backward> kernel_of(Step step, const Backward&) {
  switch (step) {
    case Step::reduce: return backward_reduce<T, V, ROWS>;
    case Step::apply: return backward_apply<T, V, ROWS>;
    default: return backward_whole<T, V, ROWS>;
  }
}

template <typename T, int V, class Work>
Kernel<Work> kernel_in_layout(Step step, const Work& work) {
  return work.shape.rows ? kernel_of<T, V, true>(step, work) : kernel_of<T, V, false>(step, work);
}

template <typename T, class Work>
Kernel<Work> kernel_in_width(Step step, const Work& work, int vector) {
  constexpr int kFull = 16 / sizeof(T);
  return vector == 1 ? kernel_in_layout<T, 1>(step, work) : kernel_in_layout<T, kFull>(step, work);
}

template <class Work>
Kernel<Work> kernel_for(Step step, const Work& work, int vector) {
  switch (work.shape.type) {
    case Type::f64: return kernel_in_layout<double, 1>(step, work);
    case Type::f32: return kernel_in_width<float>(step, work, vector);
    case Type::bf16: return kernel_in_width<__nv_bfloat16>(step, work, vector);
    default: return kernel_in_width<__half>(step, work, vector);
  }
}

}  // namespace gan_ops
