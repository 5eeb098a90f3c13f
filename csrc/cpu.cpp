// The CPU kernels, on ATen's vectors; setup.py compiles this file alone for AVX2, where the processor is an x86 one.
//
// Memory is a table of rows: n*hw positions of c values in channels_last, pictures of c*hw values in contiguous. A
// kernel goes down columns of W values of a block of rows with what belongs to these columns in registers. Large planes
// are cut into columns W wide that lie below each other, and are taken channel by channel through both passes, so that
// the second finds in cache what the first has read; else all rows are read before the second pass begins.
//
// Statistics are shifted sums of short runs of rows, in float, put together in double by Chan's formula; runs and their
// order follow from the sizes alone, so that neither a second call nor another number of threads changes a bit.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "params.h"

namespace gan_ops {
namespace {

using V = at::vec::Vectorized<float>;
constexpr int W = 2 * V::size();  // values of a column in a row
constexpr int64_t GRAIN = 16384;  // values that a thread is worth starting for
using Pack = std::array<V, 2>;
using Full = std::integral_constant<int64_t, W>;  // a count of values that is known when the loop is compiled

template <typename T>
C10_ALWAYS_INLINE Pack load(const T* from, int64_t count = W) {
  if constexpr (std::is_same_v<T, float>) {
    if (count == W) return {V::loadu(from), V::loadu(from + V::size())};
    return {V::loadu(from, std::min<int64_t>(count, V::size())),
            V::loadu(from + V::size(), std::max<int64_t>(count - V::size(), 0))};
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, count));
    return {low, high};
  }
}

template <typename T>
C10_ALWAYS_INLINE void store(T* to, const Pack& values, int64_t count = W) {
  if constexpr (std::is_same_v<T, float>) {
    values[0].store(to, std::min<int64_t>(count, V::size()));
    values[1].store(to + V::size(), std::max<int64_t>(count - V::size(), 0));
  } else {
    at::vec::convert_from_float<T>(values[0], values[1]).store(to, count);
  }
}

// 0 in the lanes from `count` on.
C10_ALWAYS_INLINE void cut(Pack& values, int64_t count) {
  for (int k = 0; count < W && k < 2; ++k) {
    values[k] = V::blendv(V(0), values[k], V::arange(float(k * V::size()), 1) < V(float(count)));
  }
}

// value, times slope where `test` is not positive (at 0 and NaN too, as in PyTorch).
inline V sloped(V value, V test, V slope) { return V::blendv(value * slope, value, test > V(0)); }

// What a channel is normalised with. Forward and backward must agree on the sign of at(), so its order is fixed.
struct Point {
  V mean, scale, bias;  // scale: weight / deviation

  V at(V x) const { return at::vec::fmadd(x - mean, scale, bias); }
};

// A piece of the table: `height` rows, `stride` apart, of one column.
struct Column {
  int64_t at, half_at;              // offsets in a tensor, and in the half of it that is number `half`
  int64_t entry, half;              // entry: of its first value in Tables
  int64_t height, stride, half_stride;
};

struct Layout {
  int64_t rows, c, hw, repeat, columns;  // a channel has `repeat` entries in the tables, of columns in all
  int64_t each, runs;                    // rows of a run of values that are summed up in float
  bool planes;                           // large ones

  explicit Layout(const Shape& s) : rows(s.n), c(s.c), hw(s.hw), planes(s.hw >= 64) {
    repeat = planes ? W : hw;
    columns = c * repeat;
    each = planes ? std::max<int64_t>(1, 8192 / hw) : rows < 256 ? 16 : rows < 4096 ? 32 : rows < 65536 ? 128 : 512;
    runs = (rows + each - 1) / each;
  }

  int64_t begin(int64_t run) const { return run * each; }
  int64_t end(int64_t run) const { return std::min(rows, (run + 1) * each); }

