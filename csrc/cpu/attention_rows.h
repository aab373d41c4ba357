// Attention of few queries (a latent pass, a decoded token), and all attention in fp64: dot products and sums over rows
// of the cache, each read once for all heads of the task. Bound by memory: the 256 bytes of a 64-wide fp32 key take 60
// cycles at 14 GB/s per core, the arithmetic of one query 15.
// Included once per instruction set after vec.h.

template <typename F>
struct Wide {
  typedef F V __attribute__((vector_size(W * 4)));
  static constexpr int64_t lanes = W * 4 / sizeof(F);
};

template <typename F>
static INLINE F dot(const F* a, const F* b, int64_t n) {
  typedef typename Wide<F>::V V;
  constexpr int64_t w = Wide<F>::lanes;
  V even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * w <= n; i += 2 * w) {
    even += load<V>(a + i) * load<V>(b + i);
    odd += load<V>(a + i + w) * load<V>(b + i + w);
  }
  for (; i + w <= n; i += w) even += load<V>(a + i) * load<V>(b + i);
  F total = sum(even + odd);
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

// to[j] = x . (rows[j] + offset) for 16 rows at once: summing over lanes costs more than the products of 64 values.
template <typename F>
static INLINE void dots(const F* x, const F* const* rows, int64_t offset, int64_t n, F* to) {
  if constexpr (sizeof(F) == sizeof(double)) {
    for (int j = 0; j < 16; ++j) to[j] = dot(x, rows[j] + offset, n);
  } else {
    for (int j = 0; j < 16; j += W) {
      Vec parts[W]{};
      int64_t i = 0;
      for (; i + W <= n; i += W)
        for (int m = 0; m < W; ++m) parts[m] += load(x + i) * load(rows[j + m] + offset + i);
      store(to + j, sums(parts));
      for (; i < n; ++i)
        for (int m = 0; m < W; ++m) to[j + m] += x[i] * rows[j + m][offset + i];
    }
  }
}

// y += sum of factors[j] (rows[j] + offset) for j in [lo, hi)
template <typename F>
static INLINE void add_rows(F* y, const F* factors, const F* const* rows, int64_t offset, int64_t n, int64_t lo,
                            int64_t hi) {
  typedef typename Wide<F>::V V;
  int64_t i = 0;
  for (; i + Wide<F>::lanes <= n; i += Wide<F>::lanes) {
    V total = load<V>(y + i);
    for (int64_t j = lo; j < hi; ++j) total += factors[j] * load<V>(rows[j] + offset + i);
    store(y + i, total);
  }
  for (; i < n; ++i)
    for (int64_t j = lo; j < hi; ++j) y[i] += factors[j] * rows[j][offset + i];
}

template <typename F>
static INLINE void add_scaled(F* y, F factor, const F* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += factor * x[i];
}

// In place over n values, a multiple of 16.
static INLINE void exp_all(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store(x + i, exp(load(x + i)));
}
static INLINE void exp_all(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::exp(x[i]);
}
static INLINE void tanh_all(float* x, int64_t n) {
  for (int64_t i = 0; i < n; i += W) store(x + i, tanh(load(x + i)));
}
static INLINE void tanh_all(double* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) x[i] = std::tanh(x[i]);
}

// n values at index `offset` of a tensor of `dtype`: in place if they are F, else widened into `space`.
template <typename F>
static INLINE const F* values_at(const void* tensor, Dtype dtype, int64_t offset, int64_t n, F* space) {
  if constexpr (sizeof(F) == sizeof(double)) {
    return static_cast<const F*>(tensor) + offset;
  } else {
    if (dtype == Dtype::f32) return static_cast<const F*>(tensor) + offset;
    widen(space, static_cast<const char*>(tensor) + offset * size_of(dtype), dtype, n);
    return space;
  }
}

static INLINE void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 3);
}

