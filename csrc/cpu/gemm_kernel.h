// See gemm.h. Included once, for Isa::avx512_bf16. Bound by multiply-adds: 24 of them for every 11 loads.
#include "cpu/vec.h"

constexpr int kVecs = kPanelColumns / W;

// ---- packing ------------------------------------------------------------------------------------------------------
// A word is one step of one column: one fp32, or two bf16, the earlier k in the low half.

// An intrinsic, because GCC widens the two halves of a vector separately.
static INLINE WordVec widened(const void* halves) {
  return bits<WordVec>(_mm512_cvtepu16_epi32(load<__m256i>(halves)));
}

// 16 values of row k in bf16.
static INLINE __m256i halves(const Matrix& w, int64_t k, int64_t column) {
  const int64_t at = k * w.row_stride + column;
  if (w.dtype == Dtype::bf16) return load<__m256i>(static_cast<const uint16_t*>(w.data) + at);
  return (__m256i)_mm512_cvtneps_pbh(load<__m512>(static_cast<const float*>(w.data) + at));
}

// One step of 16 columns, from row k on.
template <Dtype kTo>
static INLINE WordVec row_words(const Matrix& w, int64_t k, int64_t column) {
  if constexpr (kTo == Dtype::bf16) {
    const __m512i first = _mm512_castsi256_si512(halves(w, k, column));
    WordVec order;  // value i of the first row, then of the second
    for (int i = 0; i < W; ++i) order[i] = i | (i + W) << 16;
    const __m512i both = _mm512_inserti64x4(first, halves(w, k + 1, column), 1);
    return bits<WordVec>(_mm512_permutexvar_epi16(bits<__m512i>(order), both));
  }
  const int64_t at = k * w.row_stride + column;
  if (w.dtype == Dtype::f32) return load<WordVec>(static_cast<const float*>(w.data) + at);
  return widened(static_cast<const uint16_t*>(w.data) + at) << 16;
}

// 16 steps of one column, from row k on.
template <Dtype kTo>
static INLINE WordVec column_words(const Matrix& w, int64_t k, int64_t column) {
  const int64_t at = k + column * w.column_stride;
  if (w.dtype == kTo) return load<WordVec>(static_cast<const char*>(w.data) + at * size_of(kTo));
  if (w.dtype == Dtype::bf16) return widened(static_cast<const uint16_t*>(w.data) + at) << 16;
  const float* x = static_cast<const float*>(w.data) + at;
  return bits<WordVec>(_mm512_cvtne2ps_pbh(load<__m512>(x + W), load<__m512>(x)));
}

// Transposes sixteen vectors as a matrix.
static INLINE void turn(Vec (&x)[W]) {
  const auto exchange_all = [&]<int w>(std::integral_constant<int, w>) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if (!(i & w)) exchange<w>(x[i], x[i + w], std::make_integer_sequence<int, W>());
  };
  exchange_all(std::integral_constant<int, 1>());
  exchange_all(std::integral_constant<int, 2>());
  exchange_all(std::integral_constant<int, 4>());
  exchange_all(std::integral_constant<int, 8>());
}

template <Dtype kTo>
static INLINE uint32_t word(const Matrix& w, int64_t k, int64_t column, int64_t rows, int64_t columns) {
  if (column >= columns || k >= rows) return 0;
  if (kTo == Dtype::f32) return std::bit_cast<uint32_t>(w.at(k, column));
  const uint32_t second = k + 1 < rows ? f32_to_bf16(w.at(k + 1, column)) : 0;
  return f32_to_bf16(w.at(k, column)) | second << 16;
}

// Columns [first, last), multiples of 16, of w (rows, columns): `put(step, column, words)` for 16 of them at a time.
// All columns of 16 steps come before the next steps: 16 columns through all rows would read cache lines repeatedly.
template <Dtype kTo, typename Put>
static INLINE void pack(const Matrix& w, int64_t first, int64_t last, int64_t rows, int64_t columns, Put put) {
  constexpr int64_t kStep = kTo == Dtype::bf16 ? 2 : 1;
  const int64_t steps = steps_of(kTo, rows);
  for (int64_t step = 0; step < steps; step += W)
    for (int64_t column = first; column < last; column += W) {
      const bool inside = (step + W) * kStep <= rows && column + W <= columns;
      if (inside && w.column_stride == 1) {
        for (int64_t s = step; s < step + W; ++s) {
          for (int64_t k = (s + 2 * W) * kStep; k < (s + 2 * W + 1) * kStep; ++k)  // rows lie too far apart for the CPU
            __builtin_prefetch(static_cast<const char*>(w.data) + (k * w.row_stride + column) * size_of(w.dtype));
          put(s, column, row_words<kTo>(w, s * kStep, column));
        }
      } else if (inside && w.row_stride == 1) {
        Vec words[W];
        for (int c = 0; c < W; ++c) words[c] = bits<Vec>(column_words<kTo>(w, step * kStep, column + c));
        turn(words);
        for (int s = 0; s < W; ++s) put(step + s, column, bits<WordVec>(words[s]));
      } else {
        for (int64_t s = step; s < std::min(step + W, steps); ++s) {
          WordVec words;
          for (int c = 0; c < W; ++c) words[c] = word<kTo>(w, s * kStep, column + c, rows, columns);
          put(s, column, words);
        }
      }
    }
}

