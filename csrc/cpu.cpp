// The CPU kernels, on ATen's vectors; setup.py compiles this file alone for AVX2, where the processor is an x86 one.
//
// Memory is a table of rows, as params.h has it. A kernel goes down columns of W values of a block of rows, with what
// belongs to these columns in registers. Large planes are cut into columns W wide that lie below each other, and are
// taken channel by channel through both passes, so that the second finds in cache what the first has read; else all
// rows are read before the second pass begins.
//
// Statistics are shifted sums of short runs of rows, in float, put together in double by Chan's formula; runs and their
// order follow from the sizes alone, so that neither a second call nor another number of threads changes a bit.
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <array>
#include <cmath>
#include <numeric>
#include <vector>

#include "params.h"

namespace gan_ops {
namespace {

using V = at::vec::Vectorized<float>;
using Pack = std::array<V, 2>;
constexpr int W = 2 * V::size();  // values of a column in a row
constexpr int64_t GRAIN = 16384;  // values that a thread is worth starting for
using Full = std::integral_constant<int64_t, W>;  // a count of values that is known when the loop is compiled

// Fetches what lies `ahead` too, which comes next, since the processor foresees only long stretches.
template <typename T>
C10_ALWAYS_INLINE Pack load(const T* from, int64_t count = W, int64_t ahead = 0) {
#ifdef __GNUC__
  if (ahead) __builtin_prefetch(from + ahead);
#endif
  if constexpr (std::is_same_v<T, float>) {
    return {V::loadu(from, std::min<int64_t>(count, W / 2)), V::loadu(from + W / 2, std::max<int64_t>(count - W / 2, 0))};
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, count));
    return {low, high};
  }
}

template <typename T>
C10_ALWAYS_INLINE void store(T* to, const Pack& values, int64_t count = W) {
  if constexpr (std::is_same_v<T, float>) {
    values[0].store(to, std::min<int64_t>(count, W / 2));
    values[1].store(to + W / 2, std::max<int64_t>(count - W / 2, 0));
  } else {
    at::vec::convert_from_float<T>(values[0], values[1]).store(to, count);
  }
}

// 0 in the lanes from `count` on.
C10_ALWAYS_INLINE void cut(Pack& values, int64_t count) {
  for (int k = 0; count < W && k < 2; ++k) {
    values[k] = V::blendv(V(0), values[k], V::arange(float(k * W / 2), 1) < V(float(count)));
  }
}

// value, times slope where `test` is not positive (at 0 and NaN too, as in PyTorch).
C10_ALWAYS_INLINE V leaky(V value, V test, V slope) { return V::blendv(value * slope, value, test > V(0)); }

// A piece of the table: `height` rows, `stride` apart, of one column.
struct Column {
  int64_t at, half_at, half;            // offsets in a tensor, and in the half of it that is number `half`
  int64_t entry;                        // of its first value in Numbers
  int64_t height, stride, half_stride, ahead;
};

struct Layout {
  int64_t rows, c, hw, repeat, columns;  // a channel has `repeat` entries in Numbers, of columns in all
  int64_t each, runs;                    // rows of a run of values that are summed up in float
  bool planes;                           // large ones

  explicit Layout(const Shape& s) : rows(s.n), c(s.c), hw(s.hw), planes(s.hw >= 64) {
    repeat = planes ? W : hw, columns = c * repeat;
    each = planes ? std::max<int64_t>(1, 8192 / hw) : rows < 256 ? (hw == 1 ? 64 : 16) : rows < 4096 ? 32 : rows < 65536 ? 128 : 512;
    runs = (rows + each - 1) / each;
  }

  int64_t end(int64_t run) const { return std::min(rows, (run + 1) * each); }

