// The CPU kernels, on ATen's vectors. Compiled once for each instruction set (cpu_default.cpp and its neighbours), each
// time into the namespace that ATen names after the set; cpu.cpp picks one when the program runs.
//
// Statistics are shifted sums of short runs of values, in float, put together in double by Chan's formula; runs and
// their order follow from the sizes alone, so that neither a second run nor another number of threads changes a bit.
#pragma once
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "params.h"

namespace gan_ops {
inline namespace CPU_CAPABILITY {

using at::vec::Vectorized;

constexpr int64_t GRAIN = 16384;  // values that a thread is worth starting for

// One load of T: `K` vectors of the type that is calculated in.
template <typename T>
struct Lanes {
  using A = std::conditional_t<std::is_same_v<T, double>, double, float>;
  using V = Vectorized<A>;
  static constexpr int width = Vectorized<T>::size(), K = width / V::size();
  using Pack = std::array<V, K>;

  static Pack load(const T* from, int64_t count) {
#ifdef __GNUC__
    __builtin_prefetch(reinterpret_cast<const char*>(from) + 768);  // a page's end stops the processor's own
#endif
    return widened(Vectorized<T>::loadu(from, count));
  }

  static Pack widened(const Vectorized<T>& raw) {
    if constexpr (K == 1) {
      return {raw};
    } else {
      auto [low, high] = at::vec::convert_to_float<T>(raw);
      return {low, high};
    }
  }

  static Vectorized<T> rounded(const Pack& pack) {
    if constexpr (K == 1) {
      return pack[0];
#ifdef __AVX512BF16__
    } else if constexpr (std::is_same_v<T, c10::BFloat16>) {
      return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(pack[1], pack[0]));
#endif
    } else {
      return at::vec::convert_from_float<T>(pack[0], pack[1]);
    }
  }

  static void store(T* to, const Pack& pack, int64_t count) { rounded(pack).store(to, count); }

  // `past` the caches: they need not read first what is overwritten, and keep what they hold.
  static void store(bool past, T* to, const Vectorized<T>& raw, int64_t count) {
#if defined(CPU_CAPABILITY_AVX512)
    if (past && count == width) {
      return _mm512_stream_si512(reinterpret_cast<__m512i*>(to), reinterpret_cast<const __m512i&>(raw));
    }
#elif defined(CPU_CAPABILITY_AVX2)
    if (past && count == width) {
      return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), reinterpret_cast<const __m256i&>(raw));
    }
#endif
    raw.store(to, count);
  }

  // Of a table of the channels: whole vectors, since tables are padded.
  static Pack load_all(const A* from) {
    Pack pack;
    for (int k = 0; k < K; ++k) pack[k] = V::loadu(from + k * V::size());
    return pack;
  }

  static void store_all(A* to, const Pack& pack) {
    for (int k = 0; k < K; ++k) pack[k].store(to + k * V::size());
  }

  static void store_some(A* to, const Pack& pack, int64_t count) {
    for (int k = 0; k < K; ++k) {
      pack[k].store(to + k * V::size(), std::clamp<int64_t>(count - k * V::size(), 0, V::size()));
    }
  }

  // All bits set in the lanes below `count`.
  static Pack mask(int64_t count) {
    Pack pack;
    for (int k = 0; k < K; ++k) pack[k] = V::arange(A(k * V::size()), A(1)) < V(static_cast<A>(count));
    return pack;
  }

  static double total(const Pack& pack) {
    double sum = 0;
    for (int k = 0; k < K; ++k) {
      std::array<A, V::size()> lanes;
      pack[k].store(lanes.data());
      sum += std::accumulate(lanes.begin(), lanes.end(), A(0));
    }
    return sum;
  }
};

// value, times slope where `test` is not positive (at 0 and NaN too, as in PyTorch).
template <typename V>
inline V sloped(V value, V test, V slope) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<V, Vectorized<float>>) {
    auto mask = _mm512_cmp_ps_mask(test, _mm512_setzero_ps(), _CMP_NGT_UQ);
    return _mm512_mask_mul_ps(value, mask, value, slope);
  }
#endif
  return V::blendv(value * slope, value, test > V(0));
}

template <typename V>
inline V leaky(V x, V slope) {
  return sloped(x, x, slope);
}

