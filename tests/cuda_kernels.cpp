// Runs the CUDA kernels on a CPU, through tests/cuda_stand_in.h and with the plan's own geometry, and compares them
// with the naive ones. Tensors are pieces of heap of just their size, for AddressSanitizer.
//   cuda_kernels [k]: every k-th case. A line for each case that fails; exit status 1 if one did.
//   cuda_kernels plans: how tensors are laid over an H200.
#include "cuda_stand_in.h"

#include <cstdio>
#include <memory>
#include <random>
#include <set>
#include <string>

#include "cuda_kernels.h"

using namespace gan_ops;

namespace {

// The naive way back, as naive_forward in cuda_kernels.h; mean and rstd are given, and decide the sign in float.
template <typename T>
void naive_backward(Backward b) {
  const int64_t c = blockIdx.x, half = b.shape.c / (b.halves[1] ? 2 : 1);
  const double count = b.shape.n * b.shape.hw;
  if (c >= b.shape.c) return;
  const float mean = b.mean[c], rstd = b.rstd[c], scale = b.weight[c] * rstd;
  double sum = 0, product = 0;
  for (int pass = 0; pass < 2; ++pass) {  // sums, dx
    for (int64_t i = 0; i < count; ++i) {
      const float x = widen(static_cast<const T*>(b.x)[place(b.shape, i, c, b.shape.c)]);
      const float apart = (b.activate_first ? leaky(x, x, b.slope) : x) - mean;
      double g = widen(static_cast<const T*>(b.halves[c / half])[place(b.shape, i, c % half, half)]);
      if (!b.activate_first && !(affine(apart, scale, b.bias[c]) > 0)) g *= b.slope;
      if (pass == 0) sum += g, product += g * apart;
      if (b.training) g -= sum / count + apart * (product / count * rstd * rstd);
      if (b.activate_first && !(x > 0)) g *= b.slope;
      if (pass == 1) narrow(float(g * scale), static_cast<T*>(b.dx)[place(b.shape, i, c, b.shape.c)]);
    }
  }
  b.dweight[c] = product * rstd, b.dbias[c] = sum;
}

struct Free {
  void operator()(void* p) const { std::free(p); }
};

// Numbers of one type on the heap, read and written as double. `off`: begins one element after an aligned address.
class Tensor {
 public:
  int64_t count;

  Tensor(Type type, int64_t count, bool off = false)
      : count(count), type_(type), off_(off), memory_(std::malloc((count + off) * size())) {
    std::memset(memory_.get(), 0xff, (count + off) * size());
  }

  void* data() const { return static_cast<char*>(memory_.get()) + off_ * size(); }

  double get(int64_t i) const {
    if (type_ == Type::f32) return static_cast<float*>(data())[i];
    const uint16_t bits = static_cast<uint16_t*>(data())[i];
    return type_ == Type::bf16 ? __bfloat162float({bits}) : __half2float({bits});
  }

  void set(int64_t i, double v) {
    if (type_ == Type::f32) narrow(float(v), static_cast<float*>(data())[i]);
    if (type_ == Type::bf16) narrow(float(v), static_cast<__nv_bfloat16*>(data())[i]);
    if (type_ == Type::f16) narrow(float(v), static_cast<__half*>(data())[i]);
  }

  bool same_bits(const Tensor& other) const { return std::memcmp(data(), other.data(), count * size()) == 0; }

 private:
  size_t size() const { return type_ == Type::f32 ? 4 : 2; }

  Type type_;
  bool off_;
  std::unique_ptr<void, Free> memory_;
};

struct Case {
  Type type;
  bool rows, split, activate_first, training;
  int64_t n, c, hw;
  bool running, biased, off, odd_values;  // odd: a NaN and an infinity
  double mean;
  int threads, processors;

  Shape shape() const { return rows ? Shape{n * hw, c, 1, type} : Shape{n, c, hw, type}; }