constexpr int64_t kAhead = 8;  // positions; 8 rows of 340 bf16 keys take 0.20 ms, without prefetching 0.36

// The values of position j for all heads of the task; prefetches those of position j + kAhead.
template <typename F>
static INLINE const F* slot_values(const Attention& a, const Task& t, const Row& row, const void* tensor, int64_t dim,
                                   int64_t j, F* space) {
  const int64_t n = (t.last_head - t.first_head) * dim;
  auto offset = [&](int64_t position) { return (row.slot(position) * a.kv_heads + t.first_head) * dim; };
  const int64_t size = size_of(a.cache_dtype);
  if (j + kAhead < row.length) fetch(static_cast<const char*>(tensor) + offset(j + kAhead) * size, n * size);
  return values_at<F>(tensor, a.cache_dtype, offset(j), n, space);
}

// One task's lanes of a (T, heads, dim) tensor -> (kv heads of the task, lanes, dim), times factor; and back.
template <typename F>
static void gather(const Attention& a, const Task& t, const Row& row, const void* tensor, int64_t dim, F factor,
                   F* to) {
  for (int64_t g = t.first_head; g < t.last_head; ++g)
    for (int64_t e = t.first_lane; e < t.last_lane; ++e, to += dim) {
      const F* from = values_at<F>(tensor, a.query_dtype, row.pair(e, g, a.heads) * dim, dim, to);
      for (int64_t i = 0; i < dim; ++i) to[i] = from[i] * factor;
    }
}

template <typename F>
static void scatter(const Attention& a, const Task& t, const Row& row, const F* from, int64_t dim, F factor,
                    void* tensor) {
  for (int64_t g = t.first_head; g < t.last_head; ++g)
    for (int64_t e = t.first_lane; e < t.last_lane; ++e, from += dim) {
      char* to = static_cast<char*>(tensor) + row.pair(e, g, a.heads) * dim * size_of(a.query_dtype);
      if constexpr (sizeof(F) == sizeof(double)) {
        for (int64_t i = 0; i < dim; ++i) reinterpret_cast<F*>(to)[i] = from[i] * factor;
      } else {
        narrow(to, from, factor, a.query_dtype, dim);
      }
    }
}

// Scores (arbitrary outside [lo, hi)) -> weights exp(s - max) / sum, 0 where dropped; returns the log-sum-exp.
template <typename F>
static INLINE F soften(const Attention& a, F* s, int64_t n, int64_t lo, int64_t hi, int64_t from, uint32_t word) {
  typedef typename Wide<F>::V V;
  const F cap = static_cast<F>(a.softcap);
  if (a.softcap != 0) {
    for (int64_t i = 0; i < n; ++i) s[i] /= cap;
    tanh_all(s, n);
    for (int64_t i = 0; i < n; ++i) s[i] *= cap;
  }
  for (int64_t i = 0; i < lo; ++i) s[i] = -INFINITY;
  for (int64_t i = hi; i < n; ++i) s[i] = -INFINITY;
  V most = load<V>(s);
  for (int64_t i = Wide<F>::lanes; i < n; i += Wide<F>::lanes) {
    const V x = load<V>(s + i);
    most = x > most ? x : most;
  }
  F top = most[0];
  for (int64_t i = 1; i < Wide<F>::lanes; ++i) top = std::max<F>(top, most[i]);
  for (int64_t i = 0; i < n; ++i) s[i] -= top;
  exp_all(s, n);
  V parts{};
  for (int64_t i = 0; i < n; i += Wide<F>::lanes) parts += load<V>(s + i);
  const F total = sum(parts), factor = static_cast<F>(1 / (total * (1 - a.dropout)));
  for (int64_t i = 0; i < n; ++i) s[i] *= factor;
  if (a.dropout > 0) {
    const uint32_t threshold = dropout_threshold(a.dropout);
    for (int64_t i = lo; i < hi; ++i)
      if (mix(word ^ static_cast<uint32_t>(from + i) * kPositionStep) >> 8 < threshold) s[i] = 0;
  }
  return top + std::log(total);
}

