// Runs the CUDA kernels on a CPU, through tests/cuda_stand_in.h and with the plan's own geometry, and compares them
// with plain loops in double precision. Tensors are pieces of heap of just their size, for AddressSanitizer.
//   cuda_kernels [k]: every k-th case. A line for each case that fails; exit status 1 if one did.
#include "cuda_stand_in.h"

#include <algorithm>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <set>
#include <string>

#include "cuda_kernels.h"
#include "cuda_plan.h"

using namespace gan_ops;

namespace {

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Numbers of one type on the heap, read and written as double. `off`: begins one element after an aligned address.
class Tensor {
 public:
  Tensor(Type type, int64_t count, bool off = false)
      : type_(type), off_(off), count(count), memory_(std::malloc((count + off) * size_of(type))) {
    std::memset(memory_.get(), 0xff, (count + off) * size_of(type));
  }

  void* data() const { return static_cast<char*>(memory_.get()) + off_ * size_of(type_); }

  double get(int64_t i) const {
    switch (type_) {
      case Type::f64: return at<double>(i);
      case Type::f32: return at<float>(i);
      case Type::bf16: return __bfloat162float(at<__nv_bfloat16>(i));
      default: return __half2float(at<__half>(i));
    }
  }

  void set(int64_t i, double v) {
    switch (type_) {
      case Type::f64: at<double>(i) = v; break;
      case Type::f32: at<float>(i) = static_cast<float>(v); break;
      case Type::bf16: at<__nv_bfloat16>(i) = __float2bfloat16_rn(static_cast<float>(v)); break;
      default: at<__half>(i) = __float2half_rn(static_cast<float>(v)); break;
    }
  }

  void fill(const std::function<double()>& next) {
    for (int64_t i = 0; i < count; ++i) set(i, next());
  }

  bool same_bits(const Tensor& other) const {
    return std::memcmp(data(), other.data(), count * size_of(type_)) == 0;
  }

  Tensor copy() const {
    Tensor twin(type_, count, off_);
    std::memcpy(twin.data(), data(), count * size_of(type_));
    return twin;
  }

 private:
  template <typename T>
  T& at(int64_t i) const {
    return static_cast<T*>(data())[i];
  }

  Type type_;
  bool off_;

 public:
  int64_t count;

 private:
  std::unique_ptr<void, Free> memory_;
};

enum class Seam { none, normalised, plain };

struct Case {
  Type type;
  bool rows, split, activate_first, training;
  Seam seam;
  int64_t n, c, hw;
  bool whole;  // a strip may lie in shared memory
  bool weight, bias, running, parameter_gradients, biased, off;
  double mean, deviation;
  bool odd_values;  // a NaN and an infinity
  int threads;
  bool again;  // a second run gives the same bits

  Shape shape() const { return rows ? Shape{n * hw, c, 1, true, type} : Shape{n, c, hw, false, type}; }
  Device device() const { return {16, whole ? 200 * 1024 : 0, threads}; }
  Type statistic() const { return type == Type::f64 ? Type::f64 : Type::f32; }
  int64_t halves() const { return split ? 2 : 1; }

