// The CPU kernels, on ATen's vectors; setup.py compiles this file alone for AVX2, where the processor is an x86 one.
// The formulas, and the names in them, are at the top of cuda_kernels.h.
//
// Sums are in float over a part's rows, in double over the parts, whose order follows from the sizes alone: neither a
// second call nor another number of threads changes a bit.
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

using Vec = at::vec::Vectorized<float>;
using Line = std::array<Vec, 2>;
constexpr int64_t W = 2 * Vec::size();  // values of a line
using Full = std::integral_constant<int64_t, W>;  // a count of values that is known when the loop is compiled

// Fetches what lies `ahead` too, which comes next, since the processor foresees only long stretches.
template <typename T>
C10_ALWAYS_INLINE Line load(const T* from, int64_t count = W, int64_t ahead = 0) {
#ifdef __GNUC__
  if (ahead) __builtin_prefetch(from + ahead, 0, 2);
#endif
  if constexpr (std::is_same_v<T, float>) {
    const int64_t low = std::min(count, W / 2);
    return {Vec::loadu(from, low), Vec::loadu(from + low, count - low)};
  } else {
    auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from, count));
    return {low, high};
  }
}

template <typename T>
C10_ALWAYS_INLINE void store(T* to, const Line& line, int64_t count = W) {
  if constexpr (std::is_same_v<T, float>) {
    const int64_t low = std::min(count, W / 2);
    line[0].store(to, low);
    line[1].store(to + low, count - low);
  } else {
    at::vec::convert_from_float<T>(line[0], line[1]).store(to, count);
  }
}

// v, times slope where `test` is not positive (at 0 and NaN too, as in PyTorch).
C10_ALWAYS_INLINE Vec leaky(Vec v, Vec test, Vec slope) { return Vec::blendv(v * slope, v, test > Vec(0)); }

// What a loop goes down: lines of W values, or of fewer, which lie in neighbouring rows, or are cut from a large plane.
struct Column {
  int64_t height, entry, partial;  // lines; where the first value's numbers are, and its sums in this part
  int64_t at, half, half_at;       // where the first value is: in x and dx; in y and dy, in which half of them
};

// How the table of params.h is worked on. All of `numbers` are of a channel, side by side.
struct Geometry {
  int64_t rows, c, hw;          // rows, channels, and values of a channel in a row
  int64_t length;               // of a row of y, or of its half
  bool large;                   // planes: threads share the channels, not the rows
  int64_t group;                // channels that go through both passes before the next do, and stay in cache
  int64_t chunk, parts;         // rows of a part; parts, of which the last may have fewer
  int64_t block;                // rows of a column, where planes are small
  int64_t stride, half_stride, ahead;  // from line to line, in x and in a half; from a line to the one to fetch
  int64_t span, padded;         // numbers of a channel; of all, with room for a line behind the last

  Geometry(const Shape& s, bool split) : rows(s.n), c(s.c), hw(s.hw), large(s.hw >= 64) {
    length = split ? c * hw / 2 : c * hw;
    group = large ? std::max<int64_t>(1, 2048 / hw) : c;  // long enough stretches of memory
    chunk = large ? std::max<int64_t>(1, 8192 / hw) : std::clamp<int64_t>(rows / 64, 32, 512);
    parts = (rows + chunk - 1) / chunk;
    block = std::clamp<int64_t>(1024 / (c * hw), 4, 16);
    stride = large ? W : c * hw;
    half_stride = large ? W : length;
    ahead = large ? 16 * W : block * length;
    span = large ? W : hw;
    padded = c * span + W;
  }

  // f(column, values of a line) for channels [first, last) of a part.
  void walk(int64_t part, int64_t first, int64_t last, auto f) const {
    const int64_t begin = part * chunk, end = std::min(rows, begin + chunk);
    large ? walk_planes(part, begin, end, first, last, f) : walk_rows(part, begin, end, f);
  }
  void walk_planes(int64_t part, int64_t begin, int64_t end, int64_t first, int64_t last, auto f) const {
    const int64_t whole = hw / W * W;
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t entry = i * W, partial = part * padded + entry, at = (row * c + i) * hw;
        const int64_t half = i * hw >= length, half_at = (row - half) * length + i * hw;
        f(Column{hw / W, entry, partial, at, half, half_at}, Full{});
        if (whole < hw) f(Column{1, entry, partial, at + whole, half, half_at + whole}, hw - whole);
      }
    }
  }
  void walk_rows(int64_t part, int64_t begin, int64_t end, auto f) const {
    const int64_t width = c * hw, half_width = length, sums = part * padded, most = block;
    for (int64_t row = begin; row < end; row += most) {
      const int64_t height = std::min(most, end - row);
      for (int64_t half = 0; half * half_width < width; ++half) {
        for (int64_t i = 0; i < half_width; i += W) {
          const int64_t entry = half * half_width + i;
          const Column column{height, entry, sums + entry, row * width + entry, half, row * half_width + i};
          i + W <= half_width ? f(column, Full{}) : f(column, half_width - i);
        }
      }
    }
  }
};

