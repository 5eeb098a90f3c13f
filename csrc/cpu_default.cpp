// The CPU kernels for any processor.
#define CPU_CAPABILITY DEFAULT
#define CPU_CAPABILITY_DEFAULT
#include "cpu_kernels.h"

namespace gan_ops {
void forward_default(const Forward& f) { run(f); }
void backward_default(const Backward& g) { run(g); }
}  // namespace gan_ops