template <Dtype kTo>
static void pack_columns(const Matrix& w, int64_t k, int64_t n, int64_t panel, char* packed) {
  const int64_t first = panel * kPanelColumns;
  pack<kTo>(w, first, first + kPanelColumns, k, n, [&](int64_t step, int64_t column, WordVec words) {
    store(packed + (step * kPanelColumns + column - first) * 4, words);
  });
}

// ---- the product --------------------------------------------------------------------------------------------------

template <Dtype kDtype>
static INLINE Vec multiply_add(Vec sum, WordVec a, WordVec b) {
  if (kDtype == Dtype::f32) return sum + bits<Vec>(a) * bits<Vec>(b);
  return (Vec)_mm512_dpbf16_ps((__m512)sum, bits<__m512bh>(a), bits<__m512bh>(b));
}

struct Sums {
  Vec of[kTileRows][kVecs];
};

struct Nothing {
  void operator()(int64_t) const {}
};

// `start` plus kRows rows of words, `row` bytes apart and `next` bytes from step to step, times a panel, whose steps
// are `stride` bytes apart. Calls fetch(s) in step s.
template <Dtype kDtype, int kRows, typename Fetch = Nothing>
static INLINE Sums tile(const char* x, size_t row, size_t next, const char* panel, int64_t steps,
                        size_t stride = kPanelColumns * 4, const Sums& start = {}, const Fetch& fetch = {}) {
  Vec sums[kRows][kVecs];
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) sums[m][j] = start.of[m][j];
  for (int64_t s = 0; s < steps; ++s) {
    WordVec b[kVecs];
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) b[j] = load<WordVec>(panel + j * sizeof(WordVec));
    fetch(s);
#pragma GCC unroll 8
    for (int m = 0; m < kRows; ++m) {
      const WordVec a = load<uint32_t>(x + m * row) - WordVec{};
#pragma GCC unroll 3
      for (int j = 0; j < kVecs; ++j) sums[m][j] = multiply_add<kDtype>(sums[m][j], a, b[j]);
    }
    x += next;
    panel += stride;
  }
  Sums result;
#pragma GCC unroll 8
  for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < kVecs; ++j) result.of[m][j] = sums[m][j];
  return result;
}

// 16 values of `kDtype` <-> fp32
template <Dtype kDtype>
static INLINE Vec values(const char* from) {
  if (kDtype == Dtype::f32) return load(from);
  return bits<Vec>(widened(from) << 16);
}

template <Dtype kDtype>
static INLINE void put_values(char* to, Vec x) {
  if constexpr (kDtype == Dtype::f32) store(to, x);
  else store(to, _mm512_cvtneps_pbh((__m512)x));  // written by hand it takes 3% of a product
}

constexpr int64_t kChain = 128;       // steps of k whose products are added up before they join the others
constexpr int64_t kAhead = 12 << 10;  // bytes; with 6 KiB 8 rows take 10% longer, with 24 KiB up to 5%

