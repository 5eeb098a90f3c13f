// The CPU kernels for x86 processors with AVX2; setup.py compiles this file alone with the flags for it.
#define CPU_CAPABILITY AVX2
#define CPU_CAPABILITY_AVX2
#include "cpu_kernels.h"

namespace gan_ops {
void forward_avx2(const Forward& f) { run(f); }
void backward_avx2(const Backward& g) { run(g); }
}  // namespace gan_ops
