// The chain's kernels for Isa::avx512.
#include <cmath>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/sampling.h"

#if COCONUT_FAST_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl")
#define KERNEL_LEVEL 2
namespace coconut_fast::avx512 {
#include "cpu/kernels_body.h"
}
#pragma GCC pop_options

const coconut_fast::Kernels* coconut_fast::avx512_kernels() { return &avx512::kTable; }
#else
const coconut_fast::Kernels* coconut_fast::avx512_kernels() { return nullptr; }
#endif
