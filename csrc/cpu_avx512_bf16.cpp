// The CPU kernels for x86 processors with AVX-512 that round to bfloat16 in one instruction; setup.py compiles this
// file alone with the flags for it.
#define CPU_CAPABILITY AVX512_BF16
#define CPU_CAPABILITY_AVX512
#include "cpu_kernels.h"

namespace gan_ops {
void forward_avx512_bf16(const Forward& f) { run(f); }
void backward_avx512_bf16(const Backward& g) { run(g); }
}  // namespace gan_ops
