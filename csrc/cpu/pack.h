// Packing weight matrices for the linear kernels: see linear.h for the layout.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "cpu/linear.h"
#include "cpu/memory.h"
#include "cpu/team.h"

namespace coconut_fast {

// A matrix owned elsewhere: element (r, c) is data[r * row_stride + c * column_stride], f32 or bf16.
struct Matrix {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  int64_t row_stride = 0, column_stride = 1;

  float at(int64_t r, int64_t c) const {
    const int64_t i = r * row_stride + c * column_stride;
    return dtype == Dtype::f32 ? static_cast<const float*>(data)[i]
                               : bf16_to_f32(static_cast<const uint16_t*>(data)[i]);
  }
};

// Memory for all packed weights of a model, in large blocks, so that huge pages cover small matrices too.
class Arena {
 public:
  char* take(size_t bytes);

 private:
  std::vector<Memory<char>> blocks_;
  size_t left_ = 0;
  char* free_ = nullptr;
};

// Packs w (n, k) and bias ((n,) or null) for the kernels of `isa`. Each of the team's threads writes what it will read
// later. paired: the matrix is two stacked ones (gate, up), and a chunk holds the same outputs of both.
Linear pack(const Matrix& w, const float* bias, int n, int k, Format format, bool paired, Isa isa, Arena& arena,
            Team& team);

// The chunks [first, last) of a thread.
struct Range {
  int first, last;
};
inline Range share(int count, int thread, int threads) {
  const auto start = [&](int64_t of) { return static_cast<int>(count * of / threads); };
  return {start(thread), start(thread + 1)};
}

}  // namespace coconut_fast
