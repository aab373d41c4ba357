// The persistent kernel's input: its instructions, the weights of each layer, and the arguments of a launch. Plain
// data, shared by the kernel, the binding and the tests.
#pragma once

#include <cstdint>
#include <cstring>

namespace coconut_fast {

// The order is OPCODES' in coconut_fast/infer/persistent.py.
enum Opcode : int32_t { kFeed, kQkv, kAttend, kOut, kUp, kDown };

constexpr int kSplit = 256;    // positions of one partial sum of attention
constexpr int kMaxRows = 4;    // of a batch
constexpr int kThreads = 512;  // of a block, one block an SM: 128 registers each

// One block's share of one phase; FIELDS in persistent.py. reads and writes are for tests/persistent_vm.py alone.
struct Instruction {
  int32_t opcode, layer, first, last, reads, writes, wait, arrive;
};

// Matrices (out, in), rows back to back, and vectors, all in the storage type; null where the model has none.
struct Layer {
  const void *norm1, *norm1_bias, *qkv, *qkv_bias, *q_norm, *k_norm, *o, *o_bias;
  const void *norm2, *norm2_bias, *up, *up_bias, *down, *down_bias;  // up: gate rows, then up rows, where it is gated
  void *keys, *values;                                               // (slots, kv heads, head dim), storage type
  float scaling;                                                     // of the scores
  int32_t window;                                                    // positions a query sees, 0 for all
};
static_assert(sizeof(Instruction) == 32 && sizeof(Layer) == 136, "persistent.py lays both out by hand");

// X(type, name): the single list of arguments, from which the struct and its setters by name are made.
#define COCONUT_FAST_POINTERS(X)                                                                        \
  X(const Instruction, program)  /* (blocks, phases) */                                                 \
  X(const Layer, layers)                                                                                \
  X(const void, embedding)       /* of positions, (max_positions, D) storage type, or null */           \
  X(const void, final_norm)      /* (D,) storage type */                                                \
  X(const void, final_norm_bias) /* the same, or null */                                                \
  X(const float, cos)            /* (positions, K / 2) of the rotary embedding, or null */              \
  X(const float, sin)                                                                                   \
  X(const int32_t, page_table)   /* (R, pages_per_row) */                                               \
  X(const int32_t, rows)         /* (B,): row of the page table */                                      \
  X(int64_t, positions)          /* (B,): of the last token in the cache; advanced after the last pass */ \
  X(int32_t, lengths)            /* (B,): tokens in the cache; advanced likewise */                      \
  X(int32_t, remaining)          /* (B,): passes to go; counted down likewise */                        \
  X(float, hidden)               /* (B, D): the state that is fed back, after the final norm */          \
  X(float, x)                    /* (B, D): the residual stream. Scratch, as all below */               \
  X(float, qkv)                  /* (B, (H + 2 Hkv) K) */                                               \
  X(float, partial)              /* (B, H, splits, K): sums of exp(score - top) value */                \
  X(float, stats)                /* (B, H, splits, 2): top, sum of exp(score - top) */                  \
  X(float, mid)                  /* (B, inner) */                                                       \
  X(uint32_t, counter)           /* arrivals at barriers; zeroed by the launch */
#define COCONUT_FAST_NUMBERS(X)                                                                         \
  X(int32_t, phases)             /* instructions of a block in one pass */                              \
  X(int32_t, passes)             /* thoughts; a row with fewer `remaining` stops there */               \
  X(int32_t, begin)              /* instructions [begin, end) of passes * phases + 1 are run: all of */ \
  X(int32_t, end)                /* them, or one phase to inspect */                                     \
  X(int32_t, bf16)               /* storage type: 1 bf16, 0 fp32 */                                     \
  X(int32_t, depth)              /* layers */                                                           \
  X(int32_t, batch) X(int32_t, dim) X(int32_t, heads) X(int32_t, kv_heads) X(int32_t, head_dim)         \
  X(int32_t, inner)                                                                                     \
  X(int32_t, layer_norm)         /* 1 LayerNorm, 0 RMSNorm */                                           \
  X(int32_t, gated)              /* 1 silu(gate) * up, 0 gelu (tanh) */                                 \
  X(int32_t, page_size) X(int32_t, pages_per_row) X(int32_t, splits) X(int32_t, ways)                   \
  X(float, eps)                                                                                         \
  X(float, rescale)              /* feedback: the norm a state is scaled to; 0: as it is */

struct Arguments {
#define COCONUT_FAST_POINTER(type, name) type* name;
#define COCONUT_FAST_NUMBER(type, name) type name;
  COCONUT_FAST_POINTERS(COCONUT_FAST_POINTER)
  COCONUT_FAST_NUMBERS(COCONUT_FAST_NUMBER)
#undef COCONUT_FAST_POINTER
#undef COCONUT_FAST_NUMBER
};

// False where there is no such argument.
inline bool set_pointer(Arguments& a, const char* name, void* value) {
#define COCONUT_FAST_POINTER(type, field) \
  if (!std::strcmp(name, #field)) return a.field = static_cast<type*>(value), true;
  COCONUT_FAST_POINTERS(COCONUT_FAST_POINTER)
#undef COCONUT_FAST_POINTER
  return false;
}

inline bool set_number(Arguments& a, const char* name, double value) {
#define COCONUT_FAST_NUMBER(type, field) \
  if (!std::strcmp(name, #field)) return a.field = static_cast<type>(value), true;
  COCONUT_FAST_NUMBERS(COCONUT_FAST_NUMBER)
#undef COCONUT_FAST_NUMBER
  return false;
}

}  // namespace coconut_fast

// Runs instructions [begin, end) on `stream`, `blocks` blocks of `threads` threads, all resident. Returns null, or one
// sentence saying why it could not be launched.
extern "C" const char* coconut_fast_persistent(const coconut_fast::Arguments* arguments, int blocks, int threads,
                                               void* stream);