  // f(column, count) for the values of channels [first, last) in a run; of all channels, where planes are small.
  template <typename F>
  void walk(int64_t run, int64_t first, int64_t last, bool split, F f) const {
    const int64_t half = split ? c / 2 : c, length = half * hw, tall = std::clamp<int64_t>(2048 / columns, 4, 32);
    for (int64_t m = begin(run); planes && m < end(run); ++m) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t second = i >= half, whole = hw / W * W;
        Column column{(m * c + i) * hw, (m * half + i - second * half) * hw, i * W, second, hw / W, W, W};
        f(column, Full{});
        column.at += whole, column.half_at += whole, column.height = 1;
        if (whole < hw) f(column, hw - whole);
      }
    }
    for (int64_t m = begin(run); !planes && m < end(run); m += tall) {
      for (int64_t h = 0; h <= split; ++h) {
        for (int64_t i = 0; i < length; i += W) {
          const int64_t entry = h * length + i;
          Column column{m * columns + entry, m * length + i, entry, h, std::min(tall, end(run) - m), columns, length};
          i + W <= length ? f(column, Full{}) : f(column, length - i);
        }
      }
    }
  }

  // reduce(run, channels), settle(channels) and apply(run, channels) over threads, in that order for each channel. The
  // last pass begins with the rows that a thread has just left.
  template <typename Reduce, typename Settle, typename Apply>
  void schedule(bool reduces, Reduce reduce, Settle settle, Apply apply) const {
    if (!planes) {
      const int64_t grain = std::max<int64_t>(1, GRAIN / (each * columns));
      at::parallel_for(0, reduces ? runs : 0, grain, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run) reduce(run, int64_t(0), c);
      });
      at::parallel_for(0, c, std::max<int64_t>(1, GRAIN / runs / 4), settle);
      return at::parallel_for(0, runs, grain, [&](int64_t begin, int64_t end) {
        for (int64_t run = end - 1; run >= begin; --run) apply(run, int64_t(0), c);
      });
    }
    const int64_t block = std::clamp<int64_t>(2048 / hw, 1, c);  // channels, for long stretches of memory
    at::parallel_for(0, (c + block - 1) / block, std::max<int64_t>(1, GRAIN / (block * rows * hw)),
                     [&](int64_t begin, int64_t end) {
      for (int64_t first = begin * block; first < std::min(c, end * block); first += block) {
        const int64_t last = std::min(c, first + block);
        for (int64_t run = 0; reduces && run < runs; ++run) reduce(run, first, last);
        settle(first, last);
        for (int64_t run = runs - 1; run >= 0; --run) apply(run, first, last);
      }
    });
  }
};

// Numbers of each channel, `repeat` times each, with room for a whole vector at the end.
struct Tables {
  const int64_t repeat;
  std::vector<float> mean, scale, bias, level, tilt;

  explicit Tables(const Layout& l)
      : repeat(l.repeat), mean(l.columns + W), scale(mean), bias(mean), level(mean), tilt(mean) {}

  void set(std::vector<float>& table, int64_t i, double value) {
    std::fill_n(&table[i * repeat], repeat, static_cast<float>(value));
  }
  void set_point(int64_t i, const float* weight, const float* bias_, float mean_, float rstd) {
    set(mean, i, mean_);
    set(scale, i, (weight ? weight[i] : 1) * rstd);
    set(bias, i, bias_ ? bias_[i] : 0);
  }
  std::array<Point, 2> points(int64_t entry) const {
    const Pack m = load(&mean[entry]), s = load(&scale[entry]), b = load(&bias[entry]);
    return {{{m[0], s[0], b[0]}, {m[1], s[1], b[1]}}};
  }
};

// A sum for each run and entry.
struct Sums {
  const int64_t repeat, padded;
  std::vector<float> all;

  explicit Sums(const Layout& l) : repeat(l.repeat), padded(l.columns + W), all(l.runs * padded) {}

  float* at(int64_t run, int64_t entry) { return &all[run * padded + entry]; }
  double of(int64_t run, int64_t i) { return std::accumulate(at(run, i * repeat), at(run, i * repeat) + repeat, 0.0); }
};

// What is normalised: a tensor, or the sum of both branches of a seam, which is written, and rounded as it is written.
template <typename T>
struct Input {
  const T *x, *right;
  T* sum;

  C10_ALWAYS_INLINE Pack operator()(int64_t at, int64_t count) const {
    Pack values = load(x + at, count);
    if (!right) return values;
    const Pack other = load(right + at, count);
    for (int k = 0; k < 2; ++k) values[k] = values[k] + other[k];
    store(sum + at, values, count);
    return load(sum + at, count);
  }
};

