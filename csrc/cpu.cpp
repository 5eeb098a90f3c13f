// The CPU kernels, on ATen's vectors; setup.py compiles this file alone for AVX2, where the processor is an x86 one.
//
// Memory is a table of rows, as params.h has it. A kernel goes down columns of W values of a block of rows, with what
// belongs to these columns in registers. Large planes are cut into columns W wide that lie below each other, and are
// taken channel by channel through both passes, so that the second finds in cache what the first has read; else all
// rows are read before the second pass begins.
//
// Statistics are sums of distances from a channel's first value: in float over short runs of rows, in double over the
// runs. Runs and their order follow from the sizes alone, so that neither a second call nor another number of threads
// changes a bit.
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
using Full = std::integral_constant<int64_t, W>;  // a count of values that is known when the loop is compiled

// Fetches what lies `ahead` too, which comes next, since the processor foresees only long stretches.
template <typename T>
C10_ALWAYS_INLINE Pack load(const T* from, int64_t count = W, int64_t ahead = 0) {
#ifdef __GNUC__
  if (ahead) __builtin_prefetch(from + ahead);
#endif
  if constexpr (std::is_same_v<T, float>) {
    const int64_t low = std::min<int64_t>(count, W / 2);
    return {V::loadu(from, low), V::loadu(from + low, count - low)};
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, count));
    return {low, high};
  }
}

template <typename T>
C10_ALWAYS_INLINE void store(T* to, const Pack& values, int64_t count = W) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t low = std::min<int64_t>(count, W / 2);
    values[0].store(to, low), values[1].store(to + low, count - low);
  } else {
    at::vec::convert_from_float<T>(values[0], values[1]).store(to, count);
  }
}

// 0 in the lanes from `count` on, for vector k of a pack.
C10_ALWAYS_INLINE V cut(V value, int k, int64_t count) {
  return count == W ? value : V::blendv(V(0), value, V::arange(float(k * W / 2), 1) < V(float(count)));
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
  bool split, planes;                    // in halves; large ones

  Layout(const Shape& s, bool split) : rows(s.n), c(s.c), hw(s.hw), split(split), planes(s.hw >= 64) {
    repeat = planes ? W : hw, columns = c * repeat;
    each = planes ? std::max<int64_t>(1, 8192 / hw) : std::clamp<int64_t>(rows / 64, 32, 512);
    runs = (rows + each - 1) / each;
  }

  // f(column, count) for the values of channels [first, last) in a run; of all channels, where planes are small.
  template <typename F>
  void walk(int64_t run, int64_t first, int64_t last, F f) const {
    const int64_t half = split ? c / 2 : c, length = half * hw, tall = std::clamp<int64_t>(1024 / columns, 4, 16);
    const int64_t begin = run * each, end = std::min(rows, begin + each);
    for (int64_t m = begin; planes && m < end; ++m) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t second = i >= half, whole = hw / W * W;
        Column column{(m * c + i) * hw, (m * half + i - second * half) * hw, second, i * W, hw / W, W, W, 16 * W};
        f(column, Full{});
        column.at += whole, column.half_at += whole, column.height = 1;
        if (whole < hw) f(column, hw - whole);
      }
    }
    for (int64_t m = begin; !planes && m < end; m += tall) {
      for (int64_t i = 0; i < columns; i += i % length + W < length ? W : length - i % length) {
        const int64_t height = std::min(tall, end - m), at = m * length + i % length, count = length - i % length;
        const Column column{m * columns + i, at, i / length, i, height, columns, length, tall * length};
        count < W ? f(column, count) : f(column, Full{});
      }
    }
  }

  // reduce(run, channels), settle(channels) and apply(run, channels) over threads, in that order for each channel. The
  // last pass begins with the rows that a thread has just left.
  template <typename Reduce, typename Settle, typename Apply>
  void schedule(bool reduces, Reduce reduce, Settle settle, Apply apply) const {
    const auto over = [](int64_t count, int64_t values, auto f) {  // a thread is worth starting for 16384 values
      at::parallel_for(0, count, std::max<int64_t>(1, 16384 / values), f);
    };
    if (planes) {
      return over(c, rows * hw, [&](int64_t begin, int64_t end) {
        for (int64_t first = begin, last; first < end; first = last) {
          last = std::min(end, first + std::max<int64_t>(1, 2048 / hw));  // long enough stretches of memory
          for (int64_t run = 0; reduces && run < runs; ++run) reduce(run, first, last);
          if (reduces) settle(first, last);
          for (int64_t run = runs - 1; run >= 0; --run) apply(run, first, last);
        }
      });
    }
    over(reduces ? runs : 0, each * columns, [&](int64_t begin, int64_t end) {
      for (int64_t run = begin; run < end; ++run) reduce(run, 0, c);
    });
    over(reduces ? c : 0, 4 * runs, settle);
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
  void set(int64_t i, double value) { std::fill_n(at(i * repeat), repeat, float(value)); }
  double sum(int64_t i) {
    double total = 0;
    for (size_t k = i * repeat; k < all.size(); k += padded) total = std::accumulate(&all[k], &all[k] + repeat, total);
    return total;
  }
};

