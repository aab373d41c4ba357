// See Few in gemm.h. Included once, after gemm_kernel.h. Bound by memory: w is read once, for all rows.

// Rows of a strip of w: 24 KiB of a panel stay in the L1 cache for all rows of x. One chain, so that the sums are those
// of the packed product.
constexpr int64_t kStripRows = kChain;
constexpr int64_t kLines = kStripRows / W;  // cache lines of a column in a strip

static INLINE __mmask16 first_lanes(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
static INLINE Vec load(__mmask16 lanes, const float* from) { return (Vec)_mm512_maskz_loadu_ps(lanes, from); }

// y (kRows, 48 columns) += x (kRows, columns [k, k + steps)) times strip.
template <int kRows, typename Fetch>
static INLINE void add_strip(const Few& f, int64_t row, int64_t column, int64_t k, int64_t steps, const char* strip,
                             size_t stride, const Fetch& fetch) {
  float* y = f.y + row * f.n + column;
  const auto lanes = [&](int j) { return first_lanes(f.n - column - j * W); };
  const char* x = reinterpret_cast<const char*>(f.x + row * f.k + k);
  Sums sums = tile<Dtype::f32, kRows>(x, f.k * 4, 4, strip, steps, stride, {}, fetch);
  for (int m = 0; k && m < kRows; ++m)
    for (int j = 0; j < kVecs; ++j) sums.of[m][j] += load(lanes(j), y + m * f.n + j * W);
  const float* bias = k + steps == f.k ? f.bias : nullptr;
  for (int m = 0; m < kRows; ++m)
    for (int j = 0; j < kVecs; ++j) {
      const Vec more = bias ? load(lanes(j), bias + column + j * W) : Vec{};
      _mm512_mask_storeu_ps(y + m * f.n + j * W, lanes(j), (__m512)(sums.of[m][j] + more));
    }
}

static void multiply_few(const Few& f, int64_t first, int64_t last) {
  const bool as_it_lies = f.w.column_stride == 1, to_l1 = l1_is_large();
  const auto at = [&](int64_t k, int64_t panel) {
    return static_cast<const float*>(f.w.data) + k * f.w.row_stride + panel * kPanelColumns * f.w.column_stride;
  };
  for (int64_t k = 0; k < f.k; k += kStripRows)
    for (int64_t panel = first; panel < last; ++panel) {
      const float *block = at(k, panel), *next = panel + 1 < last ? at(k, panel + 1) : at(k + kStripRows, first);
      const int64_t column = panel * kPanelColumns, columns = std::min(kPanelColumns, f.n - column);
      const int64_t steps = std::min(kStripRows, f.k - k);
      const auto fetch = [&](int64_t s) {  // three lines of the next block
        for (int64_t line = 3 * s; line < 3 * s + 3; ++line)
          fetch_line(as_it_lies ? next + s * f.w.row_stride + line % 3 * W
                                : next + line / kLines * f.w.column_stride + line % kLines * W,
                     to_l1);
      };
      alignas(64) char packed[kStripRows * kPanelColumns * 4];
      const char* strip = reinterpret_cast<const char*>(block);
      size_t stride = f.w.row_stride * 4;
      if (!as_it_lies || columns < kPanelColumns) {
        const Matrix lying{block, Dtype::f32, f.w.row_stride, f.w.column_stride};
        pack_columns<Dtype::f32>(lying, steps, columns, 0, packed);
        strip = packed, stride = kPanelColumns * 4;
      }
      by_rows(0, f.rows, [&](auto rows, int64_t row) {
        if (row == 0) add_strip<rows>(f, row, column, k, steps, strip, stride, fetch);
        else add_strip<rows>(f, row, column, k, steps, strip, stride, Nothing());
      });
    }
}
