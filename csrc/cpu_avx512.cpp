// The CPU kernels for x86 processors with AVX-512; setup.py compiles this file alone with the flags for it.
#define CPU_CAPABILITY AVX512
#define CPU_CAPABILITY_AVX512
#include "cpu_kernels.h"

namespace gan_ops {
void forward_avx512(const Forward& f) { run(f); }
void backward_avx512(const Backward& g) { run(g); }
}  // namespace gan_ops
