// See gelu.h. Included once per instruction set. Bound by arithmetic: about thirty operations per vector.
#include "cpu/vec.h"

constexpr int64_t kPiece = 256;  // values that are widened to fp32 at a time

// y = f(x, grad) piece by piece, all of one dtype; a null grad counts as zeros.
template <Vec (*f)(Vec, Vec)>
static INLINE void map(const void* x, const void* grad, void* y, Dtype dtype, int64_t n) {
  alignas(64) float in[kPiece] = {}, gradient[kPiece] = {}, out[kPiece];
  const int64_t size = size_of(dtype);
  for (int64_t at = 0; at < n; at += kPiece) {
    const int64_t count = std::min(kPiece, n - at);
    widen(in, static_cast<const char*>(x) + at * size, dtype, count);
    if (grad) widen(gradient, static_cast<const char*>(grad) + at * size, dtype, count);
    for (int64_t i = 0; i < count; i += W) store(out + i, f(load(in + i), load(gradient + i)));
    narrow(static_cast<char*>(y) + at * size, out, 1.0f, dtype, count);
  }
}

constexpr float kSlope = 1.5957691216057308f, kCubic = 0.044715f;  // 2 sqrt(2 / pi)

constexpr float kLog = 1.4426950408889634f;                        // log2(e)

static INLINE Vec gate(Vec x) { return 1.0f / (1.0f + exp2(x * -(kLog * kSlope + kLog * kSlope * kCubic * (x * x)))); }

static INLINE Vec value(Vec x, Vec) { return x * gate(x); }

static INLINE Vec slope(Vec x, Vec grad) {
  const Vec s = gate(x);
  return grad * (s + x * s * (1.0f - s) * kSlope * (1.0f + 3.0f * kCubic * x * x));
}

static void gelu(const void* x, void* y, Dtype dtype, int64_t n) { map<value>(x, nullptr, y, dtype, n); }

static void gelu_backward(const void* grad_y, const void* x, void* grad_x, Dtype dtype, int64_t n) {
  map<slope>(x, grad_y, grad_x, dtype, n);
}