  std::string name() const {
    static const char* const types[] = {"f64", "f32", "bf16", "f16"};
    std::string s = types[static_cast<int>(type)];
    const auto add = [&s](bool given, const char* word) { if (given) s += std::string(" ") + word; };
    s += rows ? " rows" : " planar";
    s += " " + std::to_string(n) + "x" + std::to_string(c) + "x" + std::to_string(hw);
    add(split, "split"), add(activate_first, "activate_first"), add(training, "training");
    add(seam == Seam::normalised, "seam"), add(seam == Seam::plain, "sum only"), add(whole, "whole");
    add(weight, "weight"), add(bias, "bias"), add(running, "running"), add(parameter_gradients, "dweight,dbias");
    add(biased, "biased"), add(off, "off"), add(odd_values, "odd values");
    return s + " mean " + std::to_string(mean) + " threads " + std::to_string(threads);
  }
};

std::set<void*> kernels_run;

template <class Work>
void run(const Work& work, const Device& device, bool in_reverse) {
  const Shape& s = work.shape;
  const size_t bytes = workspace_bytes_of(s, device);
  const std::unique_ptr<void, Free> workspace(std::malloc(bytes));
  std::memset(workspace.get(), 0xff, bytes);
  const Launches<Work> launches = plan(work, device);
  for (int i = 0; i < launches.count; ++i) {
    const auto& l = launches.at[i];
    const Geometry& g = l.geometry;
    const Kernel<Work> kernel = kernel_for(l.step, l.work, g.vector);
    kernels_run.insert(reinterpret_cast<void*>(kernel));
    stand_in::launch({unsigned(g.strips), unsigned(g.chunks)}, {unsigned(g.width), unsigned(g.ranks)},
                     l.shared_bytes, in_reverse, [&] { kernel(l.work, g, workspace.get()); });
  }
}

constexpr double kMomentum = 0.1, kEps = 1e-5, kSlope = 0.2;

// One case: what goes in, and what comes out.
class Run {
 public:
  explicit Run(const Case& c) : c_(c), shape_(c.shape()) {
    std::mt19937 engine(12345);
    std::normal_distribution<double> normal;
    const auto make = [&](double mean, double deviation) {
      Tensor t(c.type, size(), c.off);
      t.fill([&] { return mean + deviation * normal(engine); });
      return t;
    };
    x_ = std::make_unique<Tensor>(make(c.mean, c.deviation));
    right_ = std::make_unique<Tensor>(make(0, c.deviation));
    if (c.odd_values) {
      x_->set(0, std::numeric_limits<double>::quiet_NaN());
      x_->set(size() - 1, -std::numeric_limits<double>::infinity());
    }
    for (int h = 0; h < c.halves(); ++h) {
      grad_.emplace_back(c.type, size() / c.halves(), c.off);
      grad_[h].fill([&] { return 0.5 + normal(engine); });
    }
    const auto parameters = [&](double mean, double deviation) {
      Tensor t(c.statistic(), c.c);
      t.fill([&] { return mean + deviation * normal(engine); });
      return t;
    };
    weight_ = std::make_unique<Tensor>(parameters(1, 0.3));
    bias_ = std::make_unique<Tensor>(parameters(0, 0.3));
    running_mean_ = std::make_unique<Tensor>(parameters(c.mean, 0.3));
    running_var_ = std::make_unique<Tensor>(c.statistic(), c.c);
    running_var_->fill([&] { return std::exp(0.3 * normal(engine)); });
  }

  // What went wrong, or nothing.
  std::string check() {
    const std::vector<Tensor> got = outputs(false);
    if (c_.again) {
      const std::vector<Tensor> again = outputs(true);
      for (size_t i = 0; i < got.size(); ++i) {
        if (!got[i].same_bits(again[i])) return "two runs differ in tensor " + std::to_string(i);
      }
    }
    wrong_.clear();
    for (int64_t c = 0; c < c_.c && wrong_.empty(); ++c) check_channel(c, got);
    return wrong_;
  }

 private:
  enum { kOut0, kOut1, kSum, kMean, kRstd, kRunningMean, kRunningVar, kDx, kDweight, kDbias };

  int64_t size() const { return shape_.n * shape_.c * shape_.hw; }
  bool normalise() const { return c_.seam != Seam::plain; }

  // Of value i of a channel: in a tensor, and in the tensor that has the channel's half.
  int64_t place(int64_t channel, int64_t i, int64_t channels) const {
    const int64_t image = i / shape_.hw, inner = i % shape_.hw;
    return (image * channels + channel) * shape_.hw + inner;
  }
  int64_t whole(int64_t channel, int64_t i) const { return place(channel, i, c_.c); }
  int64_t half(int64_t channel, int64_t i) const {
    const int64_t channels = c_.c / c_.halves();
    return place(channel % channels, i, channels);
  }