  // f(column, count) for the values of channels [first, last) in a run; of all channels, where planes are small.
  template <typename F>
  void walk(int64_t run, int64_t first, int64_t last, bool split, F f) const {
    const int64_t half = split ? c / 2 : c, length = half * hw, tall = std::clamp<int64_t>(1024 / columns, 4, 16);
    for (int64_t m = run * each; planes && m < end(run); ++m) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t second = i >= half, whole = hw / W * W;
        Column column{(m * c + i) * hw, (m * half + i - second * half) * hw, second, i * W, hw / W, W, W, 16 * W};
        f(column, Full{});
        column.at += whole, column.half_at += whole, column.height = 1;
        if (whole < hw) f(column, hw - whole);
      }
    }
    for (int64_t m = run * each; !planes && m < end(run); m += tall) {
      for (int64_t i = 0; i < length * (1 + split); i += i % length + W < length ? W : length - i % length) {
        const int64_t height = std::min(tall, end(run) - m), count = length - i % length;
        const Column column{m * columns + i, m * length + i % length, i / length, i, height, columns, length, tall * length};
        count < W ? f(column, count) : f(column, Full{});
      }
    }
  }

  // reduce(run, channels), settle(channels) and apply(run, channels) over threads, in that order for each channel. The
  // last pass begins with the rows that a thread has just left.
  template <typename Reduce, typename Settle, typename Apply>
  void schedule(bool reduces, Reduce reduce, Settle settle, Apply apply) const {
    const int64_t block = planes ? std::clamp<int64_t>(2048 / hw, 1, c) : c, blocks = (c + block - 1) / block;
    const auto over = [](int64_t count, int64_t values, auto f) {
      at::parallel_for(0, count, std::max<int64_t>(1, GRAIN / values), f);
    };
    if (planes) {
      return over(blocks, block * rows * hw, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin * block; first < std::min(c, end * block); first += block) {
          const int64_t last = std::min(c, first + block);
          for (int64_t run = 0; reduces && run < runs; ++run) reduce(run, first, last);
          settle(first, last);
          for (int64_t run = runs - 1; run >= 0; --run) apply(run, first, last);
        }
      });
    }
    over(reduces ? runs : 0, each * columns, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) reduce(run, 0, c);
    });
    over(c, 4 * runs, settle);
    over(runs, each * columns, [&](int64_t begin, int64_t end) {
      for (int64_t run = end - 1; run >= begin; --run) apply(run, 0, c);
    });
  }
};

// A number for each channel, `repeat` times, of one run or of each; with room for a whole vector at the end.
struct Numbers {
  const int64_t repeat, padded;
  std::vector<float> all;

  explicit Numbers(const Layout& l, int64_t runs = 1) : repeat(l.repeat), padded(l.columns + W), all(runs * padded) {}

  float* at(int64_t entry, int64_t run = 0) { return &all[run * padded + entry]; }
  void set(int64_t i, double value, int64_t run = 0) { std::fill_n(at(i * repeat, run), repeat, float(value)); }
  double sum(int64_t i, int64_t run) { return std::accumulate(at(i * repeat, run), at(i * repeat, run) + repeat, 0.0); }
};

// What channels are normalised with. Forward and backward must agree on the sign of what LeakyReLU sees.
struct Norm {
  Numbers mean, scale, bias;  // scale: weight / deviation

  explicit Norm(const Layout& l) : mean(l), scale(l), bias(l) {}

  template <typename Call>
  void set(const Call& call, int64_t i) {
    auto weight = static_cast<const float*>(call.weight), shift = static_cast<const float*>(call.bias);
    mean.set(i, static_cast<const float*>(call.mean)[i]), bias.set(i, shift ? shift[i] : 0);
    scale.set(i, (weight ? weight[i] : 1) * static_cast<const float*>(call.rstd)[i]);
  }
};

