// What one call of an operation works on: plain numbers and pointers, so that kernels need neither torch nor CUDA.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gan_ops {

enum class Type { f32, bf16, f16 };  // of pictures; parameters and statistics are f32

// A tensor of N,C,... in memory: n rows of c channels of hw neighbouring values each. Contiguous memory has a row for
// each picture; channels_last and two-dimensional memory has one for each position, and hw is 1. No size is 0.
struct Shape {
  int64_t n, c, hw;
  Type type;
};

// y = leaky_relu(batch_norm(x)) or, activate_first, batch_norm(leaky_relu(x)). A seam's x is left + right, rounded to
// its type; a seam that is not to `normalise` has that sum for y.
struct Forward {
  Shape shape;
  bool normalise, training, activate_first;
  bool biased;  // running_var moves towards the biased variance, as Keras has it, not the unbiased one
  double momentum, eps, slope;
  const void* x;      // or the left branch of a seam
  const void* right;  // of a seam, else null
  void* sum;          // of a seam that normalises: left + right, written; else null
  void* out[2];       // two halves of c/2 channels, each dense in x's layout; or all channels, and null
  const void *weight, *bias;         // c of each, or null: 1 and 0
  void *running_mean, *running_var;  // c of each, or null; read in evaluation, moved by `momentum` in training
  void *mean, *rstd;                 // c of each, written: what x was normalised with, 1/sqrt(variance + eps)
};

// dx, dweight, dbias from the gradient of y, or of its two halves, where y is normalised.
struct Backward {
  Shape shape;
  bool training, activate_first;
  double slope;
  const void* grad[2];  // as `out` above
  const void* x;        // or the sum of a seam
  const void *weight, *bias;  // or null
  const void *mean, *rstd;
  void *dx, *dweight, *dbias;  // dweight, dbias: c of each, or null where not wanted
};

void run_on_cpu(const Forward&);
void run_on_cpu(const Backward&);

// On the current device and the cudaStream_t `stream`, with workspace_bytes of its memory; the result is a cudaError_t.
size_t workspace_bytes(const Shape&);
int run_on_cuda(const Forward&, void* workspace, void* stream);
int run_on_cuda(const Backward&, void* workspace, void* stream);

}  // namespace gan_ops
