#include "cpu/kv_append.h"

#include <cstring>

namespace coconut_fast {

namespace {

// Converts through fp32, as PyTorch does; only f64 to f64 would keep more, and that is a plain copy.
float read(const char* from, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f32: return reinterpret_cast<const float*>(from)[i];
    case Dtype::bf16: return bf16_to_f32(reinterpret_cast<const uint16_t*>(from)[i]);
    case Dtype::f16: return f16_to_f32(reinterpret_cast<const uint16_t*>(from)[i]);
    case Dtype::f64: return static_cast<float>(reinterpret_cast<const double*>(from)[i]);
  }
  return 0;
}

void write(char* to, Dtype dtype, int64_t i, float x) {
  switch (dtype) {
    case Dtype::f32: reinterpret_cast<float*>(to)[i] = x; break;
    case Dtype::bf16: reinterpret_cast<uint16_t*>(to)[i] = f32_to_bf16(x); break;
    case Dtype::f16: reinterpret_cast<uint16_t*>(to)[i] = f32_to_f16(x); break;
    case Dtype::f64: reinterpret_cast<double*>(to)[i] = x; break;
  }
}

}  // namespace

void kv_append(const KvAppend& copy, const int64_t* slots, int64_t first, int64_t last) {
  const auto& [from, from_dtype, token, head, to, to_dtype, heads, dim] = copy;
  const bool together = head == dim;  // all heads of a token in one run
  const int64_t runs = together ? 1 : heads, width = together ? heads * dim : dim;
  for (int64_t i = first; i < last; ++i) {
    if (slots[i] < 0) continue;
    for (int64_t h = 0; h < runs; ++h) {
      const char* source = static_cast<const char*>(from) + (i * token + h * head) * size_of(from_dtype);
      char* target = static_cast<char*>(to) + (slots[i] * heads + h) * dim * size_of(to_dtype);
      if (from_dtype == to_dtype) {
        std::memcpy(target, source, width * size_of(to_dtype));
      } else {
        for (int64_t d = 0; d < width; ++d) write(target, to_dtype, d, read(source, from_dtype, d));
      }
    }
  }
}

}  // namespace coconut_fast