// What both orders do to one vector of values, given what its channels were normalised with.
template <typename V, bool activate_first>
struct Point {
  V mean, scale, bias, slope;  // scale: weight * rstd

  V forward(V x) const {
    if constexpr (activate_first) return at::vec::fmadd(leaky(x, slope) - mean, scale, bias);
    return leaky(at::vec::fmadd(x - mean, scale, bias), slope);
  }

  // The distance from the mean, and the gradient of what is normalised.
  std::pair<V, V> backward(V x, V grad) const {
    if constexpr (activate_first) return {leaky(x, slope) - mean, grad};
    V distance = x - mean;
    return {distance, sloped(grad, at::vec::fmadd(distance, scale, bias), slope)};
  }

  // The gradient of x; a: scale * mean of the gradients, b: scale * rstd^2 * mean of gradient times distance. In
  // evaluation neither exists: as zeros they would make a NaN of an infinite distance.
  V input_gradient(V x, V distance, V grad, V a, V b, bool training) const {
    V dx = grad * scale;
    if (training) dx = dx - at::vec::fmadd(distance, b, a);
    if constexpr (activate_first) return sloped(dx, x, slope);
    return dx;
  }
};

template <bool activate_first, typename V>
inline V before_statistics(V x, V slope) {
  if constexpr (activate_first) return leaky(x, slope);
  return x;
}

// A constant that converts to its value, so that a whole vector is known to be whole when the loop is compiled.
template <int64_t value>
using Constant = std::integral_constant<int64_t, value>;

template <int width, typename F>
inline void by_lanes(int64_t length, F f) {
  int64_t i = 0;
  for (; i + width <= length; i += width) f(i, Constant<width>{});
  if (i < length) f(i, length - i);
}

// Four rows at once, since what belongs to the channels is then loaded once for them.
template <typename F>
inline void by_rows(int64_t begin, int64_t end, F f) {
  int64_t m = begin;
  for (; m + 4 <= end; m += 4) f(m, Constant<4>{});
  for (; m < end; ++m) f(m, Constant<1>{});
}

// What the channels are normalised with, and what the gradients need, as tables padded for whole vectors. A channel has
// `repeat` columns of a table.
template <typename A>
struct Channels {
  int64_t c, repeat, columns, padded;
  std::vector<A> mean, rstd, scale, bias, a, b;

  Channels(int64_t c, int64_t repeat, const void* weight, const void* bias_)
      : c(c), repeat(repeat), columns(c * repeat), padded(columns + 2 * Vectorized<A>::size()), mean(padded),
        rstd(padded), scale(padded, A(1)), bias(padded), a(padded), b(padded) {
    for (int64_t i = 0; i < c; ++i) {
      if (weight) fill(scale, i, static_cast<const A*>(weight)[i]);
      if (bias_) fill(bias, i, static_cast<const A*>(bias_)[i]);
    }
  }

  void fill(std::vector<A>& table, int64_t i, A value) { std::fill_n(&table[i * repeat], repeat, value); }

  void set(int64_t i, A mean_, A rstd_) {
    fill(mean, i, mean_);
    fill(rstd, i, rstd_);
    fill(scale, i, scale[i * repeat] * rstd_);
  }

  void set_gradients(int64_t i, double grads, double products, double count) {
    double scale_ = scale[i * repeat], rstd_ = rstd[i * repeat];
    fill(a, i, static_cast<A>(scale_ * (grads / count)));
    fill(b, i, static_cast<A>(scale_ * (products / count) * rstd_ * rstd_));
  }

  template <bool activate_first, typename V>
  Point<V, activate_first> all_of(int64_t i, A slope) const {
    return {V(mean[i]), V(scale[i]), V(bias[i]), V(slope)};
  }
};

// Pointers into those tables, for the inner loops: what is captured by reference would be read again after each store.
template <typename T, bool activate_first>
struct Tables {
  using L = Lanes<T>;
  using V = typename L::V;
  const typename L::A *mean, *scale, *bias, *a, *b;
  V slope;

  Tables(const Channels<typename L::A>& channels, double slope_)
      : mean(channels.mean.data()), scale(channels.scale.data()), bias(channels.bias.data()), a(channels.a.data()),
        b(channels.b.data()), slope(static_cast<typename L::A>(slope_)) {}