// What a loop down a column needs, in registers. FIRST: LeakyReLU comes first. k: the half of a line.
template <typename T, bool FIRST>
struct Lines {
  const T *x_at, *dy_at;
  int64_t stride, half_stride, ahead;
  Line mean, scale, bias;
  Vec slope;

  C10_ALWAYS_INLINE Line x(int64_t r, auto count) const { return load(x_at + r * stride, count, ahead); }
  C10_ALWAYS_INLINE Line dy(int64_t r, auto count) const { return load(dy_at + r * half_stride, count, ahead); }
  C10_ALWAYS_INLINE Vec distance(int k, Vec x) const { return (FIRST ? leaky(x, x, slope) : x) - mean[k]; }
  C10_ALWAYS_INLINE Vec normal(int k, Vec distance) const { return at::vec::fmadd(distance, scale[k], bias[k]); }
  C10_ALWAYS_INLINE Vec y(int k, Vec x) const {
    const Vec value = normal(k, distance(k, x));
    return FIRST ? value : leaky(value, value, slope);
  }
  C10_ALWAYS_INLINE Vec g(int k, Vec dy, Vec dist) const { return FIRST ? dy : leaky(dy, normal(k, dist), slope); }
};

template <typename T, bool FIRST, class Call, bool BACK = std::is_same_v<Call, Backward>>
struct Pass {
  using Numbers = std::vector<float>;
  const Call& call;
  const Geometry g{call.shape, call.halves[1] != nullptr};
  Numbers mean = Numbers(g.padded), scale = mean, bias = mean, via_mean = mean, via_var = mean;
  Numbers sums = Numbers(g.parts * g.padded), products = sums;
  const Vec slope{float(call.slope)};

  C10_ALWAYS_INLINE Lines<T, FIRST> lines_of(const Column& column) {
    const auto x = static_cast<const T*>(call.x), half = static_cast<const T*>(call.halves[column.half]);
    return {x + column.at, half + column.half_at, g.stride, g.half_stride, g.ahead, load(&mean[column.entry]),
            load(&scale[column.entry]), load(&bias[column.entry]), slope};
  }

  C10_ALWAYS_INLINE void reduce(const Column& column, auto count) {
    const auto lines = lines_of(column);
    Line sum = load(&sums[column.partial]), product = load(&products[column.partial]), dy;
    for (int64_t r = 0; r < column.height; ++r) {
      const Line x = lines.x(r, count);
      if (BACK) dy = lines.dy(r, count);
      for (int k = 0; k < 2; ++k) {
        const Vec distance = lines.distance(k, x[k]), term = BACK ? lines.g(k, dy[k], distance) : distance;
        sum[k] = sum[k] + term;
        product[k] = at::vec::fmadd(term, distance, product[k]);
      }
    }
    store(&sums[column.partial], sum, count);
    store(&products[column.partial], product, count);
  }

  C10_ALWAYS_INLINE void apply(const Forward& f, const Column& column, auto count) {
    const auto lines = lines_of(column);
    T* const to = static_cast<T*>(f.halves[column.half]) + column.half_at;
    for (int64_t r = 0; r < column.height; ++r) {
      const Line x = lines.x(r, count);
      store(to + r * lines.half_stride, Line{lines.y(0, x[0]), lines.y(1, x[1])}, count);
    }
  }

