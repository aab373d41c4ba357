// y = x W^T + bias for few rows of x, with W as PyTorch stores it: for models without a native chain.
//
// W is read from memory once, and for up to four rows that takes all of the time.
//
// Sums. Lane l of an fp32 vector adds up the products of every k that is l modulo its width (in bf16, of pairs of k),
// in order; the lanes are added pairwise. A row's result thus does not depend on the other rows.
#pragma once

#include <cstdint>

#include "cpu/dtype.h"

namespace coconut_fast {

constexpr int64_t kOutputs = 16;  // of a block

struct FewRowsLinear {
  const char *x, *weight, *bias;  // (rows, k), (n, k) and (n,) or null
  char* y;                        // (rows, n)
  Dtype dtype;                    // f32 or bf16, of all four
  int64_t rows, k, n;

  int64_t blocks() const { return (n + kOutputs - 1) / kOutputs; }
};

// Computes the blocks [first, last) of outputs.
void few_rows_linear(const FewRowsLinear& linear, int64_t first, int64_t last);

}  // namespace coconut_fast
