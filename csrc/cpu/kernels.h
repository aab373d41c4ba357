// The table of kernels the native chain runs on: one per instruction set, chosen once when a chain is made.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/linear.h"

namespace coconut_fast {

enum class Activation : int { gelu_tanh, gelu, silu, relu };

struct Norm {
  const float* weight = nullptr;
  const float* bias = nullptr;  // LayerNorm only, or null
  bool centred = false;         // LayerNorm; else RMSNorm
  float eps = 0;
};

// Where a linear layer's input row is written: row m of an Input, with mutable pointers.
struct InputRow {
  InputKind kind;
  char* data;
  size_t low;        // split16: bytes from the high digits to the low ones
  float* scales;     // split16, per segment
  int32_t* offsets;  // split16, per segment
};

// One layer's attention, for tokens whose keys and values are (or are being) written to the cache.
struct DecodeAttention {
  const float* qkv;  // [token][stride]: q heads, k heads, v heads, before rotation
  size_t qkv_stride;
  float* out;  // [token][out_stride]
  size_t out_stride;
  const float *cos, *sin;  // [token][head_dim / 2], or null without rotary embedding
  const float *q_norm, *k_norm;  // (head_dim,) or null
  float eps;
  void *keys, *values;  // (slots, kv_heads, head_dim)
  Dtype dtype;          // f32 or bf16
  const int32_t* page_table;
  int64_t pages_per_row, page_size;
  int heads, kv_heads, head_dim, window;
  float scaling;
  float* scratch;  // of this thread: attend_scratch()
};
inline size_t attend_scratch(int heads, int head_dim) { return size_t(heads) * (2 * (head_dim + 16) + 24) + 64; }

struct Kernels {
  Isa isa;
  InputKind input[3];     // by Format
  LinearKernel linear[3]; // by Format
  // out = norm(x), n values
  void (*norm)(const Norm& norm, const float* x, int n, float* out);
  // Writes an input row of k values; beyond them it is already zero
  void (*prepare)(const float* x, int k, const InputRow& to);
  // Epilogues: `sums` are rows of `width` outputs. bias has `width` values or is null.
  void (*finish_store)(const float* sums, int rows, int width, const float* bias, float* out, size_t stride);
  void (*finish_add)(const float* sums, int rows, int width, const float* bias, float* out, size_t stride);
  // out[i] = act(sums[i]), or, if gated, act(sums[i]) * sums[width / 2 + i] for i < width / 2,
  // in rows of fp32 or bf16, `stride` values apart.
  void (*finish_activate)(const float* sums, int rows, int width, const float* bias, Activation activation, bool gated,
                          bool bf16, void* out, size_t stride);
  // cos and sin of position * inv_freq, times scaling
  void (*rotary)(int position, const float* inv_freq, int half, float scaling, float* cos, float* sin);
  // Writes key and value head `head` of `token` to its slot: normed, rotated, converted.
  void (*write)(const DecodeAttention& attend, int token, int head, int row, int position);
  // Query head `head` of `token`: normed and rotated, not scaled.
  void (*query)(const DecodeAttention& attend, int token, int head, float* out);
  // Attention of the query heads that share the kv heads [first_head, last_head)
  void (*attend)(const DecodeAttention& attend, int token, int first_head, int last_head, int row, int position);
  // See sampling.h and sampling_kernel.h
  void (*pick)(const float* logits, int first_id, int count, struct Picked& picked);
  void (*tally)(float inverse, float* logits, int count, struct Tally& tally);
  void (*collect)(const float* logits, int first_id, int count, struct Candidates& candidates);
};

// By instruction set; null where this build has none.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();

const Kernels& kernels_for(Isa isa);

}  // namespace coconut_fast