  std::array<Point<V, activate_first>, L::K> points(int64_t i) const {
    std::array<Point<V, activate_first>, L::K> points;
    for (int k = 0; k < L::K; ++k, i += V::size()) {
      points[k] = {V::loadu(mean + i), V::loadu(scale + i), V::loadu(bias + i), slope};
    }
    return points;
  }
};

// How a run of n values joins the `count` values before it; the same for every channel.
struct Join {
  double inverse, share, cross;

  Join(double n, double count) : inverse(1 / n), share(n / (count + n)), cross(count * n / (count + n)) {}
};

// Mean and sum of squared distances of the values so far.
struct Moments {
  double mean = 0, squares = 0;

  void add(const Join& join, double shift, double sum, double sum_of_squares) {
    double run = sum * join.inverse, delta = shift + run - mean;
    squares += std::max(sum_of_squares - sum * run, 0.0) + delta * delta * join.cross;
    mean += std::isfinite(delta) ? delta * join.share : shift + run;  // an infinite mean stays infinite
  }
};

// Channel i's statistics: of the batch, which the running ones then follow, or the running ones.
template <typename A>
void settle(const Forward& f, Channels<A>& channels, int64_t i, const Moments& batch, double count) {
  auto running_mean = static_cast<A*>(f.running_mean), running_var = static_cast<A*>(f.running_var);
  double mean = batch.mean, variance = batch.squares / count;
  if (!f.training) {
    mean = running_mean[i], variance = running_var[i];
  } else if (running_mean) {
    double target = f.biased ? variance : batch.squares / (count - 1);
    running_mean[i] += static_cast<A>(f.momentum * (mean - running_mean[i]));
    running_var[i] += static_cast<A>(f.momentum * (target - running_var[i]));
  }
  auto rstd = static_cast<A>(1 / std::sqrt(variance + f.eps));
  channels.set(i, static_cast<A>(mean), rstd);
  static_cast<A*>(f.mean)[i] = static_cast<A>(mean);
  static_cast<A*>(f.rstd)[i] = rstd;
}

// dweight and dbias of channel i, and what its input's gradient needs; in evaluation the statistics are constants.
template <typename A>
void settle(const Backward& g, Channels<A>& channels, int64_t i, double grads, double products, double count) {
  if (g.dbias) static_cast<A*>(g.dbias)[i] = static_cast<A>(grads);
  if (g.dweight) static_cast<A*>(g.dweight)[i] = static_cast<A>(products * channels.rstd[i * channels.repeat]);
  if (g.training) channels.set_gradients(i, grads, products, count);
}

// Rows --------------------------------------------------------------------------------------------------------------

// How rows are cut into runs: by the sizes alone.
struct Runs {
  int64_t rows, each, count, grain;

  Runs(int64_t rows, int64_t c)
      : rows(rows), each(rows < 256 ? 16 : rows < 4096 ? 32 : rows < 65536 ? 128 : 512),
        count((rows + each - 1) / each), grain(std::max<int64_t>(1, GRAIN / (each * c))) {}

  int64_t length(int64_t run) const { return std::min(each, rows - run * each); }

  // f(run, first row, end) over threads. In a second pass a thread begins with the rows that it has just left, which
  // its cache still holds.
  template <typename F>
  void over(bool backwards, F f) const {
    at::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        int64_t run = backwards ? begin + end - 1 - i : i;
        f(run, run * each, std::min(rows, (run + 1) * each));
      }
      std::atomic_thread_fence(std::memory_order_seq_cst);  // for what was stored past the caches
    });
  }
};

// Whether an output, laid in stretches of `length` values, is too large to be found in cache by what comes next, and
// every whole vector of it lies where one can be stored past the caches.
template <typename T>
bool goes_past_caches(const Shape& s, void* const (&out)[2], int64_t length) {
  constexpr int64_t large = int64_t(16) << 20;
  auto fits = [&](void* data) { return reinterpret_cast<uintptr_t>(data) % 64 == 0; };
  int64_t stretch = (out[1] ? length / 2 : length) * static_cast<int64_t>(sizeof(T));
  int64_t bytes = s.n * s.c * s.hw * static_cast<int64_t>(sizeof(T));
  return bytes >= large && stretch % 64 == 0 && fits(out[0]) && fits(out[1]);
}

// What is normalised: a tensor, or the sum of both branches of a seam.
template <typename T>
struct Input {
  using L = Lanes<T>;
  const T *x, *right;
  T* sum;
  bool training, past;