template <typename T, bool FIRST>
void forward(const Forward& f) {
  const Layout l(f.shape);
  const V slope_(static_cast<float>(f.slope));
  const Input<T> input{static_cast<const T*>(f.x), static_cast<const T*>(f.right), static_cast<T*>(f.sum)};
  Tables tables(l);
  Sums sums(l), squares(l);

  // The first value of a channel in a run, from which its sums are shifted.
  auto shift_of = [&](int64_t run, int64_t i) {
    const int64_t at = l.begin(run) * l.c * l.hw + i * l.hw;
    const float value = static_cast<float>(input.x[at]) + (input.right ? static_cast<float>(input.right[at]) : 0);
    return FIRST && !(value > 0) ? value * static_cast<float>(f.slope) : value;
  };
  auto reduce = [&](int64_t run, int64_t first, int64_t last) {
    std::vector<float> shifts((last - first) * l.repeat + W);
    for (int64_t i = first; i < last; ++i) std::fill_n(&shifts[(i - first) * l.repeat], l.repeat, shift_of(run, i));
    l.walk(run, first, last, false, [&, input](const Column column, auto count) {
      const V slope = slope_;
      float *const to_sum = sums.at(run, column.entry), *const to_square = squares.at(run, column.entry);
      const Pack shift = load(&shifts[column.entry - first * l.repeat]);
      Pack sum = load(to_sum), square = load(to_square);
      for (int64_t r = 0; r < column.height; ++r) {
        Pack x = input(column.at + r * column.stride, count);
        for (int k = 0; k < 2; ++k) x[k] = (FIRST ? sloped(x[k], x[k], slope) : x[k]) - shift[k];
        cut(x, count);
        for (int k = 0; k < 2; ++k) {
          sum[k] = sum[k] + x[k];
          square[k] = at::vec::fmadd(x[k], x[k], square[k]);
        }
      }
      store(to_sum, sum), store(to_square, square);
    });
  };
  auto settle = [&](int64_t first, int64_t last) {
    auto running_mean = static_cast<float*>(f.running_mean), running_var = static_cast<float*>(f.running_var);
    for (int64_t i = first; i < last; ++i) {
      double mean = 0, apart = 0, count = 0;  // of the values so far; apart: squared distances from the mean
      for (int64_t run = 0; f.training && run < l.runs; ++run) {
        const double n = (l.end(run) - l.begin(run)) * l.hw, sum = sums.of(run, i), own = shift_of(run, i) + sum / n;
        const double delta = own - mean;
        apart += std::max(squares.of(run, i) - sum * sum / n, 0.0) + delta * delta * count * n / (count + n);
        count += n;
        mean += std::isfinite(delta) ? delta * n / count : own;  // an infinite mean stays infinite
      }
      double variance = apart / count;
      if (!f.training) {
        mean = running_mean[i], variance = running_var[i];
      } else if (running_mean) {
        running_mean[i] += f.momentum * (mean - running_mean[i]);
        running_var[i] += f.momentum * ((f.biased ? variance : apart / (count - 1)) - running_var[i]);
      }
      static_cast<float*>(f.mean)[i] = mean;
      static_cast<float*>(f.rstd)[i] = 1 / std::sqrt(variance + f.eps);
      tables.set_point(i, static_cast<const float*>(f.weight), static_cast<const float*>(f.bias),
                       static_cast<float*>(f.mean)[i], static_cast<float*>(f.rstd)[i]);
    }
  };
  auto apply = [&](int64_t run, int64_t first, int64_t last) {
    const Input<T> again = f.training && f.right ? Input<T>{input.sum, nullptr, nullptr} : input;
    l.walk(run, first, last, f.out[1], [&, again](const Column column, auto count) {
      const V slope = slope_;
      const auto points = tables.points(column.entry);
      T* const out = static_cast<T*>(f.out[column.half]) + column.half_at;
      for (int64_t r = 0; r < column.height; ++r) {
        Pack x = again(column.at + r * column.stride, count);
        for (int k = 0; k < 2; ++k) {
          const V y = points[k].at(FIRST ? sloped(x[k], x[k], slope) : x[k]);
          x[k] = FIRST ? y : sloped(y, y, slope);
        }
        store(out + r * column.half_stride, x, count);
      }
    });
  };
  l.schedule(f.training, reduce, settle, apply);
}