// NORMALISE: else a seam's sum alone. FIRST: LeakyReLU comes first.
template <typename T, bool NORMALISE, bool FIRST>
void forward(const Forward& f) {
  const Layout l(f.shape);
  const V slope_(float(f.slope));
  const auto x = static_cast<const T*>(f.x), right = static_cast<const T*>(f.right);
  const auto sum_of_seam = static_cast<T*>(f.sum);
  Norm norm(l);
  Numbers shifts(l, l.runs), sums(l, l.runs), squares(l, l.runs);

  // Values as they are read first: a sum is rounded as it is written.
  auto read = [=](int64_t at, auto count, int64_t ahead) C10_ALWAYS_INLINE_ATTRIBUTE {
    Pack values = load(x + at, count, ahead);
    if (!right) return values;
    const Pack other = load(right + at, count, ahead);
    for (int k = 0; k < 2; ++k) values[k] = values[k] + other[k];
    if (!NORMALISE) return values;
    store(sum_of_seam + at, values, count);
    return load(sum_of_seam + at, count);
  };
  // The first value of a channel in a run, from which its sums are shifted.
  auto shift_of = [&](int64_t run, int64_t i) {
    const int64_t at = run * l.each * l.c * l.hw + i * l.hw;
    const float value = right ? float(x[at]) + float(right[at]) : float(x[at]);
    return !std::isfinite(value) ? 0 : FIRST && value <= 0 ? value * float(f.slope) : value;
  };
  auto reduce = [&](int64_t run, int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) shifts.set(i, shift_of(run, i), run);
    l.walk(run, first, last, false, [&](const Column column, auto count) {
      const Pack shift = load(shifts.at(column.entry, run));
      const V slope = slope_;
      Pack sum = load(sums.at(column.entry, run)), square = load(squares.at(column.entry, run));
      for (int64_t r = 0; r < column.height; ++r) {
        Pack v = read(column.at + r * column.stride, count, column.ahead);
        for (int k = 0; k < 2; ++k) v[k] = (FIRST ? leaky(v[k], v[k], slope) : v[k]) - shift[k];
        cut(v, count);
        for (int k = 0; k < 2; ++k) sum[k] = sum[k] + v[k], square[k] = at::vec::fmadd(v[k], v[k], square[k]);
      }
      store(sums.at(column.entry, run), sum), store(squares.at(column.entry, run), square);
    });
  };
  auto settle = [&](int64_t first, int64_t last) {
    auto running_mean = static_cast<float*>(f.running_mean), running_var = static_cast<float*>(f.running_var);
    for (int64_t i = first; NORMALISE && i < last; ++i) {
      double mean = 0, apart = 0, count = 0;  // of the values so far; apart: squared distances from the mean
      for (int64_t run = 0; f.training && run < l.runs; ++run) {
        const double n = (l.end(run) - run * l.each) * l.hw, sum = sums.sum(i, run);
        const double own = *shifts.at(i * l.repeat, run) + sum / n, delta = own - mean;
        apart += std::max(squares.sum(i, run) - sum * sum / n, 0.0) + delta * delta * count * n / (count + n);
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
      static_cast<float*>(f.mean)[i] = mean, static_cast<float*>(f.rstd)[i] = 1 / std::sqrt(variance + f.eps);
      norm.set(f, i);
    }
  };
  auto apply = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, f.out[1], [&](const Column column, auto count) {
      const auto mean = load(norm.mean.at(column.entry)), scale = load(norm.scale.at(column.entry));
      const auto bias = load(norm.bias.at(column.entry));
      const T* const again = NORMALISE && f.training ? right ? sum_of_seam : x : nullptr;
      T* const out = static_cast<T*>(f.out[column.half]) + column.half_at;
      const V slope = slope_;
      for (int64_t r = 0; r < column.height; ++r) {
        const int64_t at = column.at + r * column.stride;
        Pack v = again ? load(again + at, count, column.ahead) : read(at, count, column.ahead);
        for (int k = 0; NORMALISE && k < 2; ++k) {
          if (FIRST) v[k] = leaky(v[k], v[k], slope);
          v[k] = at::vec::fmadd(v[k] - mean[k], scale[k], bias[k]);
          if (!FIRST) v[k] = leaky(v[k], v[k], slope);
        }
        store(out + r * column.half_stride, v, count);
      }
    });
  };
  l.schedule(NORMALISE && f.training, reduce, settle, apply);
}