  explicit Input(const Forward& f)
      : x(static_cast<const T*>(f.x)), right(static_cast<const T*>(f.right)), sum(static_cast<T*>(f.sum)),
        training(f.training) {
    void* const out[2] = {f.sum, f.out[1]};  // in evaluation the sum is written by halves
    int64_t plane = f.out[1] ? 2 * f.shape.hw : f.shape.hw;
    past = f.right && goes_past_caches<T>(f.shape, out, f.shape.rows ? f.shape.c : plane);
  }

  typename L::A first(int64_t offset) const {
    auto value = static_cast<typename L::A>(x[offset]);
    return right ? value + static_cast<typename L::A>(right[offset]) : value;
  }

  // Values as they are read first: a sum is written, and rounded as it is written.
  typename L::Pack read(int64_t offset, int64_t count) const {
    auto pack = L::load(x + offset, count);
    if (!right) return pack;
    auto other = L::load(right + offset, count);
    for (int k = 0; k < L::K; ++k) pack[k] = pack[k] + other[k];
    auto raw = L::rounded(pack);
    L::store(past, sum + offset, raw, count);
    return L::widened(raw);
  }

  // Values as they are normalised: in training for the second time.
  typename L::Pack again(int64_t offset, int64_t count) const {
    return training ? L::load((right ? sum : x) + offset, count) : read(offset, count);
  }
};

template <typename A>
double total(const A* values, int64_t count) {
  return std::accumulate(values, values + count, 0.0);
}

template <typename T, bool activate_first>
void statistics_of_rows(const Forward& f, Channels<typename Lanes<T>::A>& channels, const Runs& runs) {
  using L = Lanes<T>;
  using A = typename L::A;
  int64_t c = channels.c, repeat = channels.repeat, columns = channels.columns, padded = channels.padded;
  std::vector<A> partials(runs.count * 3 * padded);  // of each run: its shift (a first value), sum, sum of squares
  runs.over(false, [&](int64_t run, int64_t first, int64_t end) {
    const Input<T> input(f);
    const int64_t stride = columns;
    const typename L::V slope(static_cast<A>(f.slope));
    A *const shifts = &partials[run * 3 * padded], *const sums = shifts + padded, *const squares = sums + padded;
    for (int64_t i = 0; i < columns; i += repeat) {
      A shift = input.first(first * stride + i);
      if (activate_first && !(shift > 0)) shift *= static_cast<A>(f.slope);
      std::fill_n(shifts + i, repeat, shift);
    }
    by_rows(first, end, [=](int64_t m, auto rows) {
      by_lanes<L::width>(stride, [=](int64_t i, auto count) {
        auto shift = L::load_all(shifts + i), sum = L::load_all(sums + i), square = L::load_all(squares + i);
        for (int r = 0; r < rows; ++r) {
          auto x = input.read((m + r) * stride + i, count);
          for (int k = 0; k < L::K; ++k) {
            auto d = before_statistics<activate_first>(x[k], slope) - shift[k];
            sum[k] = sum[k] + d;
            square[k] = at::vec::fmadd(d, d, square[k]);
          }
        }
        L::store_all(sums + i, sum);
        L::store_all(squares + i, square);
      });
    });
  });
  at::parallel_for(0, c, std::max<int64_t>(1, GRAIN / runs.count / 4), [&](int64_t begin, int64_t end) {
    std::vector<Moments> moments(end - begin);
    for (int64_t run = 0; run < runs.count; ++run) {
      const A *shifts = &partials[run * 3 * padded], *sums = shifts + padded, *squares = sums + padded;
      Join join(runs.length(run) * repeat, run * runs.each * repeat);
      if (repeat == 1) {  // by itself, since a compiler makes vectors of it
        for (int64_t i = begin; i < end; ++i) moments[i - begin].add(join, shifts[i], sums[i], squares[i]);
        continue;
      }
      for (int64_t i = begin; i < end; ++i) {
        int64_t at = i * repeat;
        moments[i - begin].add(join, shifts[at], total(sums + at, repeat), total(squares + at, repeat));
      }
    }
    for (int64_t i = begin; i < end; ++i) settle(f, channels, i, moments[i - begin], runs.rows * repeat);
  });
}

