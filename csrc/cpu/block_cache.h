// Reuses large blocks of memory instead of returning them to the system, for training steps on the CPU.
//
// malloc either returns a large freed block to the system, and the next one consists of fresh pages that the kernel
// must clear (a seventh of an fp32 step of GPT-2), or keeps it, and then aligned requests do not fit into the holes
// left by others of their size (0.65 GB of holes beside 3.55 GB in use). Here a freed block waits for a request of its
// size or up to an eighth less. Blocks in use and waiting together exceed the peak in use by at most an eighth and
// 64 MiB: before a new block is mapped, waiting ones are unmapped, the longest waiting first.
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

  // A block of at least `bytes`, page-aligned, with arbitrary content; nullptr if the system has none even after all
  // waiting blocks were unmapped.
  void* take(size_t bytes);

  // Takes back a block from take(); for any other address, returns false and does nothing.
  bool give(void* block);

  // Whether freed blocks wait for reuse; if not, the waiting ones are unmapped too.
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
