// Writes new tokens' keys or values into the cache, converting them to its dtype.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace coconut_fast {

struct KvAppend {
  const void* from;  // (T, heads, dim), strides in values: token, head, 1
  Dtype from_dtype;
  int64_t token, head;
  void* to;  // (S, heads, dim), contiguous
  Dtype to_dtype;
  int64_t heads, dim;
};

// to[slots[i]] = from[i] for i in [first, last); a negative slot skips its token
void kv_append(const KvAppend& copy, const int64_t* slots, int64_t first, int64_t last);

}  // namespace coconut_fast
