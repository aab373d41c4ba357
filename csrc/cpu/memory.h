// Zeroed, 64-byte aligned memory that lives as long as its owner; large blocks ask for huge pages (fewer TLB misses
// while weights stream).
#pragma once

#include <cstddef>
#include <memory>

namespace coconut_fast {

struct Unmap {
  size_t bytes = 0;
  void operator()(void* p) const;
};

template <typename T>
using Memory = std::unique_ptr<T[], Unmap>;

// Throws std::bad_alloc.
void* map_zeroed(size_t bytes);

template <typename T>
Memory<T> make_memory(size_t count) {
  const size_t bytes = count * sizeof(T) + 64;
  return Memory<T>(static_cast<T*>(map_zeroed(bytes)), Unmap{bytes});
}

// Bytes per second that `threads` threads read together from `bytes` of memory; the best of `repeats` passes.
double read_bandwidth(int threads, size_t bytes, int repeats);

}  // namespace coconut_fast
