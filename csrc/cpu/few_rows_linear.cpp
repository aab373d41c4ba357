#include "cpu/few_rows_linear.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/isa.h"

#if COCONUT_FAST_X86
#include <immintrin.h>
#endif

#define KERNEL_SOURCE "cpu/few_rows_linear_kernel.h"
#define KERNEL_BF16
#include "cpu/each_isa.h"

namespace coconut_fast {

void few_rows_linear(const FewRowsLinear& linear, int64_t first, int64_t last) {
#if COCONUT_FAST_X86
  if (best_isa() >= Isa::avx512_bf16) return avx512_bf16::few_rows_linear(linear, first, last);
  if (best_isa() >= Isa::avx512) return avx512::few_rows_linear(linear, first, last);
  if (best_isa() >= Isa::avx2) return avx2::few_rows_linear(linear, first, last);
#endif
  portable::few_rows_linear(linear, first, last);
}

}  // namespace coconut_fast