  // Of forward and backward; the blocks' order is to make no difference.
  std::vector<Tensor> outputs(bool in_reverse) const {
    std::vector<Tensor> o;
    const int64_t part = size() / c_.halves();
    o.emplace_back(c_.type, part, c_.off);
    o.emplace_back(c_.type, c_.split ? part : 0, c_.off);
    o.emplace_back(c_.type, size(), c_.off);
    o.emplace_back(c_.statistic(), c_.c);
    o.emplace_back(c_.statistic(), c_.c);
    o.push_back(running_mean_->copy());
    o.push_back(running_var_->copy());
    o.emplace_back(c_.type, size(), c_.off);
    o.emplace_back(c_.statistic(), c_.c);
    o.emplace_back(c_.statistic(), c_.c);
    const auto data = [&](int i) { return o[i].data(); };

    Forward f{};
    f.shape = shape_;
    f.normalise = normalise();
    f.training = c_.training;
    f.activate_first = c_.activate_first;
    f.biased = c_.biased;
    f.momentum = kMomentum, f.eps = kEps, f.slope = kSlope;
    f.x = x_->data();
    f.right = c_.seam == Seam::none ? nullptr : right_->data();
    f.sum = c_.seam == Seam::normalised ? data(kSum) : nullptr;
    f.out[0] = data(kOut0);
    f.out[1] = c_.split ? data(kOut1) : nullptr;
    if (normalise()) {
      f.weight = c_.weight ? weight_->data() : nullptr;
      f.bias = c_.bias ? bias_->data() : nullptr;
      f.running_mean = c_.running ? data(kRunningMean) : nullptr;
      f.running_var = c_.running ? data(kRunningVar) : nullptr;
      f.mean = data(kMean);
      f.rstd = data(kRstd);
    }
    run(f, c_.device(), in_reverse);
    if (!normalise()) return o;

    Backward b{};
    b.shape = shape_;
    b.training = c_.training;
    b.activate_first = c_.activate_first;
    b.slope = kSlope;
    b.grad[0] = grad_[0].data();
    b.grad[1] = c_.split ? grad_[1].data() : nullptr;
    b.x = c_.seam == Seam::normalised ? f.sum : f.x;
    b.weight = f.weight;
    b.bias = f.bias;
    b.mean = f.mean;
    b.rstd = f.rstd;
    b.dx = data(kDx);
    b.dweight = c_.parameter_gradients ? data(kDweight) : nullptr;
    b.dbias = c_.parameter_gradients ? data(kDbias) : nullptr;
    run(b, c_.device(), in_reverse);
    return o;
  }

  // A NaN for a NaN, an infinity for itself, else within `tolerance`.
  void compare(const char* what, int64_t channel, int64_t i, double got, double want, double tolerance) {
    if (!wrong_.empty() || got == want || (std::isnan(got) && std::isnan(want))) return;
    if (std::isfinite(got) && std::isfinite(want) && std::fabs(got - want) <= tolerance) return;
    char text[200];
    std::snprintf(text, sizeof text, "%s[%d][%d] is %.9g, not %.9g (tolerance %.2g)", what, int(channel), int(i), got,
                  want, tolerance);
    wrong_ = text;
  }

  void compare_statistic(const char* what, int64_t channel, double got, double want, double tolerance) {
    if (!std::isfinite(want) && !std::isfinite(got)) return;  // an infinite value's mean may be NaN
    compare(what, channel, 0, got, want, tolerance);
  }

  double rounded(double v) const {
    Tensor one(c_.type, 1);
    one.set(0, v);
    return one.get(0);
  }

  static double leaky_of(double v) { return v > 0 ? v : v * kSlope; }