template <typename F>
static void rows_forward(const Attention& a, const Task& t, void* out, void* lse) {
  Scratch& scratch = thread_scratch();
  const Row row(a, t.b);
  const int64_t heads = t.last_head - t.first_head, lanes = t.last_lane - t.first_lane, pairs = heads * lanes;
  const int64_t from = row.first_seen(t.first_lane), to = row.position(t.last_lane - 1) + 1;
  const int64_t stride = (to - from + 15) / 16 * 16, K = a.key_dim, Kv = a.value_dim;
  scratch.reset((pairs * (K + stride + Kv) + heads * (K + Kv)) * sizeof(F) + 5 * 64);
  F *q = scratch.take<F>(pairs * K), *weights = scratch.take<F>(pairs * stride), *sums = scratch.take<F>(pairs * Kv);
  F *key_space = scratch.take<F>(heads * K), *value_space = scratch.take<F>(heads * Kv);

  gather<F>(a, t, row, a.query, K, static_cast<F>(a.scaling), q);
  for (int64_t j = from; j < to; ++j) {
    const F* k = slot_values<F>(a, t, row, a.keys, K, j, key_space);
    for (int64_t i = 0; i < pairs; ++i) weights[i * stride + j - from] = dot(q + i * K, k + i / lanes * K, K);
  }
  for (int64_t i = 0; i < pairs; ++i) {
    const int64_t e = t.first_lane + i % lanes, pair = row.pair(e, t.first_head + i / lanes, a.heads);
    const int64_t hi = row.position(e) + 1 - from, lo = row.first_seen(e) - from;
    const uint32_t word = dropout_word(a.seed, row.slot(row.position(e)), pair % a.heads);
    static_cast<F*>(lse)[pair] = soften(a, weights + i * stride, stride, lo, hi, from, word);
  }
  std::fill(sums, sums + pairs * Kv, F(0));
  for (int64_t j = from; j < to; ++j) {
    const F* v = slot_values<F>(a, t, row, a.values, Kv, j, value_space);
    for (int64_t i = 0; i < pairs; ++i)
      add_scaled(sums + i * Kv, weights[i * stride + j - from], v + i / lanes * Kv, Kv);
  }
  scatter<F>(a, t, row, sums, Kv, F(1), out);
}

// For 16 keys at a time and one query: weights w and, from dp = dout.v, score gradients ds; both 0 outside [lo, hi).
template <typename F>
static INLINE void soften_backward(const Attention& a, F* w, F* dp, int64_t lo, int64_t hi, int64_t first, F lse,
                                   F delta, uint32_t word) {
  F slope[16];
  const F cap = static_cast<F>(a.softcap), kept = static_cast<F>(1 / (1 - a.dropout));
  if (a.softcap != 0) {
    for (int i = 0; i < 16; ++i) w[i] /= cap;
    tanh_all(w, 16);
    for (int i = 0; i < 16; ++i) slope[i] = 1 - w[i] * w[i];
    for (int i = 0; i < 16; ++i) w[i] *= cap;
  } else {
    for (int i = 0; i < 16; ++i) slope[i] = 1;
  }
  for (int i = 0; i < 16; ++i) w[i] = i >= lo && i < hi ? w[i] - lse : -INFINITY;
  exp_all(w, 16);
  const uint32_t threshold = dropout_threshold(a.dropout);
  for (int i = 0; i < 16; ++i) {
    const bool drop = a.dropout > 0 && mix(word ^ static_cast<uint32_t>(first + i) * kPositionStep) >> 8 < threshold;
    const F factor = drop ? 0 : kept;
    dp[i] = i >= lo && i < hi ? w[i] * (factor * dp[i] - delta) * slope[i] : 0;
    w[i] *= factor;
  }
}

