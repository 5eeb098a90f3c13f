// Fresh pages are half of the time of a large operation on the CPU: malloc gives a block of this size back to the
// system, which clears its pages anew at the next step. Here a freed block waits for the next tensor of its size, as it
// would on CUDA. What is in use and what waits are never more, together, than what was once in use.
#include "allocate.h"

#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <map>
#include <mutex>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace gan_ops {
namespace {

constexpr size_t PAGE = size_t(2) << 20;  // a huge page: smaller blocks are malloc's, which keeps them by itself

struct Block {
  void* data;
  size_t bytes;
};

class KeptBlocks final : public c10::Allocator {
 public:
  at::DataPtr allocate(size_t bytes) override {
    if (bytes < PAGE) return c10::GetCPUAllocator()->allocate(bytes);
    bytes = (bytes + PAGE - 1) / PAGE * PAGE;
    std::lock_guard<std::mutex> lock(mutex_);
    auto [first, end] = kept_.equal_range(bytes);
    Block* block = nullptr;
    if (first == end) {
      block = obtain(bytes);
    } else {
      auto last = std::prev(end);  // freed last: a cache may still hold it
      block = last->second;
      kept_.erase(last);
      waiting_ -= bytes;
    }
    used_ += bytes;
    most_ = std::max(most_, used_);
    return {block->data, block, &KeptBlocks::release, at::Device(at::kCPU)};
  }

  void copy_data(void* to, const void* from, std::size_t count) const override { default_copy_data(to, from, count); }

  static KeptBlocks& get() {
    static auto* blocks = new KeptBlocks;  // never destroyed: a tensor may outlive everything static
    return *blocks;
  }

 private:
  Block* obtain(size_t bytes) {
    while (!kept_.empty() && used_ + waiting_ + bytes > most_) {
      Block* block = kept_.begin()->second;
      kept_.erase(kept_.begin());
      waiting_ -= block->bytes;
      std::free(block->data);
      delete block;
    }
    void* data = nullptr;
    TORCH_CHECK(posix_memalign(&data, PAGE, bytes) == 0, "gan_ops: no memory for ", bytes, " bytes");
#ifdef MADV_HUGEPAGE
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    return new Block{data, bytes};
  }

  static void release(void* context) {
    auto& self = get();
    auto* block = static_cast<Block*>(context);
    std::lock_guard<std::mutex> lock(self.mutex_);
    self.used_ -= block->bytes;
    self.waiting_ += block->bytes;
    self.kept_.emplace(block->bytes, block);
  }

  std::mutex mutex_;
  std::multimap<size_t, Block*> kept_;
  size_t used_ = 0, waiting_ = 0, most_ = 0;
};

}  // namespace

at::Tensor empty_as(const at::Tensor& x, at::SymIntArrayRef sizes, at::MemoryFormat format) {
  if (!x.is_cpu()) return at::empty_symint(sizes, x.options(), format);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), &KeptBlocks::get(),
                                   c10::DispatchKeySet(c10::DispatchKey::CPU), x.scalar_type(), format);
}

}  // namespace gan_ops
