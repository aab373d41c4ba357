// Matrix products of a training step, in fp32 and bf16: for CPUs that multiply pairs of bf16 (VDPBF16PS) and have no
// AMX, i.e. AMD's since Zen 4. Elsewhere PyTorch's libraries are as good or better.
//
// Packing. The right operand (K, N) is cut into panels of 48 columns. A panel is [step of k][48 columns][k in step],
// a step being one k in fp32 and two in bf16, so that both take 192 bytes; entries beyond K and N are zero. A kernel
// multiplies 8 rows by a panel, over all of k, with 24 accumulator registers. bf16 weights are packed once for all
// passes.
//
// Sums. An element is a sum of fp32 chains over 128 steps of k each, since the error of a chain grows with its length.
// The bias is added before rounding. An element depends only on its row, its column and K, not on the number of rows,
// threads or panels. (Weight gradients: a chain per block of rows.)
//
// Each call computes one task; the caller distributes the tasks over threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/dtype.h"
#include "cpu/pack.h"

namespace coconut_fast {

constexpr int64_t kPanelColumns = 48, kTileRows = 8;

inline int64_t steps_of(Dtype dtype, int64_t k) { return dtype == Dtype::bf16 ? (k + 1) / 2 : k; }
inline int64_t panels_of(int64_t n) { return (n + kPanelColumns - 1) / kPanelColumns; }
inline int64_t gradient_rows(Dtype dtype) { return 6144 / size_of(dtype); }  // whose panel stays in the L2 cache
inline int64_t panel_bytes(Dtype dtype, int64_t k) { return steps_of(dtype, k) * kPanelColumns * 4; }

// Whether this machine has such a CPU; only then may the other functions be called.
bool gemm_runs();

// Panel `panel` of w (k, n), in `dtype` (f32 or bf16; w may be either), to `packed`, 64-byte aligned.
void pack_panel(const Matrix& w, int64_t k, int64_t n, int64_t panel, Dtype dtype, char* packed);

// y (rows, n) = x (rows, k) times a packed matrix, plus bias (n,) or null; all of `dtype`, rows contiguous. In bf16 k
// is even. A task is a block of rows times one panel.
struct Product {
  const char *x, *packed, *bias;
  char* y;
  Dtype dtype;
  int64_t rows, k, n;

  // Blocks of rows whose inputs stay in the L2 cache, with equal numbers of tiles: threads with equally many tasks
  // finish together.
  int64_t tiles() const { return (rows + kTileRows - 1) / kTileRows; }
  int64_t blocks() const {
    const int64_t most = std::max<int64_t>(64, (384 << 10) / (k * size_of(dtype) + 1) / kTileRows * kTileRows);
    return std::max<int64_t>(1, (rows + most - 1) / most);
  }
  int64_t first_row(int64_t block) const { return std::min(rows, block * tiles() / blocks() * kTileRows); }
  int64_t tasks() const { return blocks() * panels_of(n); }
};
void multiply(const Product& product, int64_t task);

// The same in fp32 for few rows and an unpacked w (k, n), its rows or its columns contiguous: at the speed of memory,
// where packing for one product would take three times as long. A task is a range of panels, [first, last) of
// panels_of(n).
struct Few {
  const float *x, *bias;
  Matrix w;
  float* y;
  int64_t rows, k, n;
};
void multiply(const Few& product, int64_t first, int64_t last);

// total (m, n) fp32 += left (rows, m)^T right (rows, n), both of `dtype` and row-contiguous, rows at most
// gradient_rows(); column_sums (n,) fp32 or null += the sums of right's columns. First `gather` packs left, then `add`
// packs a panel of right into `panel` and multiplies.
struct Gradient {
  const char *left, *right;
  float *total, *column_sums;
  char* gathered;  // gathered_bytes()
  Dtype dtype;
  int64_t rows, m, n;
  bool first;  // total and column_sums are written, not added to

  int64_t gather_columns() const { return 64 / size_of(dtype); }  // of a task: a cache line of every row
  int64_t gather_tasks() const { return (m + gather_columns() - 1) / gather_columns(); }
  int64_t gathered_bytes() const { return gather_tasks() * gather_columns() * steps_of(dtype, rows) * 4; }
  int64_t add_tasks() const { return panels_of(n); }
};
void gather(const Gradient& gradient, int64_t task);
void add(const Gradient& gradient, int64_t task, char* panel);

}  // namespace coconut_fast
