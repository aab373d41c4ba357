// Shared by the kernels of all instruction sets: a row of a call, the task (the unit of parallel work), scratch memory,
// and the random words of dropout.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "cpu/attention.h"

namespace coconut_fast {

// A lane is one query of one head of a kv group: lane = query * group + head within the group.
constexpr int64_t kGroupLanes = 32;   // lanes whose scores against one block of keys are in L1 together
constexpr int64_t kChunkLanes = 384;  // lanes of a tile task, which share packed keys and values; 128: 6% slower
constexpr int64_t kBlockKeys = 64;    // keys of a block
constexpr int64_t kFewLanes = 8;      // up to this many, a row is memory-bound and dot products beat tiles

struct Task {
  int64_t b;                      // index into the call's rows
  int64_t first_head, last_head;  // kv heads [first, last)
  int64_t first_lane, last_lane;  // lanes [first, last) of each of these kv heads
  bool tiles;                     // by tiles of lanes and keys, else by dot products
};

// A row of the call and the cache positions its queries see.
struct Row {
  const int32_t* pages;
  int64_t page_size, first_token, queries, length, group, window;

  Row(const Attention& a, int64_t b)
      : pages(a.page_table + static_cast<int64_t>(a.rows[b]) * a.pages_per_row),
        page_size(a.page_size),
        first_token(a.offsets[b]),
        queries(a.offsets[b + 1] - a.offsets[b]),
        length(a.lengths[b]),
        group(a.heads / a.kv_heads),
        window(a.window) {}

  int64_t lanes() const { return queries * group; }
  int64_t position(int64_t lane) const { return length - queries + lane / group; }
  int64_t first_lane(int64_t position) const { return (position - (length - queries)) * group; }
  int64_t slot(int64_t position) const { return pages[position / page_size] * page_size + position % page_size; }
  int64_t first_seen(int64_t lane) const {
    return window && position(lane) >= window ? position(lane) - window + 1 : 0;
  }
  // Index of the lane's (query, head) pair in (T, heads).
  int64_t pair(int64_t lane, int64_t kv_head, int64_t heads) const {
    return (first_token + lane / group) * heads + kv_head * group + lane % group;
  }
};

// Memory that a thread keeps between calls, cut into 64-byte aligned pieces.
class Scratch {
 public:
  // Starts over with `bytes` of capacity (each piece is rounded up to 64 bytes: allow for it).
  void reset(int64_t bytes) {
    if (bytes > capacity_) {
      capacity_ = 0;  // in case the allocation fails
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)));
      if (!memory_) throw std::bad_alloc();
      capacity_ = bytes;
    }
    used_ = 0;
  }

  template <typename T>
  T* take(int64_t count) {
    char* piece = memory_.get() + used_;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return reinterpret_cast<T*>(piece);
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t capacity_ = 0, used_ = 0;
};

inline Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

// What the forward of attention_tiles.h takes for `lanes` lanes, a multiple of kGroupLanes.
inline int64_t tiles_bytes(int64_t key_dim, int64_t value_dim, int64_t lanes) {
  const int64_t Kp = (key_dim + 15) / 16 * 16, Vp = (value_dim + 15) / 16 * 16;
  return (kBlockKeys * (Kp + 2 * Vp + kGroupLanes) + lanes * (Kp + Vp + 2) + kGroupLanes * (Kp + 1)) * 4 + 10 * 64;
}

inline uint32_t mix(uint32_t x) {
  x = (x ^ x >> 16) * 0x7feb352du;
  x = (x ^ x >> 15) * 0x846ca68bu;
  return x ^ x >> 16;
}

// dropout_keep of kernels/reference.py: a query's word, to be mixed with (key position * kPositionStep).
constexpr uint32_t kPositionStep = 0x9e3779b9u;

inline uint32_t dropout_word(uint64_t seed, int64_t slot, int64_t head) {
  const uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
  return mix(mix(mix(low) ^ high ^ static_cast<uint32_t>(slot)) ^ static_cast<uint32_t>(head));
}

inline uint32_t dropout_threshold(double dropout) { return static_cast<uint32_t>(dropout * (1 << 24)); }

}  // namespace coconut_fast