  std::string name() const {
    static const char* const types[] = {"f32", "bf16", "f16"};
    std::string s = types[static_cast<int>(type)];
    const auto add = [&s](bool given, const char* word) { if (given) s += std::string(" ") + word; };
    s += (rows ? " rows " : " planar ") + std::to_string(n) + "x" + std::to_string(c) + "x" + std::to_string(hw);
    add(split, "split"), add(activate_first, "activate_first"), add(training, "training");
    add(running, "running"), add(off, "off"), add(biased, "biased"), add(odd_values, "odd values");
    return s + " mean " + std::to_string(mean) + " threads " + std::to_string(threads);
  }
};

std::set<void*> kernels_run;

// What run() launches with: the stand-in.
struct Launch {
  int processors, threads;
  bool in_reverse;
  std::unique_ptr<void, Free> workspace{};

  void* allocate(int64_t bytes) {
    workspace.reset(std::malloc(bytes));
    return std::memset(workspace.get(), 0xff, bytes);
  }

  void clear(void* memory, size_t bytes) { std::memset(memory, 0, bytes); }

  template <class... Given>
  void operator()(void (*kernel)(Given...), int blocks, int block, Given... given) {
    kernels_run.insert(reinterpret_cast<void*>(kernel));
    stand_in::launch(blocks, block, in_reverse, [&] { kernel(given...); });
  }
};

enum { kOut0, kOut1, kMean, kRstd, kRunningMean, kRunningVar, kDx, kDweight, kDbias, kTensors };
const char* const kNames[] = {"out", "out", "mean", "rstd", "running_mean", "running_var", "dx", "dweight",
                              "dbias"};

// One case: what goes in, and what comes out.
class Run {
 public:
  explicit Run(const Case& c) : c_(c), s_(c.shape()), engine_(12345) {
    const int64_t size = s_.n * s_.c * s_.hw, half = size / (c.split ? 2 : 1);
    x_ = std::make_unique<Tensor>(random(c.type, size, c.mean, 1));
    if (c.odd_values) x_->set(0, NAN), x_->set(size - 1, -INFINITY);
    for (int h = 0; h < 2; ++h) grad_.push_back(random(c.type, half, 0.5, 1));
    for (double mean : {1.0, 0.0, c.mean}) parameters_.push_back(random(Type::f32, c.c, mean, 0.3));
    parameters_.push_back(random(Type::f32, c.c, 2, 0.1));
  }

  // What went wrong, or nothing.
  std::string check() {
    const auto got = results(0), again = results(1), want = results(2, &got);
    std::string wrong;
    for (int i = 0; i < kTensors; ++i) {
      if (!got[i].same_bits(again[i])) return std::string("two runs differ in ") + kNames[i];
      for (int64_t j = 0; j < want[i].count && wrong.empty(); ++j) {
        const double a = got[i].get(j), b = want[i].get(j), room = tolerance(i, j, b, want);
        const bool statistic = i == kMean || i == kRstd || i == kRunningMean || i == kRunningVar;
        if (a == b || (std::isnan(a) && std::isnan(b)) || std::fabs(a - b) <= room) continue;
        if (statistic && !std::isfinite(a) && !std::isfinite(b)) continue;  // an infinite value's mean may be NaN
        char text[200];
        std::snprintf(text, sizeof text, "%s[%d] is %.9g, not %.9g (tolerance %.2g)", kNames[i], int(j), a, b, room);
        wrong = text;
      }
    }
    return wrong;
  }

 private:
  Tensor random(Type type, int64_t count, double mean, double deviation) {
    Tensor t(type, count, c_.off && count != c_.c);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) t.set(i, mean + deviation * normal(engine_));
    return t;
  }

