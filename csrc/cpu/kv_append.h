// Writes new tokens' keys or values into the cache, converting them to its dtype.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace coconut_fast {

// to[slots[i]] = from[i] for i in [first, last), rows of `width` values.
void kv_append(const void* from, Dtype from_dtype, void* to, Dtype to_dtype, const int64_t* slots, int64_t width,
               int64_t first, int64_t last);

}  // namespace coconut_fast
