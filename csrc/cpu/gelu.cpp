#include "cpu/gelu.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>

#include "cpu/isa.h"

namespace coconut_fast {

#define KERNEL_LEVEL 0
namespace portable {
#include "cpu/vec.h"
#include "cpu/gelu_kernel.h"
}  // namespace portable
#undef KERNEL_LEVEL

#if COCONUT_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KERNEL_LEVEL 1
namespace avx2 {
#include "cpu/vec.h"
#include "cpu/gelu_kernel.h"
}  // namespace avx2
#undef KERNEL_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define KERNEL_LEVEL 2
namespace avx512 {
#include "cpu/vec.h"
#include "cpu/gelu_kernel.h"
}  // namespace avx512
#undef KERNEL_LEVEL
#pragma GCC pop_options
#endif

void gelu(const void* x, void* y, Dtype dtype, int64_t n) {
#if COCONUT_FAST_X86
  if (best_isa() >= Isa::avx512) return avx512::gelu(x, y, dtype, n);
  if (best_isa() >= Isa::avx2) return avx2::gelu(x, y, dtype, n);
#endif
  portable::gelu(x, y, dtype, n);
}

void gelu_backward(const void* grad_y, const void* x, void* grad_x, Dtype dtype, int64_t n) {
#if COCONUT_FAST_X86
  if (best_isa() >= Isa::avx512) return avx512::gelu_backward(grad_y, x, grad_x, dtype, n);
  if (best_isa() >= Isa::avx2) return avx2::gelu_backward(grad_y, x, grad_x, dtype, n);
#endif
  portable::gelu_backward(grad_y, x, grad_x, dtype, n);
}

}  // namespace coconut_fast
