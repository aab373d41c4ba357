// Makes cpu/block_cache.h the source of PyTorch's large CPU tensors.

#include <c10/core/CPUAllocator.h>

#include "bindings.h"
#include "cpu/block_cache.h"

using coconut_fast::BlockCache;

namespace {

constexpr size_t kLarge = size_t(1) << 20;  // bytes; smaller tensors come from malloc

// Never destroyed: tensors that outlive the interpreter still return their memory to it.
BlockCache& blocks() {
  static auto* cache = new BlockCache;
  return *cache;
}

struct KeepingAllocator final : c10::Allocator {
  c10::Allocator* small = c10::GetCPUAllocator();

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLarge) return small->allocate(bytes);
    void* block = blocks().take(bytes);
    if (!block) return small->allocate(bytes);  // raises PyTorch's own error
    return {block, block, &free, at::Device(at::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  static void free(void* block);
};

KeepingAllocator& allocator() {
  static auto* keeping = new KeepingAllocator;
  return *keeping;
}

void KeepingAllocator::free(void* block) {
  if (!blocks().give(block)) allocator().small->raw_deallocate(block);
}

}  // namespace

void bind_memory(py::module_& m) {
  m.def(
      "keep_freed_memory",
      [](bool keep) {
        blocks().keep(keep);
        c10::SetCPUAllocator(&allocator());
      },
      py::arg("keep") = true,
      "From now on PyTorch's CPU tensors of a MiB or more come from a BlockCache (csrc/cpu/block_cache.h); keep=False: "
      "what waits there, and what comes back later, goes to the system.");
  m.def(
      "kept_memory",
      [] {
        const auto sizes = blocks().sizes();
        return py::make_tuple(sizes.in_use, sizes.waiting, sizes.peak);
      },
      "Bytes of the BlockCache that are in use, those waiting for the next use, and the most that were ever in use.");
}