// first: the panel is not in the L2 cache yet. With prefetching, 8 rows read weights at 74 GB/s, without at 50.
template <Dtype kDtype, int kRows>
static INLINE void multiply_rows(const Product& p, int64_t row, int64_t column, const char* panel, bool first) {
  constexpr int64_t kSize = size_of(kDtype);
  const int64_t columns = std::min(kPanelColumns, p.n - column);
  const char* x = p.x + row * p.k * kSize;
  const int64_t steps = steps_of(kDtype, p.k), stride = kPanelColumns * 4;
  const auto fetch = [&](int64_t s) {
    for (int64_t at = 0; at < stride; at += 64) __builtin_prefetch(panel + kAhead + s * stride + at);
  };
  Sums sums{};
  for (int64_t s = 0; s < steps; s += kChain, x += kChain * 4, panel += kChain * stride) {
    const int64_t here = std::min(kChain, steps - s);
    const Sums part = first ? tile<kDtype, kRows>(x, p.k * kSize, 4, panel, here, stride, {}, fetch)
                            : tile<kDtype, kRows>(x, p.k * kSize, 4, panel, here);
    for (int m = 0; m < kRows; ++m)
      for (int j = 0; j < kVecs; ++j) sums.of[m][j] += part.of[m][j];
  }
  alignas(64) char spare[kPanelColumns * kSize], bias[kPanelColumns * kSize] = {};
  if (p.bias) memcpy(bias, p.bias + column * kSize, columns * kSize);
  for (int m = 0; m < kRows; ++m) {
    char* y = p.y + ((row + m) * p.n + column) * kSize;
    char* to = columns == kPanelColumns ? y : spare;
    for (int j = 0; j < kVecs; ++j)
      put_values<kDtype>(to + j * W * kSize, sums.of[m][j] + values<kDtype>(bias + j * W * kSize));
    if (to == spare) memcpy(y, spare, columns * kSize);
  }
}

// Calls `task(rows, row)` for 8 rows at a time from `row` on, then 4, then 1; `rows` is a compile-time constant.
template <typename Task>
static INLINE void by_rows(int64_t row, int64_t last, const Task& task) {
  for (; row + 8 <= last; row += 8) task(std::integral_constant<int, 8>(), row);
  for (; row + 4 <= last; row += 4) task(std::integral_constant<int, 4>(), row);
  for (; row < last; ++row) task(std::integral_constant<int, 1>(), row);
}

template <Dtype kDtype>
static void multiply_block(const Product& p, int64_t first, int64_t last, int64_t panel) {
  const char* packed = p.packed + panel * panel_bytes(kDtype, p.k);
  const int64_t column = panel * kPanelColumns;
  by_rows(first, last, [&](auto rows, int64_t row) {
    multiply_rows<kDtype, rows>(p, row, column, packed, row == first);
  });
}

// ---- gradients of weights -----------------------------------------------------------------------------------------

// A strip is eight columns of `left`, [step][8 words]; a task is a cache line of every row: four strips, in fp32 two.
template <Dtype kDtype>
static void gather_strips(const Gradient& g, int64_t task) {
  const int64_t bytes = steps_of(kDtype, g.rows) * 32, first = task * g.gather_columns();
  const Matrix left{g.left, kDtype, g.m, 1};
  pack<kDtype>(left, first, first + g.gather_columns(), g.rows, g.m, [&](int64_t step, int64_t column, WordVec words) {
    char halves[64], *to = g.gathered + column / kTileRows * bytes + step * 32;
    store(halves, words);
    memcpy(to, halves, 32);
    memcpy(to + bytes, halves + 32, 32);
  });
}

template <Dtype kDtype>
static void add_panel(const Gradient& g, int64_t task, char* panel) {
  const int64_t steps = steps_of(kDtype, g.rows), column = task * kPanelColumns;
  const int64_t columns = std::min(kPanelColumns, g.n - column);
  const auto add = [&](float* to, const Vec* sums) {
    if (columns < kPanelColumns) {
      for (int64_t i = 0; i < columns; ++i) to[i] = (g.first ? 0.0f : to[i]) + sums[i / W][i % W];
    } else {
      for (int j = 0; j < kVecs; ++j) store(to + j * W, g.first ? sums[j] : load(to + j * W) + sums[j]);
    }
  };
  pack_columns<kDtype>(Matrix{g.right, kDtype, g.n, 1}, g.rows, g.n, task, panel);
  for (int64_t row = 0; row < g.m; row += kTileRows) {
    const char* strip = g.gathered + row * steps * 4;
    for (int64_t m = 0; m < kTileRows; ++m)  // fetched while the sums are computed, like the next strip
      for (int j = 0; j < kVecs; ++j) __builtin_prefetch(g.total + (row + m) * g.n + column + j * W, 1);
    const auto fetch = [&](int64_t s) { __builtin_prefetch(strip + (steps + s) * 32); };
    const Sums sums = tile<kDtype, kTileRows>(strip, 4, 32, panel, steps, kPanelColumns * 4, {}, fetch);
    for (int64_t m = 0; m < std::min(kTileRows, g.m - row); ++m) add(g.total + (row + m) * g.n + column, sums.of[m]);
  }
  if (g.column_sums) {
    const uint32_t ones = kDtype == Dtype::bf16 ? 0x3f803f80 : 0x3f800000;
    add(g.column_sums + column, tile<kDtype, 1>(reinterpret_cast<const char*>(&ones), 0, 0, panel, steps).of[0]);
  }
}
