// Tanh-approximated GELU and its derivative, for training, in fp32 arithmetic. Each call is one thread's share.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace coconut_fast {

// y = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3); n values of `dtype` (not f64).
void gelu(const void* x, void* y, Dtype dtype, int64_t n);

// grad_x = grad_y dy/dx
void gelu_backward(const void* grad_y, const void* x, void* grad_x, Dtype dtype, int64_t n);

}  // namespace coconut_fast