  void check_channel(int64_t channel, const std::vector<Tensor>& got) {
    const int64_t count = shape_.n * shape_.hw;
    const double unit = c_.type == Type::f64 ? 0x1p-53 : 0x1p-24;
    const double coarse = c_.type == Type::bf16 ? 0x1p-8 : c_.type == Type::f16 ? 0x1p-11 : unit;
    const auto& out = got[channel < c_.c / c_.halves() ? kOut0 : kOut1];
    const auto& grad = grad_[channel < c_.c / c_.halves() ? 0 : 1];
    std::vector<double> x(count), a(count);
    for (int64_t i = 0; i < count; ++i) {
      x[i] = x_->get(whole(channel, i));
      if (c_.seam != Seam::none) {
        const double r = right_->get(whole(channel, i));
        x[i] = rounded(c_.type == Type::f64 ? x[i] + r : static_cast<float>(x[i]) + static_cast<float>(r));
      }
      if (c_.seam == Seam::normalised) compare("sum", channel, i, got[kSum].get(whole(channel, i)), x[i], 0);
      if (!normalise()) compare("out", channel, i, out.get(half(channel, i)), x[i], 0);
      a[i] = c_.activate_first ? leaky_of(x[i]) : x[i];
    }
    if (!normalise()) return;

    double mean = 0, variance = 0;
    for (double v : a) mean += v / count;
    for (double v : a) variance += (v - mean) * (v - mean) / count;
    const double old_mean = running_mean_->get(channel), old_variance = running_var_->get(channel);
    const double used = c_.training ? mean : c_.running ? old_mean : 0;
    const double rstd = 1 / std::sqrt((c_.training ? variance : c_.running ? old_variance : 1) + kEps);
    const double room = 32 * unit * (std::fabs(used) + (c_.training ? std::sqrt(variance) : 0));  // of the mean
    compare_statistic("mean", channel, got[kMean].get(channel), used, room);
    // Means of parts are rounded too, and what they are off by enters the variance.
    const double loss = 64 * unit + room * rstd;
    compare_statistic("rstd", channel, got[kRstd].get(channel), rstd, loss * rstd);
    double moved_mean = old_mean, moved_variance = old_variance;
    if (c_.training && c_.running) {
      moved_mean += kMomentum * (mean - old_mean);
      moved_variance += kMomentum * (variance * (c_.biased ? 1 : count / (count - 1.)) - old_variance);
    }
    compare_statistic("running_mean", channel, got[kRunningMean].get(channel), moved_mean,
                      room + 4 * unit * std::fabs(moved_mean));
    compare_statistic("running_var", channel, got[kRunningVar].get(channel), moved_variance,
                      loss * (moved_variance + (c_.training ? variance : 0)));

    const double w = c_.weight ? weight_->get(channel) : 1, b = c_.bias ? bias_->get(channel) : 0;
    for (int64_t i = 0; i < count; ++i) {
      double y = (a[i] - used) * rstd * w + b;
      if (!c_.activate_first) y = leaky_of(y);
      const double size = 1 + std::fabs(b) + std::fabs(w) * rstd * (std::fabs(used) + std::fabs(a[i] - used));
      compare("out", channel, i, out.get(half(channel, i)), y, coarse * std::fabs(y) + (loss + 32 * unit) * size);
    }

    // The gradient's sign of the normalised value is to be that of the mean and rstd it was given.
    const double m = got[kMean].get(channel), r = got[kRstd].get(channel);
    std::vector<double> g(count);
    double sum = 0, product = 0, sum_size = 0, product_size = 0, largest = 0;
    for (int64_t i = 0; i < count; ++i) {
      g[i] = grad.get(half(channel, i));
      if (!c_.activate_first && !((a[i] - m) * r * w + b > 0)) g[i] *= kSlope;
      sum += g[i], sum_size += std::fabs(g[i]);
      product += g[i] * (a[i] - m), product_size += std::fabs(g[i] * (a[i] - m));
      largest = std::max(largest, std::fabs(g[i]));
    }
    if (c_.parameter_gradients) {
      compare("dbias", channel, 0, got[kDbias].get(channel), sum, 32 * unit * sum_size);
      compare("dweight", channel, 0, got[kDweight].get(channel), product * r, 32 * unit * product_size * r);
    }
    for (int64_t i = 0; i < count; ++i) {
      double dx = g[i], size = largest;
      if (c_.training) {
        dx -= sum / count + (a[i] - m) * r * r * product / count;
        size += sum_size / count + std::fabs(a[i] - m) * r * r * product_size / count;
      }
      dx *= w * r;
      if (c_.activate_first && !(x[i] > 0)) dx *= kSlope;
      compare("dx", channel, i, got[kDx].get(whole(channel, i)), dx,
              coarse * std::fabs(dx) + 32 * unit * std::fabs(w) * r * size);
    }
  }