// Channels [i, i + length) of rows of `stride` channels, at `data`: one half of an output or of a gradient.
template <typename P>
struct Half {
  P data;
  int64_t first, length;
};

template <typename T, typename P>
std::array<Half<T*>, 2> halves(P* const (&data)[2], int64_t c) {
  int64_t length = data[1] ? c / 2 : c;
  return {{{static_cast<T*>(data[0]), 0, length}, {static_cast<T*>(data[1]), length, c - length}}};
}

template <typename T, bool activate_first>
void apply_to_rows(const Forward& f, const Channels<typename Lanes<T>::A>& channels, const Runs& runs) {
  using L = Lanes<T>;
  bool large = goes_past_caches<T>(f.shape, f.out, channels.columns);
  runs.over(true, [&](int64_t, int64_t first, int64_t end) {
    const Input<T> input(f);
    const Tables<T, activate_first> tables(channels, f.slope);
    const auto outputs = halves<T>(f.out, channels.columns);
    const int64_t stride = channels.columns;
    const bool past = large;
    by_rows(first, end, [=](int64_t m, auto rows) {
      for (auto half : outputs) {
        by_lanes<L::width>(half.length, [=](int64_t i, auto count) {
          auto points = tables.points(half.first + i);
          for (int r = 0; r < rows; ++r) {
            auto x = input.again((m + r) * stride + half.first + i, count);
            for (int k = 0; k < L::K; ++k) x[k] = points[k].forward(x[k]);
            L::store(past, half.data + (m + r) * half.length + i, L::rounded(x), count);
          }
        });
      }
    });
  });
}

template <typename T, bool activate_first>
void reduce_rows(const Backward& g, Channels<typename Lanes<T>::A>& channels, const Runs& runs) {
  using L = Lanes<T>;
  using A = typename L::A;
  int64_t c = channels.c, repeat = channels.repeat, columns = channels.columns, padded = channels.padded;
  std::vector<A> partials(runs.count * 2 * padded);  // of each run: sums of gradients, of gradients times distances
  runs.over(false, [&](int64_t run, int64_t first, int64_t end) {
    const Tables<T, activate_first> tables(channels, g.slope);
    const auto gradients = halves<const T>(g.grad, columns);
    const auto values = static_cast<const T*>(g.x);
    const int64_t stride = columns;
    A *const grads = &partials[run * 2 * padded], *const products = grads + padded;
    by_rows(first, end, [=](int64_t m, auto rows) {
      for (auto half : gradients) {
        by_lanes<L::width>(half.length, [=](int64_t i, auto count) {
          int64_t at = half.first + i;
          auto sum = L::load_all(grads + at), product = L::load_all(products + at);
          auto points = tables.points(at);
          for (int r = 0; r < rows; ++r) {
            auto x = L::load(values + (m + r) * stride + at, count);
            auto dy = L::load(half.data + (m + r) * half.length + i, count);
            for (int k = 0; k < L::K; ++k) {
              auto [distance, grad] = points[k].backward(x[k], dy[k]);
              sum[k] = sum[k] + grad;
              product[k] = at::vec::fmadd(grad, distance, product[k]);
            }
          }
          L::store_some(grads + at, sum, count);
          L::store_some(products + at, product, count);
        });
      }
    });
  });
  at::parallel_for(0, c, std::max<int64_t>(1, GRAIN / runs.count / 4), [&](int64_t begin, int64_t end) {
    std::vector<double> sums(2 * (end - begin));
    for (int64_t run = 0; run < runs.count; ++run) {
      const A *grads = &partials[run * 2 * padded], *products = grads + padded;
      for (int64_t i = begin; i < end; ++i) {
        sums[i - begin] += total(grads + i * repeat, repeat);
        sums[end - 2 * begin + i] += total(products + i * repeat, repeat);
      }
    }
    for (int64_t i = begin; i < end; ++i) {
      settle(g, channels, i, sums[i - begin], sums[end - 2 * begin + i], runs.rows * repeat);
    }
  });
}

