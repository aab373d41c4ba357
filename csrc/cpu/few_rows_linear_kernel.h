// See few_rows_linear.h. Included once per instruction set.
#include "cpu/vec.h"

constexpr int kTogether = 4;                          // outputs added up at a time,
constexpr int kMostRows = KERNEL_LEVEL >= 2 ? 6 : 2;  // of so many rows: 24 or 8 accumulators
constexpr int64_t kAhead = 8192;                      // bytes of weights between use and prefetch, at least

// What a vector of one operand is, and how two of them are multiplied.
struct F32 {
  static constexpr int kStep = W;  // values
  using Operand = Vec;
  static INLINE Operand load_operand(const char* from) { return load(from); }
  static INLINE void add(Vec& sum, Operand a, Operand b) { sum += a * b; }
};

#if KERNEL_LEVEL >= 3
struct Bf16 {
  static constexpr int kStep = 32;
  using Operand = __m512i;
  static INLINE Operand load_operand(const char* from) { return _mm512_loadu_si512(from); }
  static INLINE void add(Vec& sum, Operand a, Operand b) {
    sum = (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#else
struct Bf16 {
  static constexpr int kStep = 2 * W;
  struct Operand {
    Vec even, odd;
  };
  static INLINE Operand load_operand(const char* from) {
    const IntVec pairs = load<IntVec>(from);
    return {bits<Vec>(pairs << 16), bits<Vec>(pairs & (int32_t)0xffff0000)};
  }
  static INLINE void add(Vec& sum, const Operand& a, const Operand& b) {
    sum += a.even * b.even;
    sum += a.odd * b.odd;
  }
};
#endif

// One block of outputs of kRows rows, `group` of the `groups` that x is divided into; each prefetches its share of the
// weights that follow, to L2: to L1 they came at two thirds of the rate (Zen 4).
template <class P, int kRows>
static void block_of(const FewRowsLinear& l, int64_t row, int64_t block, int64_t group, int64_t groups) {
  const int64_t size = size_of(l.dtype), stride = l.k * size, bytes = P::kStep * size, first = block * kOutputs;
  const int64_t steps = l.k / P::kStep, rest = l.k % P::kStep * size, count = std::min<int64_t>(kOutputs, l.n - first);
  const char* x = l.x + row * stride;
  const int64_t strides = kTogether * stride, ahead = (kAhead + strides - 1) / strides * strides;
  Vec sum[kRows][kOutputs];
  for (int begin = 0; begin < kOutputs; begin += kTogether) {
    const char* w[kTogether];
    for (int j = 0; j < kTogether; ++j) w[j] = l.weight + std::min(first + begin + j, l.n - 1) * stride;
    Vec part[kRows][kTogether] = {};
    const auto add = [&](const auto& input, const auto& weight) __attribute__((always_inline)) {
      typename P::Operand of[kTogether];
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) of[j] = P::load_operand(weight(j));
#pragma GCC unroll 6
      for (int m = 0; m < kRows; ++m) {
        const auto value = P::load_operand(input(m));
#pragma GCC unroll 4
        for (int j = 0; j < kTogether; ++j) P::add(part[m][j], of[j], value);
      }
    };
    for (int64_t s = 0, next = group; s < steps; ++s) {
      const int64_t at = s * bytes;
      if (s == next) {
        next += groups;
        for (int j = 0; j < kTogether; ++j) __builtin_prefetch(w[j] + ahead + at, 0, 2);
      }
      add([&](int m) { return x + m * stride + at; }, [&](int j) { return w[j] + at; });
    }
    if (rest) {
      alignas(64) char tail[kRows + kTogether][P::kStep * 4] = {};
      for (int m = 0; m < kRows; ++m) std::memcpy(tail[m], x + m * stride + steps * bytes, rest);
      for (int j = 0; j < kTogether; ++j) std::memcpy(tail[kRows + j], w[j] + steps * bytes, rest);
      add([&](int m) { return tail[m]; }, [&](int j) { return tail[kRows + j]; });
    }
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < kTogether; ++j) sum[m][begin + j] = part[m][j];
  }
  alignas(64) float bias[kOutputs] = {}, totals[kOutputs];
  if (l.bias) widen(bias, l.bias + first * size, l.dtype, count);
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int j = 0; j < kOutputs; j += W) {
      Vec of[W];
#pragma GCC unroll 16
      for (int i = 0; i < W; ++i) of[i] = sum[m][j + i];
      store(totals + j, sums(of) + load(bias + j));
    }
    char* y = l.y + ((row + m) * l.n + first) * size;
    if (count == kOutputs) narrow(y, totals, 1.0f, l.dtype, kOutputs);  // the compiler makes vectors of a constant
    else narrow(y, totals, 1.0f, l.dtype, count);
  }
}

template <class P>
static void multiply(const FewRowsLinear& l, int64_t first, int64_t last) {
  const int64_t groups = (l.rows + kMostRows - 1) / kMostRows;
  for (int64_t block = first; block < last; ++block)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t row = group * l.rows / groups;
      const auto rows = (group + 1) * l.rows / groups - row;
      [&]<int... less>(std::integer_sequence<int, less...>) {
        ((less + 1 == rows ? block_of<P, less + 1>(l, row, block, group, groups) : void()), ...);
      }(std::make_integer_sequence<int, kMostRows>());
    }
}

static void few_rows_linear(const FewRowsLinear& l, int64_t first, int64_t last) {
  if (l.dtype == Dtype::bf16) multiply<Bf16>(l, first, last);
  else multiply<F32>(l, first, last);
}