  C10_ALWAYS_INLINE void apply(const Backward& b, const Column& column, auto count) {
    const auto lines = lines_of(column);
    const Line by_mean = load(&via_mean[column.entry]), by_var = load(&via_var[column.entry]);
    T* const to = static_cast<T*>(b.dx) + column.at;
    for (int64_t r = 0; r < column.height; ++r) {
      const Line x = lines.x(r, count);
      Line dx = lines.dy(r, count);
      for (int k = 0; k < 2; ++k) {
        const Vec distance = lines.distance(k, x[k]);
        dx[k] = lines.g(k, dx[k], distance) * lines.scale[k];
        if (b.training) dx[k] = dx[k] - at::vec::fmadd(distance, by_var[k], by_mean[k]);
        if (FIRST) dx[k] = leaky(dx[k], x[k], lines.slope);
      }
      store(to + r * lines.stride, dx, count);
    }
  }

  void set(Numbers& numbers, int64_t i, double value) { std::fill_n(&numbers[i * g.span], g.span, float(value)); }
  double total(const Numbers& sums, int64_t i) {
    double sum = 0;
    for (size_t k = i * g.span; k < sums.size(); k += g.padded) sum = std::accumulate(&sums[k], &sums[k] + g.span, sum);
    return sum;
  }
  void set_norm(int64_t i) {
    set(mean, i, call.mean[i]);
    set(scale, i, call.weight[i] * call.rstd[i]);
    set(bias, i, call.bias[i]);
  }
  void settle(const Forward& f, int64_t i) {
    const double count = g.rows * g.hw, sum = total(sums, i), product = total(products, i);
    const double squares = std::max(product - sum * sum / count, 0.0);  // of distances from the mean
    f.mean[i] = mean[i * g.span] + sum / count;
    f.rstd[i] = 1 / std::sqrt(squares / count + f.eps);
    set_norm(i);
    if (!f.running_mean) return;
    f.running_mean[i] += f.momentum * (f.mean[i] - f.running_mean[i]);
    f.running_var[i] += f.momentum * (squares / (f.biased ? count : count - 1) - f.running_var[i]);
  }
  void settle(const Backward& b, int64_t i) {
    const double sum = total(sums, i), product = total(products, i), rstd = b.rstd[i];
    const double share = scale[i * g.span] / double(g.rows * g.hw);
    b.dbias[i] = sum;
    b.dweight[i] = product * rstd;
    set(via_mean, i, share * sum);
    set(via_var, i, share * product * rstd * rstd);
  }

  // How often there must be so many values for a thread to be worth starting.
  static int64_t grain(int64_t values) { return std::max<int64_t>(1, 16384 / values); }

  // Both passes over channels [first, last). The second begins with the rows that a thread has just left.
  void run_group(int64_t first, int64_t last) {
    const int64_t least = grain(g.chunk * (last - first) * g.hw);
    auto reduced = [&](const Column& column, auto count) C10_ALWAYS_INLINE_ATTRIBUTE { reduce(column, count); };
    auto applied = [&](const Column& column, auto count) C10_ALWAYS_INLINE_ATTRIBUTE { apply(call, column, count); };
    if (BACK || call.training) {
      at::parallel_for(0, g.parts, least, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) g.walk(part, first, last, reduced);
      });
      at::parallel_for(first, last, grain(4 * g.parts), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) settle(call, i);
      });
    }
    at::parallel_for(0, g.parts, least, [&](int64_t begin, int64_t end) {
      for (int64_t part = end - 1; part >= begin; --part) g.walk(part, first, last, applied);
    });
  }

  void run() {
    for (int64_t i = 0; i < g.c; ++i) {
      const float x = static_cast<const T*>(call.x)[i * g.hw];
      if (BACK || !call.training) set_norm(i);
      else if (std::isfinite(x)) set(mean, i, FIRST && x <= 0 ? x * float(call.slope) : x);  // the origin
    }
    if (!g.large) return run_group(0, g.c);
    at::parallel_for(0, g.c, grain(g.rows * g.hw), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i += g.group) run_group(i, std::min(end, i + g.group));
    });
  }
};

}  // namespace

template <class Call>
void run_on_cpu(const Call& call) {
  const bool first = call.activate_first;
  if (call.shape.type == Type::f32) first ? Pass<float, true, Call>{call}.run() : Pass<float, false, Call>{call}.run();
  else first ? Pass<c10::BFloat16, true, Call>{call}.run() : Pass<c10::BFloat16, false, Call>{call}.run();
}
template void run_on_cpu(const Forward&);
template void run_on_cpu(const Backward&);

}  // namespace gan_ops