template <typename T, bool activate_first>
void input_gradient_of_rows(const Backward& g, const Channels<typename Lanes<T>::A>& channels, const Runs& runs) {
  using L = Lanes<T>;
  void* const out[2] = {g.dx, g.grad[1] ? g.dx : nullptr};  // written half by half, as the gradients are read
  bool large = goes_past_caches<T>(g.shape, out, channels.columns);
  runs.over(true, [&](int64_t, int64_t first, int64_t end) {
    const Tables<T, activate_first> tables(channels, g.slope);
    const auto gradients = halves<const T>(g.grad, channels.columns);
    const auto values = static_cast<const T*>(g.x);
    const auto dx = static_cast<T*>(g.dx);
    const int64_t stride = channels.columns;
    const bool past = large, training = g.training;
    by_rows(first, end, [=](int64_t m, auto rows) {
      for (auto half : gradients) {
        by_lanes<L::width>(half.length, [=](int64_t i, auto count) {
          int64_t at = half.first + i;
          auto a = L::load_all(tables.a + at), b = L::load_all(tables.b + at);
          auto points = tables.points(at);
          for (int r = 0; r < rows; ++r) {
            auto x = L::load(values + (m + r) * stride + at, count);
            auto dy = L::load(half.data + (m + r) * half.length + i, count);
            for (int k = 0; k < L::K; ++k) {
              auto [distance, grad] = points[k].backward(x[k], dy[k]);
              x[k] = points[k].input_gradient(x[k], distance, grad, a[k], b[k], training);
            }
            L::store(past, dx + (m + r) * stride + at, L::rounded(x), count);
          }
        });
      }
    });
  });
}

// Planar ------------------------------------------------------------------------------------------------------------

// A thread takes a block of channels through both passes, so that the second finds in cache what the first has read.
// Small planes are taken many channels at a time, for long stretches of memory.
template <typename F>
void by_blocks_of_channels(const Shape& s, F f) {
  int64_t block = std::clamp<int64_t>(2048 / s.hw, 1, s.c), blocks = (s.c + block - 1) / block;
  int64_t grain = std::max<int64_t>(1, GRAIN / (block * s.n * s.hw));
  at::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i * block, std::min(s.c, (i + 1) * block));
    std::atomic_thread_fence(std::memory_order_seq_cst);  // as above
  });
}

// Where the plane of picture n and channel i lies, in x and in its half of an output or of a gradient.
inline int64_t plane(const Shape& s, int64_t n, int64_t i) { return (n * s.c + i) * s.hw; }

template <typename T, typename P>
T* plane_of_half(const Shape& s, P* const (&data)[2], int64_t n, int64_t i) {
  int64_t half = data[1] ? s.c / 2 : s.c;
  bool second = i >= half;
  return static_cast<T*>(data[second]) + (n * half + i - (second ? half : 0)) * s.hw;
}

// Pictures whose planes make one run of values, short enough for sums in float.
inline int64_t pictures_a_run(const Shape& s) { return std::max<int64_t>(1, 8192 / s.hw); }

template <typename T, bool activate_first>
void statistics_of_planes(const Forward& f, Channels<typename Lanes<T>::A>& channels, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const Shape& s = f.shape;
  V slope(static_cast<typename L::A>(f.slope)), zero(0);
  const auto mask = L::mask(s.hw % L::width);
  const Input<T> input(f);
  std::vector<Moments> moments(end - begin);
  std::vector<typename L::Pack> sums(end - begin), squares(end - begin), shifts(end - begin);
  for (int64_t first = 0, each = pictures_a_run(s); first < s.n; first += each) {
    int64_t last = std::min(s.n, first + each);
    for (int64_t n = first; n < last; ++n) {
      for (int64_t i = begin; i < end; ++i) {
        auto &sum = sums[i - begin], &square = squares[i - begin], &shift = shifts[i - begin];
        if (n == first) {
          sum.fill(zero), square.fill(zero);
          shift.fill(before_statistics<activate_first>(V(input.first(plane(s, n, i))), slope));
        }
        const int64_t offset = plane(s, n, i);
        auto local_sum = sum, local_square = square;
        by_lanes<L::width>(s.hw, [&, shift, input](int64_t j, auto count) {
          auto x = input.read(offset + j, count);
          for (int k = 0; k < L::K; ++k) {
            V d = before_statistics<activate_first>(x[k], slope) - shift[k];
            if constexpr (std::is_same_v<decltype(count), int64_t>) d = V::blendv(zero, d, mask[k]);
            local_sum[k] = local_sum[k] + d;
            local_square[k] = at::vec::fmadd(d, d, local_square[k]);
          }
        });
        sum = local_sum, square = local_square;
      }
    }
    Join join((last - first) * s.hw, first * s.hw);
    for (int64_t i = 0; i < end - begin; ++i) {
      typename L::A shift[V::size()];
      shifts[i][0].store(shift);
      moments[i].add(join, shift[0], L::total(sums[i]), L::total(squares[i]));
    }
  }
  for (int64_t i = begin; i < end; ++i) settle(f, channels, i, moments[i - begin], s.n * s.hw);
}

