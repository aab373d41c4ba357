// Ragged attention over the paged cache on CPU, forward and backward; kernels/reference.py says what is computed.
//
// A row's results depend on that row alone: neither the number of threads nor the other rows of the call change a bit.
#pragma once

#include <cstdint>
#include <functional>

#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace coconut_fast {

// Contiguous tensors, shapes as in kernels/reference.py; keys and values have one dtype; f64 goes with f64 only.
struct Attention {
  const void* query;                      // (T, heads, key_dim) of query_dtype
  const void *keys, *values;              // (S, kv_heads, key_dim), (S, kv_heads, value_dim) of cache_dtype
  const int32_t* page_table;              // (R, pages_per_row)
  const int32_t *rows, *offsets, *lengths;  // (batch,), (batch + 1,), (batch,)
  Dtype query_dtype, cache_dtype;
  int64_t batch, heads, kv_heads, key_dim, value_dim, pages_per_row, page_size, window;
  double scaling, softcap, dropout;
  uint64_t seed;
};

// `run` runs a function once on each of `workers` <= `threads` threads, at the same time or one after the other.
struct Parallel {
  int64_t threads;
  std::function<void(int64_t workers, const std::function<void()>& work)> run;
};

// out (T, heads, value_dim) of query_dtype, lse (T, heads) fp32 (fp64 for f64); every element is written.
void attention_forward(const Attention& attention, void* out, void* lse, const Parallel& parallel);

// Attention of one kv head of row b of the call (f32 query), by tiles of queries and keys, for a caller that has its
// own threads. `out` may be `query`. A query's result does not depend, to the bit, on the row's other queries in the
// call. Where the cache is bf16 and the CPU multiplies bf16 pairs, queries are rounded to bf16 too.
void attend_prompt(const Attention& attention, Isa isa, int64_t b, int64_t kv_head, void* out, void* lse);

// Allocates what attend_prompt() needs on this thread for heads of this size; false where there is not enough memory.
bool reserve_prompt(int64_t head_dim) noexcept;

struct AttentionGrads {
  const void *grad_out, *out;    // (T, heads, value_dim) of query_dtype
  const void* lse;               // (T, heads)
  void* grad_query;              // (T, heads, key_dim) of query_dtype; every element is written
  void *grad_keys, *grad_values;  // as keys and values, fp32 (fp64 for f64); added to
  const int32_t* grads_from;      // (batch,) or null: grad_keys and grad_values of positions before it are left alone

  int64_t from(int64_t b) const { return grads_from ? grads_from[b] : 0; }
};

// Rows of the call must not share pages.
void attention_backward(const Attention& attention, const AttentionGrads& grads, const Parallel& parallel);

}  // namespace coconut_fast
