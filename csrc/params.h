// What one call of an operation works on: plain numbers and pointers, so that kernels need neither torch nor CUDA.
#pragma once
#include <cstdint>
#include <functional>

namespace gan_ops {

enum class Type { f32, bf16, f16 };  // of pictures; parameters and statistics are f32

// A tensor of N,C,... in memory: n rows of c channels of hw neighbouring values each. Contiguous memory has a row for
// each picture; channels_last and two-dimensional memory has one for each position, and hw is 1. No size is 0.
struct Shape {
  int64_t n, c, hw;
  Type type;
};

// y = leaky_relu(batch_norm(x)) or, activate_first, batch_norm(leaky_relu(x)). All float* are c numbers.
struct Forward {
  Shape shape;
  bool training, activate_first;
  bool biased;  // running_var moves towards the biased variance, as Keras has it, not the unbiased one
  double momentum, eps, slope;
  const void* x;
  void* halves[2];  // of y: c/2 channels each, dense in x's layout; or all of y, and null
  const float *weight, *bias;
  float *mean, *rstd;                 // what x is normalised with, 1/deviation: written in training, else read
  float *running_mean, *running_var;  // moved by `momentum` in training; or null
};

// dx, dweight and dbias from the gradient of y.
struct Backward {
  Shape shape;
  bool training, activate_first;
  double slope;
  const void* x;
  const void* halves[2];  // of the gradient, as above
  const float *weight, *bias, *mean, *rstd;
  void* dx;
  float *dweight, *dbias;
};

template <class Call>  // Forward or Backward
void run_on_cpu(const Call&);

// On the current device and the cudaStream_t `stream`, with memory that `allocate` gives; the result is a cudaError_t.
template <class Call>
int run_on_cuda(const Call&, const std::function<void*(size_t)>& allocate, void* stream);

}  // namespace gan_ops