template <typename T, bool activate_first>
void apply_to_planes(const Forward& f, const Channels<typename Lanes<T>::A>& channels, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  const Shape& s = f.shape;
  auto slope = static_cast<typename L::A>(f.slope);
  const bool past = goes_past_caches<T>(s, f.out, f.out[1] ? 2 * s.hw : s.hw);
  const Input<T> input(f);
  for (int64_t n = s.n - 1; n >= 0; --n) {
    for (int64_t i = begin; i < end; ++i) {
      auto point = channels.template all_of<activate_first, typename L::V>(i, slope);
      auto y = plane_of_half<T>(s, f.out, n, i);
      const int64_t offset = plane(s, n, i);
      by_lanes<L::width>(s.hw, [=](int64_t j, auto count) {
        auto pack = input.again(offset + j, count);
        for (int k = 0; k < L::K; ++k) pack[k] = point.forward(pack[k]);
        L::store(past, y + j, L::rounded(pack), count);
      });
    }
  }
}

template <typename T, bool activate_first>
void reduce_planes(const Backward& g, Channels<typename Lanes<T>::A>& channels, int64_t begin, int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const Shape& s = g.shape;
  auto slope = static_cast<typename L::A>(g.slope);
  V zero(0);
  auto mask = L::mask(s.hw % L::width);
  std::vector<double> grads(end - begin), products(end - begin);
  std::vector<typename L::Pack> sums(end - begin), product_sums(end - begin);
  for (int64_t first = 0, each = pictures_a_run(s); first < s.n; first += each) {
    for (int64_t i = 0; i < end - begin; ++i) sums[i].fill(zero), product_sums[i].fill(zero);
    for (int64_t n = first; n < std::min(s.n, first + each); ++n) {
      for (int64_t i = begin; i < end; ++i) {
        auto point = channels.template all_of<activate_first, V>(i, slope);
        auto x = static_cast<const T*>(g.x) + plane(s, n, i);
        auto dy = plane_of_half<const T>(s, g.grad, n, i);
        auto sum = sums[i - begin], product = product_sums[i - begin];
        by_lanes<L::width>(s.hw, [&, x, dy, point](int64_t j, auto count) {
          auto values = L::load(x + j, count), gradients = L::load(dy + j, count);
          for (int k = 0; k < L::K; ++k) {
            auto [distance, grad] = point.backward(values[k], gradients[k]);
            if constexpr (std::is_same_v<decltype(count), int64_t>) {
              distance = V::blendv(zero, distance, mask[k]);
              grad = V::blendv(zero, grad, mask[k]);
            }
            sum[k] = sum[k] + grad;
            product[k] = at::vec::fmadd(grad, distance, product[k]);
          }
        });
        sums[i - begin] = sum, product_sums[i - begin] = product;
      }
    }
    for (int64_t i = 0; i < end - begin; ++i) {
      grads[i] += L::total(sums[i]);
      products[i] += L::total(product_sums[i]);
    }
  }
  for (int64_t i = begin; i < end; ++i) settle(g, channels, i, grads[i - begin], products[i - begin], s.n * s.hw);
}

template <typename T, bool activate_first>
void input_gradient_of_planes(const Backward& g, const Channels<typename Lanes<T>::A>& channels, int64_t begin,
                              int64_t end) {
  using L = Lanes<T>;
  using V = typename L::V;
  const Shape& s = g.shape;
  auto slope = static_cast<typename L::A>(g.slope);
  void* const out[2] = {g.dx, nullptr};
  const bool past = goes_past_caches<T>(s, out, s.hw), training = g.training;
  for (int64_t n = s.n - 1; n >= 0; --n) {
    for (int64_t i = begin; i < end; ++i) {
      auto point = channels.template all_of<activate_first, V>(i, slope);
      V a(channels.a[i]), b(channels.b[i]);
      auto x = static_cast<const T*>(g.x) + plane(s, n, i);
      auto dx = static_cast<T*>(g.dx) + plane(s, n, i);
      auto dy = plane_of_half<const T>(s, g.grad, n, i);
      by_lanes<L::width>(s.hw, [=](int64_t j, auto count) {
        auto values = L::load(x + j, count), gradients = L::load(dy + j, count);
        for (int k = 0; k < L::K; ++k) {
          auto [distance, grad] = point.backward(values[k], gradients[k]);
          values[k] = point.input_gradient(values[k], distance, grad, a, b, training);
        }
        L::store(past, dx + j, L::rounded(values), count);
      });
    }
  }
}

