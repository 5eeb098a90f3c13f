// Picks the CPU kernels for the instruction set that ATen found (or that ATEN_CPU_CAPABILITY names).
#include <ATen/Version.h>

#include "params.h"

namespace gan_ops {

void forward_default(const Forward&);
void backward_default(const Backward&);
#ifdef GAN_OPS_INSTRUCTION_SETS
void forward_avx2(const Forward&);
void backward_avx2(const Backward&);
void forward_avx512(const Forward&);
void backward_avx512(const Backward&);
void forward_avx512_bf16(const Forward&);
void backward_avx512_bf16(const Backward&);
#endif

namespace {

struct Kernels {
  void (*forward)(const Forward&);
  void (*backward)(const Backward&);
};

const Kernels& kernels() {
  static const Kernels chosen = [] {
#ifdef GAN_OPS_INSTRUCTION_SETS
    auto set = at::get_cpu_capability();
    if (set == "AVX512" && __builtin_cpu_supports("avx512bf16")) {
      return Kernels{forward_avx512_bf16, backward_avx512_bf16};
    }
    if (set == "AVX512") return Kernels{forward_avx512, backward_avx512};
    if (set == "AVX2") return Kernels{forward_avx2, backward_avx2};
#endif
    return Kernels{forward_default, backward_default};
  }();
  return chosen;
}

}  // namespace

void forward_cpu(const Forward& f) { kernels().forward(f); }
void backward_cpu(const Backward& g) { kernels().backward(g); }

}  // namespace gan_ops
