// The chain's kernels for Isa::avx512_bf16.
#include <cmath>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/sampling.h"

#if COCONUT_FAST_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni")
#define KERNEL_LEVEL 3
namespace coconut_fast::avx512_bf16 {
#include "cpu/kernels_body.h"
}
#pragma GCC pop_options

const coconut_fast::Kernels* coconut_fast::avx512_bf16_kernels() { return &avx512_bf16::kTable; }
#else
const coconut_fast::Kernels* coconut_fast::avx512_bf16_kernels() { return nullptr; }
#endif
