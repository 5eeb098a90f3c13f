// Memory for outputs on the CPU that is kept when it is freed.
#pragma once
#include <ATen/core/Tensor.h>

namespace gan_ops {

// An uninitialised tensor like x (its type, sizes and device) in the given format.
at::Tensor empty_as(const at::Tensor& x, at::SymIntArrayRef sizes, at::MemoryFormat format);

}  // namespace gan_ops
