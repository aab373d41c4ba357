// Everything in a pass that works on one row at a time: norms, the inputs of linear layers, epilogues, rotation.
// Included once per instruction set after vec.h, inside its namespace. No includes here.

static INLINE Vec load_part(const float* from, int n) {
  Vec v{};
  __builtin_memcpy(&v, from, n * sizeof(float));
  return v;
}

// lane l of the result: lane l ^ w
template <int w, int... l>
static INLINE Vec swapped(Vec v, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, (l ^ w)...);
#else
  return __builtin_shuffle(v, IntVec{(l ^ w)...});
#endif
}

template <int w = W / 2>
static INLINE float largest(Vec v) {
  v = larger(v, swapped<w>(v, std::make_integer_sequence<int, W>{}));
  if constexpr (w > 1) return largest<w / 2>(v);
  return v[0];
}

template <int w = W / 2>
static INLINE float total(Vec v) {
  v += swapped<w>(v, std::make_integer_sequence<int, W>{});
  if constexpr (w > 1) return total<w / 2>(v);
  return v[0];
}

// Sum of f over n values: four running vectors, added in a fixed order, then the remainder one by one.
template <typename F>
static INLINE float sum_over(const float* x, int n, F f) {
  Vec parts[4] = {};
  int i = 0;
  for (; i + 4 * W <= n; i += 4 * W)
    for (int j = 0; j < 4; ++j) parts[j] += f(load(x + i + j * W));
  float rest = 0;
  for (; i < n; ++i) rest += f(splat(x[i]))[0];
  return total((parts[0] + parts[1]) + (parts[2] + parts[3])) + rest;
}

static void norm(const Norm& norm, const float* x, int n, float* out) {
  float mean = 0;
  Vec shift{};
  // The lambda captures, even zeros: from one without captures GCC also makes a function outside the instruction set.
  if (norm.centred) mean = sum_over(x, n, [shift](Vec v) INLINE_LAMBDA { return v - shift; }) / n;
  shift = splat(mean);
  const float variance = sum_over(x, n, [shift](Vec v) INLINE_LAMBDA { return (v - shift) * (v - shift); }) / n;
  const float scale = 1.0f / std::sqrt(variance + norm.eps);
  for (int i = 0; i < n; ++i) {
    const float y = (x[i] - mean) * scale * norm.weight[i];
    out[i] = norm.bias ? y + norm.bias[i] : y;
  }
}

// Two digits of round(x / scale), |.| <= 32512, each in a signed byte; the segment's largest value sets the scale.
static void split_segment(const float* x, int n, int8_t* high, int8_t* low, float* scale, int32_t* offset) {
  Vec peak{};
  for (int i = 0; i < n; i += W) {
    const Vec v = n - i < W ? load_part(x + i, n - i) : load(x + i);
    peak = larger(peak, bits<Vec>(bits<IntVec>(v) & 0x7fffffff));
  }
  const float peak_value = largest(peak);
  const float inverse = peak_value > 0 ? 32512.0f / peak_value : 0.0f;
  uint32_t total = 0;
  for (int i = 0; i < n; ++i) {
    const float shifted = x[i] * inverse + 12582912.0f;  // rounds to an integer in the low bits
    const int32_t q = __builtin_bit_cast(int32_t, shifted) - 0x4b400000;
    const int32_t upper = (q + 128) >> 8;
    high[i] = static_cast<int8_t>(upper);
    low[i] = static_cast<int8_t>(q - upper * 256);
    total += static_cast<uint32_t>(q);
  }
  *scale = peak_value / 32512.0f;
  *offset = static_cast<int32_t>(0u - total * 128u);
}

static void prepare(const float* x, int k, const InputRow& to) {
  if (to.kind == InputKind::fp32) {
    __builtin_memcpy(to.data, x, k * sizeof(float));
  } else if (to.kind == InputKind::bf16) {
    narrow(to.data, x, 1.0f, Dtype::bf16, k);
  } else {
    for (int s = 0; s * kSegment < k; ++s) {
      const int from = s * kSegment, n = k - from < kSegment ? k - from : kSegment;
      auto* high = reinterpret_cast<int8_t*>(to.data) + from;
      split_segment(x + from, n, high, high + to.low, to.scales + s, to.offsets + s);
    }
  }
}

