// Vectors of W fp32 lanes for the instruction set of the enclosing target pragma (see isa.h); included once per set,
// inside its namespace, hence without an include guard. The includer first includes <cmath>, <cstring>, <utility> and
// cpu/dtype.h and defines KERNEL_LEVEL, the number of the Isa: up to GCC 12 `#pragma GCC target` does not change macros
// such as __AVX512F__ in C++, where the whole file is preprocessed before the pragma is seen.

#ifndef KERNEL_LEVEL
#error "define KERNEL_LEVEL: without it every instruction set would compute on four lanes"
#elif KERNEL_LEVEL >= 2
constexpr int W = 16;
#elif KERNEL_LEVEL >= 1
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

#define INLINE inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t IntVec __attribute__((vector_size(W * 4)));
typedef uint32_t WordVec __attribute__((vector_size(W * 4)));

template <typename V = Vec>
static INLINE V load(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <typename V>
static INLINE void store(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

template <typename To, typename From>
static INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  return __builtin_bit_cast(To, v);
}

static INLINE Vec splat(float x) { return x - Vec{}; }

// x, not fused with a sum that follows: GCC fuses a product with it in some instances of a kernel and not in others.
static INLINE Vec unfused(Vec x) {
#if defined(__x86_64__)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

static INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }   // b where one is NaN
static INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }  // likewise

// The sum of a vector's lanes, by halves.
template <typename V>
static INLINE auto sum(V v) {
  typedef std::remove_cvref_t<decltype(v[0])> F;
  if constexpr (sizeof(V) > 16) {
    typedef F Half __attribute__((vector_size(sizeof(V) / 2)));
    struct Halves {
      Half low, high;
    };
    const Halves h = bits<Halves>(v);
    return sum(h.low + h.high);
  } else {
    F total = v[0];
    for (unsigned i = 1; i < sizeof(V) / sizeof(F); ++i) total += v[i];
    return total;
  }
}

// In every 2 w lanes, a becomes a's first w followed by b's first w, and b becomes a's last w followed by b's last w.
template <int w, int... l>
static INLINE void exchange(Vec& a, Vec& b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  const Vec first = __builtin_shufflevector(a, b, ((l & w) ? W + l - w : l)...);
  b = __builtin_shufflevector(a, b, ((l & w) ? W + l : l + w)...);
#else
  const Vec first = __builtin_shuffle(a, b, IntVec{((l & w) ? W + l - w : l)...});
  b = __builtin_shuffle(a, b, IntVec{((l & w) ? W + l : l + w)...});
#endif
  a = first;
}

// Lane i of the result is the sum of vector i's lanes.
template <int w = 1>
static INLINE Vec sums(Vec (&x)[W]) {
  for (int i = 0; i < W; i += 2 * w) {
    exchange<w>(x[i], x[i + w], std::make_integer_sequence<int, W>());
    x[i] += x[i + w];
  }
  if constexpr (2 * w < W) return sums<2 * w>(x);
  return x[0];
}

// exp to 1 ulp (Cephes' polynomial after reduction by ln 2); 0 below -87.3, inf above 88.3, NaN stays NaN.
static INLINE Vec exp(Vec x) {
  const Vec shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23 leaves the rounded integer in the low bits
  const Vec n = shifted - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const Vec power = bits<Vec>((bits<WordVec>(shifted) << 23) + (127u << 23));
  Vec y = p * power;
  y = x < -87.3f ? Vec{} : y;
  return x > 88.3f ? splat(INFINITY) : y;
}

// 2 to the power of x, within 2 ulp; 2^-126 below -126, inf from 128 on, NaN stays NaN. Cheaper than exp(), whose
// reduction by ln 2 it does not need.
static INLINE Vec exp2(Vec x) {
  x = smaller(splat(128.0f), larger(splat(-126.0f), x));
  const Vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);  // see exp()
  Vec p = splat(1.53458052e-4f);
  p = p * r + 1.33999309e-3f;
  p = p * r + 9.61848907e-3f;
  p = p * r + 5.55032864e-2f;
  p = p * r + 2.40226462e-1f;
  p = p * r + 6.93147182e-1f;
  p = p * r + 1.0f;
  return bits<Vec>(bits<WordVec>(p) + (bits<WordVec>(shifted) << 23));
}

// tanh to 2 ulp: an odd polynomial near zero, by exp elsewhere.
static INLINE Vec tanh(Vec x) {
  const Vec magnitude = bits<Vec>(bits<IntVec>(x) & 0x7fffffff), z = x * x;
  Vec p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec near = p * z * x + x;
  const Vec far = 1.0f - 2.0f / (exp(2.0f * magnitude) + 1.0f);
  const Vec signed_far = bits<Vec>(bits<IntVec>(far) | (bits<IntVec>(x) & INT32_MIN));
  return magnitude < 0.625f ? near : signed_far;
}

// n values of `dtype` (not f64) -> fp32
static INLINE void widen(float* to, const void* from, Dtype dtype, int64_t n) {
  if (dtype == Dtype::f32) {
    __builtin_memcpy(to, from, n * sizeof(float));
  } else if (dtype == Dtype::bf16) {
    const auto* x = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = bf16_to_f32(x[i]);
  } else {
    const auto* x = static_cast<const uint16_t*>(from);
    for (int64_t i = 0; i < n; ++i) to[i] = f16_to_f32(x[i]);
  }
}

typedef uint16_t HalfVec __attribute__((vector_size(W * 2)));

// fp32 -> bf16, as f32_to_bf16() does.
static INLINE HalfVec rounded(Vec v) {
  const WordVec word = bits<WordVec>(v), near = (word + 0x7fff + ((word >> 16) & 1)) >> 16;
  return __builtin_convertvector((word & 0x7fffffff) > 0x7f800000 ? (word >> 16) | 0x40 : near, HalfVec);
}

// n fp32 values, times `factor` -> `dtype` (not f64)
static INLINE void narrow(void* to, const float* from, float factor, Dtype dtype, int64_t n) {
  if (dtype == Dtype::f32) {
    auto* y = static_cast<float*>(to);
    for (int64_t i = 0; i < n; ++i) y[i] = from[i] * factor;
  } else if (dtype == Dtype::bf16) {
    auto* y = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; ++i) y[i] = f32_to_bf16(from[i] * factor);
  } else {
    auto* y = static_cast<uint16_t*>(to);
    for (int64_t i = 0; i < n; ++i) y[i] = f32_to_f16(from[i] * factor);
  }
}
