#include "cpu/block_cache.h"

#include <algorithm>

#include <sys/mman.h>

namespace coconut_fast {

namespace {

constexpr size_t kRounded = size_t(64) << 10;  // sizes are multiples of it
constexpr size_t kSlack = size_t(64) << 20;

void* map(size_t bytes) {
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return at == MAP_FAILED ? nullptr : at;
}

}  // namespace

BlockCache::~BlockCache() {
  while (!waiting_.empty()) unmap_oldest();
}

void* BlockCache::take(size_t bytes) {
  bytes = (bytes + kRounded - 1) / kRounded * kRounded;
  const std::lock_guard lock(mutex_);
  void* at = nullptr;
  const auto found = by_size_.lower_bound(bytes);
  if (found != by_size_.end() && found->first <= bytes + bytes / 8) {
    at = found->second->at;
    bytes = found->first;
    sizes_.waiting -= bytes;
    waiting_.erase(found->second);
    by_size_.erase(found);
  } else {
    const size_t peak = std::max(sizes_.peak, sizes_.in_use + bytes), limit = peak + peak / 8 + kSlack;
    while (!waiting_.empty() && sizes_.in_use + bytes + sizes_.waiting > limit) unmap_oldest();
    while (!(at = map(bytes)) && !waiting_.empty()) unmap_oldest();
    if (!at) return nullptr;
  }
  in_use_.emplace(at, bytes);
  sizes_.in_use += bytes;
  sizes_.peak = std::max(sizes_.peak, sizes_.in_use);
  return at;
}

bool BlockCache::give(void* block) {
  const std::lock_guard lock(mutex_);
  const auto found = in_use_.find(block);
  if (found == in_use_.end()) return false;
  const size_t bytes = found->second;
  in_use_.erase(found);
  sizes_.in_use -= bytes;
  sizes_.waiting += bytes;
  by_size_.emplace(bytes, waiting_.insert(waiting_.end(), {block, bytes}));
  if (!keeps_) unmap_oldest();
  return true;
}

void BlockCache::keep(bool on) {
  const std::lock_guard lock(mutex_);
  keeps_ = on;
  while (!on && !waiting_.empty()) unmap_oldest();
}

BlockCache::Sizes BlockCache::sizes() const {
  const std::lock_guard lock(mutex_);
  return sizes_;
}

void BlockCache::unmap_oldest() {
  const Block oldest = waiting_.front();
  const auto [first, last] = by_size_.equal_range(oldest.bytes);
  by_size_.erase(std::find_if(first, last, [&](const auto& entry) { return entry.second == waiting_.begin(); }));
  waiting_.pop_front();
  sizes_.waiting -= oldest.bytes;
  munmap(oldest.at, oldest.bytes);
}

}  // namespace coconut_fast
