// The chain's kernels for Isa::avx2.
#include <cmath>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/sampling.h"

#if COCONUT_FAST_X86
#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KERNEL_LEVEL 1
namespace coconut_fast::avx2 {
#include "cpu/kernels_body.h"
}
#pragma GCC pop_options

const coconut_fast::Kernels* coconut_fast::avx2_kernels() { return &avx2::kTable; }
#else
const coconut_fast::Kernels* coconut_fast::avx2_kernels() { return nullptr; }
#endif
