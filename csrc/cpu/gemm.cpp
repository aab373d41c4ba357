#include "cpu/gemm.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"

#if COCONUT_FAST_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#define KERNEL_LEVEL 3
namespace coconut_fast::avx512_bf16 {
#include "cpu/gemm_kernel.h"

#include "cpu/gemm_few_kernel.h"
}
#pragma GCC pop_options

namespace coconut_fast {

bool gemm_runs() { return best_isa() >= Isa::avx512_bf16 && !__builtin_cpu_supports("amx-bf16"); }

void pack_panel(const Matrix& w, int64_t k, int64_t n, int64_t panel, Dtype dtype, char* packed) {
  if (dtype == Dtype::bf16) avx512_bf16::pack_columns<Dtype::bf16>(w, k, n, panel, packed);
  else avx512_bf16::pack_columns<Dtype::f32>(w, k, n, panel, packed);
}

void multiply(const Product& p, int64_t task) {
  const int64_t panels = panels_of(p.n), first = p.first_row(task / panels), last = p.first_row(task / panels + 1);
  if (p.dtype == Dtype::bf16) avx512_bf16::multiply_block<Dtype::bf16>(p, first, last, task % panels);
  else avx512_bf16::multiply_block<Dtype::f32>(p, first, last, task % panels);
}

void multiply(const Few& f, int64_t first, int64_t last) {
  avx512_bf16::multiply_few(f, first, last);
}

void gather(const Gradient& g, int64_t task) {
  if (g.dtype == Dtype::bf16) avx512_bf16::gather_strips<Dtype::bf16>(g, task);
  else avx512_bf16::gather_strips<Dtype::f32>(g, task);
}

void add(const Gradient& g, int64_t task, char* panel) {
  if (g.dtype == Dtype::bf16) avx512_bf16::add_panel<Dtype::bf16>(g, task, panel);
  else avx512_bf16::add_panel<Dtype::f32>(g, task, panel);
}

}  // namespace coconut_fast
#else
namespace coconut_fast {

bool gemm_runs() { return false; }
void pack_panel(const Matrix&, int64_t, int64_t, int64_t, Dtype, char*) {}
void multiply(const Product&, int64_t) {}
void multiply(const Few&, int64_t, int64_t) {}
void gather(const Gradient&, int64_t) {}
void add(const Gradient&, int64_t, char*) {}

}  // namespace coconut_fast
#endif
