#include "cpu/gelu.h"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"

#define KERNEL_SOURCE "cpu/gelu_kernel.h"
#include "cpu/each_isa.h"

namespace coconut_fast {

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