template <typename T, bool FIRST>
void backward(const Backward& b) {
  const Layout l(b.shape);
  const V slope_(static_cast<float>(b.slope));
  auto mean = static_cast<const float*>(b.mean), rstd = static_cast<const float*>(b.rstd);
  Tables tables(l);
  Sums grads(l), products(l);
  for (int64_t i = 0; i < l.c; ++i) {
    tables.set_point(i, static_cast<const float*>(b.weight), static_cast<const float*>(b.bias), mean[i], rstd[i]);
  }

  // For the values of a column, use(offset in x, x, distance from the mean, gradient of what was normalised).
  auto down = [&](const Column& column, auto count, auto use) {
    const V slope = slope_;
    const auto points = tables.points(column.entry);
    const T *const x = static_cast<const T*>(b.x) + column.at;
    const T *const grad = static_cast<const T*>(b.grad[column.half]) + column.half_at;
    for (int64_t r = 0; r < column.height; ++r) {
      const Pack values = load(x + r * column.stride, count);
      Pack apart, g = load(grad + r * column.half_stride, count);
      for (int k = 0; k < 2; ++k) {
        apart[k] = (FIRST ? sloped(values[k], values[k], slope) : values[k]) - points[k].mean;
        if (!FIRST) g[k] = sloped(g[k], points[k].at(values[k]), slope);
      }
      use(column.at + r * column.stride, values, apart, g);
    }
  };
  auto reduce = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, b.grad[1], [&](const Column column, auto count) {
      float *const to_grad = grads.at(run, column.entry), *const to_product = products.at(run, column.entry);
      Pack sum = load(to_grad), product = load(to_product);
      down(column, count, [&](int64_t, const Pack&, Pack apart, Pack g) {
        cut(apart, count), cut(g, count);
        for (int k = 0; k < 2; ++k) {
          sum[k] = sum[k] + g[k];
          product[k] = at::vec::fmadd(g[k], apart[k], product[k]);
        }
      });
      store(to_grad, sum), store(to_product, product);
    });
  };
  auto settle = [&](int64_t first, int64_t last) {
    const double count = l.rows * l.hw;
    for (int64_t i = first; i < last; ++i) {
      double sum = 0, product = 0;
      for (int64_t run = 0; run < l.runs; ++run) sum += grads.of(run, i), product += products.of(run, i);
      if (b.dbias) static_cast<float*>(b.dbias)[i] = sum;
      if (b.dweight) static_cast<float*>(b.dweight)[i] = product * rstd[i];
      const double scale = tables.scale[i * l.repeat];
      tables.set(tables.level, i, scale * sum / count);
      tables.set(tables.tilt, i, scale * product / count * rstd[i] * rstd[i]);
    }
  };
  auto apply = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, b.grad[1], [&](const Column column, auto count) {
      const Pack scale = load(&tables.scale[column.entry]);
      const Pack level = load(&tables.level[column.entry]), tilt = load(&tables.tilt[column.entry]);
      const V slope = slope_;
      const bool training = b.training;
      T* const dx = static_cast<T*>(b.dx);
      down(column, count, [&](int64_t at, const Pack& x, const Pack& apart, Pack g) {
        for (int k = 0; k < 2; ++k) {
          g[k] = g[k] * scale[k];
          if (training) g[k] = g[k] - at::vec::fmadd(apart[k], tilt[k], level[k]);
          if (FIRST) g[k] = sloped(g[k], x[k], slope);
        }
        store(dx + at, g, count);
      });
    });
  };
  l.schedule(b.training || b.dweight || b.dbias, reduce, settle, apply);
}

// A seam that is not normalised.
template <typename T>
void add(const Forward& f) {
  const Layout l(f.shape);
  auto apply = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, f.out[1], [&](const Column column, auto count) {
      const T *const left = static_cast<const T*>(f.x) + column.at, *const right = static_cast<const T*>(f.right);
      T* const out = static_cast<T*>(f.out[column.half]) + column.half_at;
      for (int64_t r = 0; r < column.height; ++r) {
        Pack x = load(left + r * column.stride, count);
        const Pack y = load(right + column.at + r * column.stride, count);
        for (int k = 0; k < 2; ++k) x[k] = x[k] + y[k];
        store(out + r * column.half_stride, x, count);
      }
    });
  };
  l.schedule(false, [](auto...) {}, [](auto...) {}, apply);
}

template <typename T>
void run_as(const Forward& f) {
  f.normalise ? f.activate_first ? forward<T, true>(f) : forward<T, false>(f) : add<T>(f);
}

template <typename T>
void run_as(const Backward& b) {
  b.activate_first ? backward<T, true>(b) : backward<T, false>(b);
}

}  // namespace

void run_on_cpu(const Forward& f) { f.shape.type == Type::f32 ? run_as<float>(f) : run_as<c10::BFloat16>(f); }
void run_on_cpu(const Backward& b) { b.shape.type == Type::f32 ? run_as<float>(b) : run_as<c10::BFloat16>(b); }

}  // namespace gan_ops
