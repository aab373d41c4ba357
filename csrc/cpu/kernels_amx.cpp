// The chain's kernels for Isa::amx: those of Isa::avx512_bf16, except that products of batches run on tiles.
#include <cmath>
#include <utility>

#include "cpu/kernels.h"

#if COCONUT_FAST_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,amx-tile,amx-bf16,amx-int8")
#define KERNEL_LEVEL 4
namespace coconut_fast::amx {
// The order matters: linear_amx.h uses what vec.h defines.
#include "cpu/vec.h"
#include "cpu/linear_amx.h"

constexpr int kFewest = 8;  // rows from which tiles are used; vectors take less than half a tile

template <Format format>
static void linear_chunk(const Linear& linear, int chunk, const Input& input, int rows, float* out, size_t out_stride,
                         WeightPrefetch& prefetch, KVPrefetch& kv) {
  if (rows >= kFewest) linear_tiles<format>(linear, chunk, input, rows, out, out_stride, prefetch, kv);
  else
    avx512_bf16_kernels()->linear[int(format)](linear, chunk, input, rows, out, out_stride, prefetch, kv);
}

static Kernels make_table() {
  Kernels table = *avx512_bf16_kernels();
  table.isa = Isa::amx;
  table.linear[int(Format::bf16)] = linear_chunk<Format::bf16>;
  table.linear[int(Format::int8)] = linear_chunk<Format::int8>;
  return table;
}
}  // namespace coconut_fast::amx
#pragma GCC pop_options

const coconut_fast::Kernels* coconut_fast::amx_kernels() {
  static const Kernels table = amx::make_table();
  return &table;
}
#else
const coconut_fast::Kernels* coconut_fast::amx_kernels() { return nullptr; }
#endif