template <typename T, bool FIRST>
void backward(const Backward& b) {
  const Layout l(b.shape);
  const V slope_(float(b.slope));
  Norm norm(l);
  Numbers grads(l, l.runs), products(l, l.runs), level(l), tilt(l);
  for (int64_t i = 0; i < l.c; ++i) norm.set(b, i);

  // Down a column, use(row, x, distance from the mean, gradient of what was normalised).
  auto down = [&](const Column& column, auto count, auto use) C10_ALWAYS_INLINE_ATTRIBUTE {
    const auto mean = load(norm.mean.at(column.entry)), scale = load(norm.scale.at(column.entry));
    const auto bias = load(norm.bias.at(column.entry));
    const auto x = static_cast<const T*>(b.x) + column.at, dy = static_cast<const T*>(b.grad[column.half]) + column.half_at;
    const V slope = slope_;
    for (int64_t r = 0; r < column.height; ++r) {
      const Pack v = load(x + r * column.stride, count, column.ahead);
      Pack apart, g = load(dy + r * column.half_stride, count, column.ahead);
      for (int k = 0; k < 2; ++k) {
        apart[k] = (FIRST ? leaky(v[k], v[k], slope) : v[k]) - mean[k];
        if (!FIRST) g[k] = leaky(g[k], at::vec::fmadd(apart[k], scale[k], bias[k]), slope);
      }
      use(r, v, apart, g);
    }
  };
  auto reduce = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, b.grad[1], [&](const Column column, auto count) {
      Pack sum = load(grads.at(column.entry, run)), product = load(products.at(column.entry, run));
      down(column, count, [&](int64_t, const Pack&, Pack apart, Pack g) C10_ALWAYS_INLINE_ATTRIBUTE {
        cut(apart, count), cut(g, count);
        for (int k = 0; k < 2; ++k) sum[k] = sum[k] + g[k], product[k] = at::vec::fmadd(g[k], apart[k], product[k]);
      });
      store(grads.at(column.entry, run), sum), store(products.at(column.entry, run), product);
    });
  };
  auto settle = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      double sum = 0, product = 0, rstd = static_cast<const float*>(b.rstd)[i];
      for (int64_t run = 0; run < l.runs; ++run) sum += grads.sum(i, run), product += products.sum(i, run);
      if (b.dbias) static_cast<float*>(b.dbias)[i] = sum;
      if (b.dweight) static_cast<float*>(b.dweight)[i] = product * rstd;
      const double share = *norm.scale.at(i * l.repeat) / double(l.rows * l.hw);
      level.set(i, share * sum), tilt.set(i, share * product * rstd * rstd);
    }
  };
  auto apply = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, b.grad[1], [&](const Column column, auto count) {
      const auto scale = load(norm.scale.at(column.entry)), less = load(level.at(column.entry));
      const auto slant = load(tilt.at(column.entry));
      const bool training = b.training;
      const V slope = slope_;
      T* const dx = static_cast<T*>(b.dx) + column.at;
      down(column, count, [&](int64_t r, const Pack& x, const Pack& apart, Pack g) C10_ALWAYS_INLINE_ATTRIBUTE {
        for (int k = 0; k < 2; ++k) {
          g[k] = g[k] * scale[k];
          if (training) g[k] = g[k] - at::vec::fmadd(apart[k], slant[k], less[k]);
          if (FIRST) g[k] = leaky(g[k], x[k], slope);
        }
        store(dx + r * column.stride, g, count);
      });
    });
  };
  l.schedule(b.training || b.dweight || b.dbias, reduce, settle, apply);
}

template <typename T>
void run(const Forward& f) {
  f.activate_first ? forward<T, true, true>(f) : f.normalise ? forward<T, true, false>(f) : forward<T, false, false>(f);
}

template <typename T>
void run(const Backward& b) {
  b.activate_first ? backward<T, true>(b) : backward<T, false>(b);
}

}  // namespace

void run_on_cpu(const Forward& f) { f.shape.type == Type::f32 ? run<float>(f) : run<c10::BFloat16>(f); }
void run_on_cpu(const Backward& b) { b.shape.type == Type::f32 ? run<float>(b) : run<c10::BFloat16>(b); }

}  // namespace gan_ops