// One call, of either way. FIRST: LeakyReLU comes first.
template <typename T, bool FIRST, class Call>
void run(const Call& call) {
  constexpr bool BACK = std::is_same_v<Call, Backward>;
  const Layout l(call.shape, call.halves[1]);
  const V slope_(float(call.slope));
  const auto x = static_cast<const T*>(call.x);
  Numbers mean(l), scale(l), bias(l), level(l, BACK), tilt(l, BACK), sums(l, l.runs), products(l, l.runs);

  // What a channel is normalised with. Forward and backward must agree on the sign of what LeakyReLU sees.
  auto set_norm = [&](int64_t i) {
    mean.set(i, call.mean[i]), scale.set(i, call.weight[i] * call.rstd[i]), bias.set(i, call.bias[i]);
  };
  // Down a column, use(k, x, distance from the mean, y) for vector k of each row, and what it returns to rows of `to`,
  // if there are any; in backward y is the gradient of what was normalised.
  auto down = [&](const Column& column, auto count, T* to, int64_t stride, auto use) C10_ALWAYS_INLINE_ATTRIBUTE {
    const auto centre = load(mean.at(column.entry)), factor = load(scale.at(column.entry));
    const auto shift = load(bias.at(column.entry));
    const auto half = static_cast<const T*>(call.halves[column.half]) + column.half_at;
    const V slope = slope_;
    for (int64_t r = 0; r < column.height; ++r) {
      const Pack v = load(x + column.at + r * column.stride, count, column.ahead);
      Pack y;
      if (BACK) y = load(half + r * column.half_stride, count, column.ahead);
      for (int k = 0; k < 2; ++k) {
        const V apart = (FIRST ? leaky(v[k], v[k], slope) : v[k]) - centre[k];
        const V normal = at::vec::fmadd(apart, factor[k], shift[k]);
        if (!BACK) y[k] = normal;
        y[k] = use(k, v[k], apart, FIRST ? y[k] : leaky(y[k], normal, slope));
      }
      if (to) store(to + r * stride, y, count);
    }
  };
  auto reduce = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, [&](const Column column, auto count) C10_ALWAYS_INLINE_ATTRIBUTE {
      Pack sum = load(sums.at(column.entry, run)), product = load(products.at(column.entry, run));
      down(column, count, nullptr, 0, [&](int k, V, V apart, V y) C10_ALWAYS_INLINE_ATTRIBUTE {
        const V one = cut(BACK ? y : apart, k, count);
        sum[k] = sum[k] + one, product[k] = at::vec::fmadd(one, cut(apart, k, count), product[k]);
        return one;
      });
      store(sums.at(column.entry, run), sum), store(products.at(column.entry, run), product);
    });
  };
  auto settle = [&](int64_t first, int64_t last) {
    const double count = l.rows * l.hw;
    for (int64_t i = first; i < last; ++i) {
      const double sum = sums.sum(i), product = products.sum(i);
      if constexpr (BACK) {
        const double rstd = call.rstd[i], share = *scale.at(i * l.repeat) / count;
        call.dbias[i] = sum, call.dweight[i] = product * rstd;
        level.set(i, share * sum), tilt.set(i, share * product * rstd * rstd);
      } else {
        const double squares = std::max(product - sum * sum / count, 0.0);  // of distances from the mean
        call.mean[i] = *mean.at(i * l.repeat) + sum / count, call.rstd[i] = 1 / std::sqrt(squares / count + call.eps);
        if (call.running_mean) {
          const double variance = squares / (call.biased ? count : count - 1);
          call.running_mean[i] += call.momentum * (call.mean[i] - call.running_mean[i]);
          call.running_var[i] += call.momentum * (variance - call.running_var[i]);
        }
        set_norm(i);
      }
    }
  };
  auto apply = [&](int64_t run, int64_t first, int64_t last) {
    l.walk(run, first, last, [&](const Column column, auto count) C10_ALWAYS_INLINE_ATTRIBUTE {
      if constexpr (BACK) {
        const auto factor = load(scale.at(column.entry)), less = load(level.at(column.entry));
        const auto slant = load(tilt.at(column.entry));
        const bool training = call.training;
        const V slope = slope_;
        T* const dx = static_cast<T*>(call.dx) + column.at;
        down(column, count, dx, column.stride, [&](int k, V v, V apart, V g) C10_ALWAYS_INLINE_ATTRIBUTE {
          g = g * factor[k];
          if (training) g = g - at::vec::fmadd(apart, slant[k], less[k]);
          return FIRST ? leaky(g, v, slope) : g;
        });
      } else {
        T* const out = static_cast<T*>(call.halves[column.half]) + column.half_at;
        down(column, count, out, column.half_stride, [](int, V, V, V y) C10_ALWAYS_INLINE_ATTRIBUTE { return y; });
      }
    });
  };
  for (int64_t i = 0; i < l.c; ++i) {
    const float value = x[i * l.hw];  // what forward sums up in training are distances from it
    const bool known = BACK || !call.training;
    if (known) set_norm(i);
    if (!known && std::isfinite(value)) mean.set(i, FIRST && value <= 0 ? value * float(call.slope) : value);
  }
  l.schedule(BACK || call.training, reduce, settle, apply);
}

}  // namespace

template <class Call>
void run_on_cpu(const Call& call) {
  if (call.shape.type == Type::f32) return call.activate_first ? run<float, true>(call) : run<float, false>(call);
  call.activate_first ? run<c10::BFloat16, true>(call) : run<c10::BFloat16, false>(call);
}
template void run_on_cpu(const Forward&);
template void run_on_cpu(const Backward&);

}  // namespace gan_ops