  Case c_;
  Shape shape_;
  std::unique_ptr<Tensor> x_, right_, weight_, bias_, running_mean_, running_var_;
  std::vector<Tensor> grad_;
  std::string wrong_;
};

// All combinations of what changes the code that runs, each with a few sizes and the rest by turns.
std::vector<Case> cases() {
  std::vector<Case> all;
  const int64_t channels[] = {1, 2, 3, 7, 8, 64, 130, 16, 4, 32}, planes[] = {1, 49, 16};
  int turn = 0;
  for (Type type : {Type::f32, Type::bf16, Type::f16, Type::f64}) {
    for (Seam seam : {Seam::none, Seam::normalised, Seam::plain}) {
      for (int bits = 0; bits < 16; ++bits) {
        if (seam == Seam::plain && (bits & 12)) continue;
        for (int more = 0; more < 3; ++more) {
          Case c{};
          c.type = type, c.seam = seam;
          c.rows = bits & 1, c.split = bits & 2, c.activate_first = bits & 4, c.training = bits & 8;
          ++turn;
          c.c = channels[turn % 10];
          if (c.split && c.c % 2) c.c += 1;
          c.hw = planes[turn / 3 % 3];
          c.n = c.c > 32 ? 9 : 1 + turn * 7 % 30;
          if (!c.training && turn % 11 == 0) c.n = c.hw = 1;
          if (c.training && c.n * c.hw == 1) c.n = 2;
          c.whole = turn % 2;
          c.weight = turn % 3 > 0, c.bias = turn % 5 > 0, c.running = turn % 7 > 1, c.biased = turn % 4 == 0;
          c.parameter_gradients = turn % 6 > 1;
          c.off = turn % 13 == 0;
          c.mean = turn % 9 == 0 ? 1000 : 0.2, c.deviation = 1;
          c.odd_values = turn % 17 == 0;
          c.threads = turn % 4 ? 16 : 32;
          c.again = turn % 3 == 0;
          all.push_back(c);
        }
      }
    }
  }
  // Several chunks and rounds of combination, with larger blocks and many values of each channel.
  for (Type type : {Type::f32, Type::bf16}) {
    for (bool rows : {false, true}) {
      for (bool whole : {false, true}) {
        Case c{type, rows, true, false, true, Seam::none, 40, 16, 64, whole, true, true, true, true, false, false,
               1000, 1, false, 128, true};
        all.push_back(c);
      }
    }
  }
  return all;
}

// Of launches that are too large to run here, on a device like an H200: what they must keep to.
template <class Work>
bool plan_is_sound(const Work& work) {
  const Device device{132, 227 * 1024};
  const Shape& s = work.shape;
  const Launches<Work> launches = plan(work, device);
  bool sound = launches.count > 0;
  for (int i = 0; i < launches.count; ++i) {
    const Geometry& g = launches.at[i].geometry;
    sound &= g.strips * g.width >= g.columns && (g.strips - 1) * g.width < g.columns && g.strips < int64_t{1} << 31;
    sound &= g.chunks * g.chunk_size >= g.positions && (g.chunks - 1) * g.chunk_size < g.positions && g.chunks < 65536;
    sound &= g.ranks > 0 && g.width * g.ranks <= kThreads;
    sound &= g.columns * g.positions * g.vector == s.n * s.c * s.hw;
    sound &= launches.at[i].shared_bytes <= (launches.at[i].step == Step::whole ? device.shared_bytes : 48 * 1024);
    if (launches.at[i].step == Step::reduce) {
      sound &= g.chunks * s.c * 2 * statistic_size(s.type) <= workspace_bytes_of(s, device);
    }
  }
  return sound;
}

int unsound_plans() {
  int unsound = 0;
  for (Type type : {Type::f64, Type::f32, Type::bf16, Type::f16}) {
    for (int64_t n : {1, 5, 64, 1000, 1 << 20}) {
      for (int64_t c : {1, 2, 3, 8, 48, 64, 130, 512, 4096}) {
        for (int64_t hw : {1, 9, 64, 1 << 10, 1 << 14}) {
          for (int bits = 0; bits < 4; ++bits) {
            const bool split = bits & 1 && c % 2 == 0;
            alignas(16) char memory[16];
            Forward f{};
            f.shape = bits & 2 ? Shape{n * hw, c, 1, true, type} : Shape{n, c, hw, false, type};
            f.normalise = f.training = true;
            f.out[1] = split ? memory : nullptr;
            Backward b{};
            b.shape = f.shape;
            b.training = true;
            b.grad[1] = f.out[1];
            unsound += !plan_is_sound(f) + !plan_is_sound(b);
          }
        }
      }
    }
  }
  return unsound;
}

}  // namespace

int main(int argc, char** argv) {
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::vector<Case> all = cases();
  int ran = 0, failed = unsound_plans();
  if (failed) std::printf("%d plans are unsound\n", failed);
  for (size_t i = 0; i < all.size(); i += step, ++ran) {
    const std::string wrong = Run(all[i]).check();
    if (wrong.empty()) continue;
    ++failed;
    std::printf("%d %s: %s\n", int(i), all[i].name().c_str(), wrong.c_str());
  }
  std::printf("%d of %d cases failed; %d kernels ran\n", failed, ran, int(kernels_run.size()));
  return failed ? 1 : 0;
}