  // way: 0 the kernels, 1 the same with the last block first, 2 the naive ones; backward from `given` mean and rstd.
  std::vector<Tensor> results(int way, const std::vector<Tensor>* given = nullptr) const {
    const int64_t size = s_.n * s_.c * s_.hw, half = size / (c_.split ? 2 : 1);
    std::vector<Tensor> o;
    for (int64_t count : {half, c_.split ? half : 0}) o.emplace_back(c_.type, count, c_.off && count);
    for (int i = kMean; i < kTensors; ++i) {
      o.emplace_back(i == kDx ? c_.type : Type::f32, i == kDx ? size : s_.c, c_.off && i == kDx);
    }
    const auto numbers = [](const Tensor& t) { return static_cast<float*>(t.data()); };
    for (int64_t i = 0; i < s_.c; ++i) {
      o[kRunningMean].set(i, parameters_[2].get(i)), o[kRunningVar].set(i, parameters_[3].get(i));
      if (!c_.training) o[kMean].set(i, parameters_[2].get(i)), o[kRstd].set(i, 1 / std::sqrt(parameters_[3].get(i)));
    }
    Forward f{s_, c_.training, c_.activate_first, c_.biased, 0.1, 1e-5, 0.2, x_->data(),
              {o[kOut0].data(), c_.split ? o[kOut1].data() : nullptr}, numbers(parameters_[0]), numbers(parameters_[1]),
              numbers(o[kMean]), numbers(o[kRstd]), nullptr, nullptr};
    if (c_.running && c_.training) f.running_mean = numbers(o[kRunningMean]), f.running_var = numbers(o[kRunningVar]);
    call(f, way);
    const auto& statistics = given ? *given : o;
    Backward b{s_, c_.training, c_.activate_first, 0.2, x_->data(),
               {grad_[0].data(), c_.split ? grad_[1].data() : nullptr}, f.weight, f.bias, numbers(statistics[kMean]),
               numbers(statistics[kRstd]), o[kDx].data(), numbers(o[kDweight]), numbers(o[kDbias])};
    call(b, way);
    return o;
  }

  template <class Work>
  void call(const Work& work, int way) const {
    Launch launch{c_.processors, c_.threads, way == 1};
    if (way < 2) return run(work, launch);
    for (blockIdx.x = 0, blockDim.x = 1; blockIdx.x < s_.c; ++blockIdx.x) {
      threadIdx.x = 0;
      if (c_.type == Type::f32) naive<float>(work);
      if (c_.type == Type::bf16) naive<__nv_bfloat16>(work);
      if (c_.type == Type::f16) naive<__half>(work);
    }
  }
  template <typename T>
  static void naive(const Forward& f) { naive_forward<T>(f); }
  template <typename T>
  static void naive(const Backward& b) { naive_backward<T>(b); }

  // How far number j of tensor i may be from what the naive kernel has for it.
  double tolerance(int i, int64_t j, double want, const std::vector<Tensor>& all) const {
    const double unit = 0x1p-24;
    const int64_t channels = i == kOut0 || i == kOut1 ? s_.c / (c_.split ? 2 : 1) : s_.c;
    const bool values = i == kOut0 || i == kOut1 || i == kDx;
    const int64_t c = (values ? j / s_.hw % channels : j) + (i == kOut1 ? channels : 0);
    const double mean = std::fabs(all[kMean].get(c)), rstd = all[kRstd].get(c), own = std::fabs(want);
    const double count = s_.n * s_.hw, weight = std::fabs(parameters_[0].get(c));
    const double room = 32 * unit * (mean + 1 / rstd), loss = 64 * unit + room * rstd, far = 6 + mean * rstd * 32 * unit;
    const double coarse = c_.type == Type::bf16 ? 0x1p-8 : c_.type == Type::f16 ? 0x1p-11 : unit;
    switch (i) {
      case kMean: return room;
      case kRstd: return loss * rstd;
      case kRunningMean: return room + 4 * unit * own;
      case kRunningVar: return loss * (own + 1 / (rstd * rstd));
      case kDbias: return 64 * unit * 4 * count;
      case kDweight: return 64 * unit * 4 * far * count;
      case kDx: return 2 * coarse * own + 512 * unit * weight * rstd * far;
      default: return 2 * coarse * own + (loss + 32 * unit) * (1 + weight) * (far + mean * rstd);
    }
  }

  Case c_;
  Shape s_;
  std::mt19937 engine_;
  std::unique_ptr<Tensor> x_;
  std::vector<Tensor> grad_, parameters_;  // weight, bias, running mean and variance
};

