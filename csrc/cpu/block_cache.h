// Large blocks of memory that are used again instead of going back to the system, for a training step on the CPU.
//
// malloc either returns a large freed block to the system, and the next one comes as fresh pages that the kernel must
// clear (a seventh of an fp32 step of GPT-2), or keeps it, and aligned requests do not fit into the holes that those of
// their size left (0.65 GB of them beside 3.55 GB in use). Here a freed block waits for a request of its size or up to
// an eighth less. In use and waiting together are at most an eighth and 64 MiB more than were ever in use: before a new
// block is mapped, waiting ones go, the longest waiting first.
#pragma once

#include <cstddef>
#include <list>
#include <map>
#include <mutex>
#include <unordered_map>

namespace coconut_fast {

class BlockCache {
 public:
  BlockCache() = default;
  BlockCache(const BlockCache&) = delete;
  BlockCache& operator=(const BlockCache&) = delete;
  ~BlockCache();

  // A block of at least `bytes`, page-aligned, with any content; nullptr where the system has none, even with all
  // waiting blocks given back.
  void* take(size_t bytes);

  // Takes back what take() gave; false, and nothing done, for any other address.
  bool give(void* block);

  // Whether blocks wait when they come back; those that wait go where not.
  void keep(bool on);

  struct Sizes {
    size_t in_use, waiting, peak;  // peak: of in_use
  };
  Sizes sizes() const;

 private:
  struct Block {
    void* at;
    size_t bytes;
  };
  using Waiting = std::list<Block>;  // the longest waiting first

  void unmap_oldest();

  mutable std::mutex mutex_;
  std::unordered_map<void*, size_t> in_use_;
  Waiting waiting_;
  std::multimap<size_t, Waiting::iterator> by_size_;
  Sizes sizes_{};
  bool keeps_ = true;
};

}  // namespace coconut_fast
