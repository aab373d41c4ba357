// The small matrix products of attention_tiles.h, in one of two arithmetics: fp32, or bf16 products summed in fp32.
//
// An operand is stored as 32-bit words along the dimension that is summed: one fp32 value (kStep 1) or a pair of bf16
// values (kStep 2). The left one is (m, steps) if ROWS, else (steps, m); the right one is always (steps, n). So a
// product is broadcast words times vectors of words, whatever a word holds.
// Included once per instruction set after vec.h.

constexpr int64_t MR = W == 16 ? 8 : 4;  // a register tile is MR x 2 vectors: 16 of 32 zmm, 8 of 16 ymm or xmm

struct Fp32Products {
  typedef float Value;
  static constexpr int64_t kStep = 1;
  static INLINE Vec broadcast(const float* word) { return splat(*word); }
  static INLINE Vec add_product(Vec sum, Vec a, Vec b) { return sum + a * b; }
  // A vector of words from kStep rows.
  static INLINE Vec word(const Vec* rows) { return rows[0]; }
  static INLINE void put(float* to, Vec v) { store(to, v); }
  static INLINE void put(float* to, const void* from, Dtype dtype, int64_t n) { widen(to, from, dtype, n); }
};

#if KERNEL_LEVEL >= 3
struct Bf16Products {
  typedef uint16_t Value;
  static constexpr int64_t kStep = 2;
  static INLINE Vec broadcast(const float* word) { return bits<Vec>(_mm512_set1_epi32(load<int32_t>(word))); }
  static INLINE Vec add_product(Vec sum, Vec a, Vec b) {
    return bits<Vec>(_mm512_dpbf16_ps(bits<__m512>(sum), bits<__m512bh>(a), bits<__m512bh>(b)));
  }
  // Intrinsics, because GCC 12 emits five instructions for a conversion from HalfVec to WordVec.
  static INLINE Vec word(__m256i low, __m256i high) {
    return bits<Vec>(_mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16)));
  }
  static INLINE __m256i rounded(Vec v) { return bits<__m256i>(_mm512_cvtneps_pbh(bits<__m512>(v))); }
  static INLINE Vec word(const Vec* rows) { return word(rounded(rows[0]), rounded(rows[1])); }
  static INLINE Vec word(const uint16_t* low, const uint16_t* high) {
    return word(load<__m256i>(low), load<__m256i>(high));
  }
  static INLINE void put(uint16_t* to, Vec v) { store(to, rounded(v)); }
  static INLINE void put(uint16_t* to, const void* from, Dtype dtype, int64_t n) {
    if (dtype == Dtype::bf16) __builtin_memcpy(to, from, n * sizeof *to);
    else narrow(to, static_cast<const float*>(from), 1.0f, Dtype::bf16, n);
  }
};
#endif

static INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows of values (n, width) -> words along n, (up(n, kStep) / kStep, width): the rows themselves, or pairs of rows.
template <class P>
static INLINE const float* stack(const float* rows, int64_t n, int64_t width, float* to) {
  if constexpr (P::kStep == 1) {
    return rows;
  } else {
    const auto* x = reinterpret_cast<const uint16_t*>(rows);
    for (int64_t i = 0; i < n; i += 2, x += 2 * width)
      for (int64_t c = 0; c < width; c += W) store(to + i / 2 * width + c, P::word(x + c, x + width + c));
    return to;
  }
}

// W vectors of W lanes: vector i's lane l <-> vector l's lane i.
template <int w = W / 2>
static INLINE void transpose(Vec* v) {
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if (!(i & w)) exchange<w>(v[i], v[i + w], std::make_integer_sequence<int, W>{});
  if constexpr (w > 1) transpose<w / 2>(v);
}

enum class Start { zero, add, scaled };  // what a product starts from: 0, C, or C times a factor per row

// C[MR][NV vectors] (+)= sum over words k in [first, last) of A(m, k) B[k][:], A(m, k) = ROWS ? a[m][k] : a[k][m].
template <class P, int NV, bool ROWS, Start START>
static INLINE void tile(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t first,
                        int64_t last, const float* factor) {
  Vec sums[MR][NV];
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) {
      if constexpr (START == Start::zero) sums[m][n] = Vec{};
      if constexpr (START == Start::add) sums[m][n] = load(c + m * ldc + n * W);
      if constexpr (START == Start::scaled) sums[m][n] = load(c + m * ldc + n * W) * factor[m];
    }
  for (int64_t k = first; k < last; ++k) {
    Vec row[NV];
    for (int n = 0; n < NV; ++n) row[n] = load(b + k * ldb + n * W);
    for (int m = 0; m < MR; ++m) {
      const Vec x = P::broadcast(ROWS ? a + m * lda + k : a + k * lda + m);
      for (int n = 0; n < NV; ++n) sums[m][n] = P::add_product(sums[m][n], x, row[n]);
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int n = 0; n < NV; ++n) store(c + m * ldc + n * W, sums[m][n]);
}

// The same for a whole strip C[MR][width], width a multiple of 16; [first, last) counts values, rounded out to words.
template <class P, bool ROWS, Start START>
static INLINE void strip(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t width,
                         int64_t first, int64_t last, const float* factor = nullptr) {
  const int64_t from = first / P::kStep, to = (last + P::kStep - 1) / P::kStep;
  int64_t n = 0;
  for (; n + 2 * W <= width; n += 2 * W)
    tile<P, 2, ROWS, START>(a, lda, b + n, ldb, c + n, ldc, from, to, factor);
  for (; n < width; n += W) tile<P, 1, ROWS, START>(a, lda, b + n, ldb, c + n, ldc, from, to, factor);
}