// All combinations of what changes the code that runs, each with a few sizes and the rest by turns.
std::vector<Case> cases() {
  std::vector<Case> all;
  const int64_t channels[] = {1, 2, 3, 7, 8, 64, 130, 16, 48, 32}, planes[] = {1, 49, 16, 64};
  int turn = 0;
  for (Type type : {Type::f32, Type::bf16, Type::f16}) {
    for (int bits = 0; bits < 16; ++bits) {
      for (int more = 0; more < 9; ++more) {
        Case c{};
        c.type = type;
        c.rows = bits & 1, c.split = bits & 2, c.training = bits & 4, c.activate_first = bits & 8;
        ++turn;
        c.c = channels[(turn + bits / 8) % 10] + (c.split && channels[(turn + bits / 8) % 10] % 2);
        c.hw = planes[turn / 3 % 4];
        c.n = c.c > 32 ? 9 : 2 + turn * 7 % 30;
        c.running = turn % 7 > 1, c.biased = turn % 4 == 0, c.off = turn % 13 == 0;
        c.mean = turn % 9 == 0 && type == Type::f32 ? 1000 : 0.2;
        c.odd_values = turn % 17 == 0;
        c.threads = turn % 4 ? 16 : 32, c.processors = 1 + turn % 5;
        all.push_back(c);
      }
    }
  }
  return all;
}

// Of tensors that are too large to run here, on a device like an H200: what their plan must keep to.
int unsound_plans() {
  int unsound = 0;
  for (Type type : {Type::f32, Type::bf16}) {
    for (int64_t n : {1, 5, 64, 1000, 1 << 20}) {
      for (int64_t c : {1, 2, 3, 8, 48, 64, 130, 512, 4096}) {
        for (int64_t hw : {1, 9, 64, 196, 1 << 10, 1 << 14, 1 << 24}) {
          for (int vector : {1, vector_of({n, c, hw, type}, false, {})}) {
            if (n * c * hw > int64_t{1} << 33) continue;
            const Geometry g = plan({n, c, hw, type}, vector, 132, kThreads);
            const int64_t spans = c / (hw == 1 ? vector : 1), chunks = g.parts / g.pieces;
            bool sound = g.groups * int64_t{g.width / g.span} >= spans && g.pieces * int64_t{g.span} >= g.plane;
            sound &= chunks * g.chunk >= n && (chunks - 1) * g.chunk < n && g.width * g.ranks <= kThreads;
            sound &= g.row * vector == c * hw && g.width % g.span == 0 && g.ranks > 0 && g.padded >= c;
            sound &= g.chunk == 1 || g.chunk * g.row < int64_t{1} << 31;
            sound &= int64_t{g.groups} * g.parts < int64_t{1} << 31 && g.chunk > 0;
            // four loads in flight where there are as many rows for each thread
            sound &= g.chunk >= std::min<int64_t>(n, g.ranks * kUnroll) || g.chunk * g.row > int64_t{1} << 29;
            unsound += !sound;
            if (!sound) std::printf("plan of %dx%dx%d by %d is unsound\n", int(n), int(c), int(hw), vector);
          }
        }
      }
    }
  }
  return unsound;
}

// For a reader: how tensors of batch 64 are laid over an H200.
void print_plans() {
  std::printf("type  layout        shape           blocks  threads  waves  rows of a thread\n");
  for (Type type : {Type::f32, Type::bf16}) {
    for (bool rows : {true, false}) {
      for (int64_t h : {4, 8, 16, 32, 64}) {
        const int64_t c = 4096 / h, hw = h * h;
        const Shape s = rows ? Shape{64 * hw, c, 1, type} : Shape{64, c, hw, type};
        const Geometry g = plan(s, vector_of(s, false, {}), 132, kThreads);
        std::printf("%-5s %-13s 64x%4dx%2dx%-4d %8d %8d %6.2f %6.1f\n", type == Type::f32 ? "fp32" : "bf16",
                    rows ? "channels_last" : "contiguous", int(c), int(h), int(h), g.blocks(), g.width * g.ranks,
                    g.blocks() / (132.0 * kResident), double(g.chunk) / g.ranks);
      }
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1 && argv[1] == std::string("plans")) return print_plans(), 0;
  const int step = argc > 1 ? std::atoi(argv[1]) : 1;
  const std::vector<Case> all = cases();
  int ran = 0, failed = unsound_plans();
  for (size_t i = 0; i < all.size(); i += step, ++ran) {
    const std::string wrong = Run(all[i]).check();
    if (wrong.empty()) continue;
    ++failed;
    std::printf("%d %s: %s\n", int(i), all[i].name().c_str(), wrong.c_str());
  }
  std::printf("%d of %d cases failed; %d kernels ran\n", failed, ran, int(kernels_run.size()));
  return failed ? 1 : 0;
}