// ---- epilogues: widths are multiples of 16 ----------------------------------------------------------------------

static INLINE Vec with_bias(const float* sums, const float* bias, int i) {
  return bias ? load(sums + i) + load(bias + i) : load(sums + i);
}

static void finish_store(const float* sums, int rows, int width, const float* bias, float* out, size_t stride) {
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < width; i += W) store(out + m * stride + i, with_bias(sums + m * width, bias, i));
}

static void finish_add(const float* sums, int rows, int width, const float* bias, float* out, size_t stride) {
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < width; i += W) {
      float* to = out + m * stride + i;
      store(to, load(to) + with_bias(sums + m * width, bias, i));
    }
}

// x * sigmoid(y)
static INLINE Vec times_sigmoid(Vec x, Vec y) { return x / (1.0f + exp(-y)); }

template <Activation kind>
static INLINE Vec act(Vec x) {
  if constexpr (kind == Activation::relu) return larger(x, Vec{});
  if constexpr (kind == Activation::silu) return times_sigmoid(x, x);
  // 0.5 (1 + tanh(u)) is sigmoid(2 u)
  if constexpr (kind == Activation::gelu_tanh)
    return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
  Vec y;
  for (int i = 0; i < W; ++i) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678118654752f));
  return y;
}

template <Activation kind, bool bf16>
static void activate(const float* sums, int rows, int width, const float* bias, bool gated, void* out, size_t stride) {
  const int n = gated ? width / 2 : width;
  for (int m = 0; m < rows; ++m)
    for (int i = 0; i < n; i += W) {
      const float* row = sums + m * width;
      const Vec y = act<kind>(with_bias(row, bias, i));
      const Vec made = gated ? y * with_bias(row, bias, n + i) : y;
      if constexpr (bf16) store(static_cast<uint16_t*>(out) + m * stride + i, rounded(made));
      else store(static_cast<float*>(out) + m * stride + i, made);
    }
}

template <Activation kind>
static void activate(const float* sums, int rows, int width, const float* bias, bool gated, bool bf16, void* out,
                     size_t stride) {
  if (bf16) activate<kind, true>(sums, rows, width, bias, gated, out, stride);
  else activate<kind, false>(sums, rows, width, bias, gated, out, stride);
}

static void finish_activate(const float* sums, int rows, int width, const float* bias, Activation kind, bool gated,
                            bool bf16, void* out, size_t stride) {
  switch (kind) {
    case Activation::gelu_tanh:
      return activate<Activation::gelu_tanh>(sums, rows, width, bias, gated, bf16, out, stride);
    case Activation::gelu: return activate<Activation::gelu>(sums, rows, width, bias, gated, bf16, out, stride);
    case Activation::silu: return activate<Activation::silu>(sums, rows, width, bias, gated, bf16, out, stride);
    case Activation::relu: return activate<Activation::relu>(sums, rows, width, bias, gated, bf16, out, stride);
  }
}

// ---- rotary embedding ---------------------------------------------------------------------------------------------

static void rotary(int position, const float* inv_freq, int half, float scaling, float* cos, float* sin) {
  for (int i = 0; i < half; ++i) {
    const float angle = static_cast<float>(position) * inv_freq[i];
    cos[i] = std::cos(angle) * scaling;
    sin[i] = std::sin(angle) * scaling;
  }
}

// out = rotated(normed(x)) * factor: one head of a query or a key.
static void rotate(const DecodeAttention& a, int token, const float* x, const float* weight, float factor, float* out) {
  const int n = a.head_dim, half = n / 2;
  if (weight) {
    norm(Norm{weight, nullptr, false, a.eps}, x, n, out);
    x = out;
  }
  if (!a.cos) {
    for (int i = 0; i < n; ++i) out[i] = x[i] * factor;
    return;
  }
  const float *cos = a.cos + size_t(token) * half, *sin = a.sin + size_t(token) * half;
  for (int i = 0; i < half; ++i) {
    const float low = x[i], high = x[half + i];
    out[i] = (low * cos[i] - high * sin[i]) * factor;
    out[half + i] = (high * cos[i] + low * sin[i]) * factor;
  }
}