// One call ----------------------------------------------------------------------------------------------------------

// A seam without batch norm: picture after picture, the sum's first half of channels and then its second.
template <typename T>
void add_halves(const Forward& f) {
  using L = Lanes<T>;
  int64_t length = f.shape.c * f.shape.hw;
  auto left = static_cast<const T*>(f.x), right = static_cast<const T*>(f.right);
  at::parallel_for(0, f.shape.n, std::max<int64_t>(1, GRAIN / length), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (auto half : halves<T>(f.out, length)) {
        by_lanes<L::width>(half.length, [&](int64_t i, auto count) {
          auto x = L::load(left + n * length + half.first + i, count);
          auto y = L::load(right + n * length + half.first + i, count);
          for (int k = 0; k < L::K; ++k) x[k] = x[k] + y[k];
          L::store(half.data + n * half.length + i, x, count);
        });
      }
    }
  });
}

// Planes smaller than a few vectors are taken as rows too: a picture is one, and a channel has hw of its columns.
inline bool as_rows(const Shape& s) { return s.rows || s.hw < 64; }

template <typename T, bool activate_first>
void forward(const Forward& f) {
  if (!f.normalise) return add_halves<T>(f);
  const Shape& s = f.shape;
  Channels<typename Lanes<T>::A> channels(s.c, as_rows(s) ? s.hw : 1, f.weight, f.bias);
  for (int64_t i = 0; !f.training && i < s.c; ++i) settle(f, channels, i, {}, 1);
  if (as_rows(s)) {
    Runs runs(s.n, channels.columns);
    if (f.training) statistics_of_rows<T, activate_first>(f, channels, runs);
    return apply_to_rows<T, activate_first>(f, channels, runs);
  }
  by_blocks_of_channels(s, [&](int64_t begin, int64_t end) {
    if (f.training) statistics_of_planes<T, activate_first>(f, channels, begin, end);
    apply_to_planes<T, activate_first>(f, channels, begin, end);
  });
}

template <typename T, bool activate_first>
void backward(const Backward& g) {
  using A = typename Lanes<T>::A;
  const Shape& s = g.shape;
  Channels<A> channels(s.c, as_rows(s) ? s.hw : 1, g.weight, g.bias);
  for (int64_t i = 0; i < s.c; ++i) channels.set(i, static_cast<const A*>(g.mean)[i], static_cast<const A*>(g.rstd)[i]);
  bool reduces = g.training || g.dweight || g.dbias;
  if (as_rows(s)) {
    Runs runs(s.n, channels.columns);
    if (reduces) reduce_rows<T, activate_first>(g, channels, runs);
    return input_gradient_of_rows<T, activate_first>(g, channels, runs);
  }
  by_blocks_of_channels(s, [&](int64_t begin, int64_t end) {
    if (reduces) reduce_planes<T, activate_first>(g, channels, begin, end);
    input_gradient_of_planes<T, activate_first>(g, channels, begin, end);
  });
}

template <typename Call, typename F>
void with_type(const Call& call, F f) {
  switch (call.shape.type) {
    case Type::f64: return f(double());
    case Type::f32: return f(float());
    case Type::bf16: return f(c10::BFloat16());
    case Type::f16: return f(c10::Half());
  }
}

inline void run(const Forward& f) {
  with_type(f, [&](auto zero) {
    f.activate_first ? forward<decltype(zero), true>(f) : forward<decltype(zero), false>(f);
  });
}

inline void run(const Backward& g) {
  with_type(g, [&](auto zero) {
    g.activate_first ? backward<decltype(zero), true>(g) : backward<decltype(zero), false>(g);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace gan_ops