template <typename F>
static void rows_backward(const Attention& a, const Task& t, const AttentionGrads& grads) {
  Scratch& scratch = thread_scratch();
  const Row row(a, t.b);
  const int64_t heads = t.last_head - t.first_head, lanes = t.last_lane - t.first_lane, pairs = heads * lanes;
  const int64_t from = row.first_seen(t.first_lane), to = row.length, K = a.key_dim, Kv = a.value_dim;
  scratch.reset((pairs * (2 * K + 2 * Kv + 33) + 16 * heads * (K + Kv)) * sizeof(F) + 9 * 64);
  F *q = scratch.take<F>(pairs * K), *dq = scratch.take<F>(pairs * K), *delta = scratch.take<F>(pairs);
  F *dout = scratch.take<F>(pairs * Kv), *out = scratch.take<F>(pairs * Kv);
  F *key_space = scratch.take<F>(16 * heads * K), *value_space = scratch.take<F>(16 * heads * Kv);
  F *weights = scratch.take<F>(pairs * 16), *slopes = scratch.take<F>(pairs * 16);

  gather<F>(a, t, row, a.query, K, static_cast<F>(a.scaling), q);
  gather<F>(a, t, row, grads.grad_out, Kv, F(1), dout);
  gather<F>(a, t, row, grads.out, Kv, F(1), out);
  for (int64_t i = 0; i < pairs; ++i) {  // in dout.v's order: where out is one v, their difference is 0
    const F* same[16];
    std::fill(same, same + 16, out + i * Kv);
    F products[16];
    dots(dout + i * Kv, same, 0, Kv, products);
    delta[i] = products[0];
  }
  std::fill(dq, dq + pairs * K, F(0));

  for (int64_t first = from; first < to; first += 16) {
    const int64_t count = std::min<int64_t>(16, to - first);
    const F *k[16], *v[16];
    F *dk[16], *dv[16];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t at = row.slot(first + j) * a.kv_heads + t.first_head;
      k[j] = slot_values<F>(a, t, row, a.keys, K, first + j, key_space + j * heads * K);
      v[j] = slot_values<F>(a, t, row, a.values, Kv, first + j, value_space + j * heads * Kv);
      dk[j] = static_cast<F*>(grads.grad_keys) + at * K;
      dv[j] = static_cast<F*>(grads.grad_values) + at * Kv;
    }
    std::fill(k + count, k + 16, k[0]);
    std::fill(v + count, v + 16, v[0]);
    for (int64_t i = 0; i < pairs; ++i) {
      const int64_t h = i / lanes, e = t.first_lane + i % lanes, pair = row.pair(e, t.first_head + h, a.heads);
      const int64_t lo = std::max<int64_t>(0, row.first_seen(e) - first);
      const int64_t hi = std::min(count, row.position(e) + 1 - first);
      F *w = weights + i * 16, *ds = slopes + i * 16;
      dots(q + i * K, k, h * K, K, w);
      dots(dout + i * Kv, v, h * Kv, Kv, ds);
      const uint32_t word = dropout_word(a.seed, row.slot(row.position(e)), pair % a.heads);
      soften_backward(a, w, ds, lo, hi, first, static_cast<const F*>(grads.lse)[pair], delta[i], word);
      add_rows(dq + i * K, ds, k, h * K, K, lo, hi);
    }
    // All heads of a key before the next key, in long runs of memory: 8 rows of 340 keys take 0.94 ms instead of 1.33.
    for (int64_t j = std::max<int64_t>(0, grads.from(t.b) - first); j < count; ++j)
      for (int64_t i = 0; i < pairs; ++i) {
        add_scaled(dk[j] + i / lanes * K, slopes[i * 16 + j], q + i * K, K);
        add_scaled(dv[j] + i / lanes * Kv, weights[i * 16 + j], dout + i * Kv, Kv);
      }
  }
  scatter<F>(a, t, row, dq, K, static_cast<F>(a.scaling), grads.grad_query);
}
