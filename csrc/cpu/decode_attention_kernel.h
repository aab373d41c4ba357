// Attention of one new token over its row of the paged cache, included once per instruction set after rowwise_kernel.h.
//
// W positions at a time: their scores are W dot products side by side, reduced to one vector by a tree of shuffles;
// softmax is online (running maximum and sum, output rescaled when the maximum grows). Everything is fp32, in an order
// that depends on the row alone. Bound by reading keys and values: 2 * K values per position and kv head.

// W vectors -> one vector of their sums
template <int w = W / 2>
static INLINE Vec sums_of(Vec* v) {
  for (int i = 0; i < w; ++i) {
    exchange<w>(v[i], v[i + w], std::make_integer_sequence<int, W>{});
    v[i] += v[i + w];
  }
  if constexpr (w > 1) return sums_of<w / 2>(v);
  return v[0];
}

template <int... l>
static INLINE IntVec lanes(std::integer_sequence<int, l...>) {
  return IntVec{l...};
}

struct Pair {
  Vec first, second;
};

// both() loads 2 W values; 16-bit ones in one load, which puts those at even indices first. arrange() permutes queries
// to match, in whole pairs of vectors (`zeros`: 2 W scratch values, 0 before and after); restore() undoes it in sums.
struct Fp32Cache {
  static constexpr int kBytes = 4;
  static INLINE Pair both(const char* p) { return {load(p), load(p + sizeof(Vec))}; }
  static INLINE Vec get(const char* p) { return load(p); }
  static INLINE float one(const char* p) { return load<float>(p); }
  static INLINE void arrange(float*, float*, int) {}
  static INLINE void restore(float* out, const float* sums, int n) { __builtin_memcpy(out, sums, n * sizeof(float)); }
};

struct Bf16Cache {
  static constexpr int kBytes = 2;
  static INLINE Pair both(const char* p) {
    const IntVec pairs = load<IntVec>(p);
    return {bits<Vec>(pairs << 16), bits<Vec>(pairs & (int32_t)0xffff0000)};
  }
  static INLINE Vec get(const char* p) {
    return bits<Vec>(__builtin_convertvector(load<HalfVec>(p), WordVec) << 16);
  }
  static INLINE float one(const char* p) { return bf16_to_f32(load<uint16_t>(p)); }
  static INLINE void arrange(float* query, float* zeros, int n) {
    for (int c = 0; c + 2 * W <= n; c += 2 * W) {
      __builtin_memcpy(zeros, query + c, 2 * W * sizeof(float));
      for (int i = 0; i < W; ++i) query[c + i] = zeros[2 * i], query[c + W + i] = zeros[2 * i + 1];
    }
    for (int i = 0; i < 2 * W && n >= 2 * W; i += W) store(zeros + i, Vec{});
  }
  static INLINE void restore(float* out, const float* sums, int n) {
    int c = 0;
    for (; c + 2 * W <= n; c += 2 * W)
      for (int i = 0; i < W; ++i) out[c + 2 * i] = sums[c + i], out[c + 2 * i + 1] = sums[c + W + i];
    for (; c < n; ++c) out[c] = sums[c];
  }
};

// Byte offsets of consecutive positions of a row in the storage.
struct Walk {
  const DecodeAttention& a;
  const int32_t* pages;
  int64_t page, offset;
  size_t slot_bytes;

  Walk(const DecodeAttention& a, int row, int position, int bytes)
      : a(a), pages(a.page_table + row * a.pages_per_row), page(position / a.page_size),
        offset(position % a.page_size), slot_bytes(size_t(a.kv_heads) * a.head_dim * bytes) {}

  // The offsets of the next `count` positions, the last one repeated up to W.
  INLINE void next(int count, size_t* at) {
    for (int i = 0; i < W; ++i) {
      if (i >= count) {
        at[i] = at[count - 1];
        continue;
      }
      at[i] = size_t(pages[page] * a.page_size + offset) * slot_bytes;
      if (++offset == a.page_size) offset = 0, ++page;
    }
  }
};

// Online softmax of one query head.
struct Softmax {
  const float* query;
  float* sums;     // (padded,): of exp(score - highest) * value
  float* weights;  // (W,): scores of the current positions, then exp(score - highest)
  float highest, total;
};

// W positions, `here` of them real, whose keys or values start at side + at[i]; next: those to be prefetched.
struct Positions {
  size_t at[W], next[W];
  int here;
};

// weights = query . keys. Prefetches the values of the same positions.
template <class Cache>
static INLINE void score(const Softmax& s, const char* keys, const char* values, const Positions& p, int n) {
  constexpr int kPair = 2 * W * Cache::kBytes;
  const int paired = n / (2 * W) * (2 * W), whole = n / W * W;
  Vec dots[W] = {};
  for (int c = 0; c < paired; c += 2 * W) {
    const Vec q = load(s.query + c), r = load(s.query + c + W);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const size_t place = c * Cache::kBytes;
      for (int byte = 0; byte < kPair; byte += 64) __builtin_prefetch(values + p.at[i] + place + byte, 0, 3);
      const auto [k, l] = Cache::both(keys + p.at[i] + place);
      dots[i] += q * k;
      dots[i] += r * l;
    }
  }
  for (int c = paired; c < whole; c += W)
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) dots[i] += load(s.query + c) * Cache::get(keys + p.at[i] + c * Cache::kBytes);
  Vec scores = sums_of(dots);
  for (int c = whole; c < n; ++c)
    for (int i = 0; i < W; ++i) scores[i] += s.query[c] * Cache::one(keys + p.at[i] + c * Cache::kBytes);
  store(s.weights, scores);
}

// weights = exp(weights - highest) for real positions, else 0
static INLINE void soften(Softmax& s, int here, int padded) {
  const Vec real = load(s.weights);
  const Vec scores = lanes(std::make_integer_sequence<int, W>{}) < here ? real : splat(-INFINITY);
  const float top = largest(scores);
  if (top > s.highest) {
    const float shrink = exp(splat(s.highest - top))[0];
    s.highest = top, s.total *= shrink;
    for (int c = 0; c < padded; c += W) store(s.sums + c, load(s.sums + c) * shrink);
  }
  const Vec weights = exp(scores - s.highest);
  store(s.weights, weights);
  s.total += total(weights);
}

// sums += weights . values. Prefetches the keys of the next positions.
template <class Cache>
static INLINE void add_values(const Softmax& s, const char* values, const char* keys, const Positions& p, int n) {
  constexpr int kPair = 2 * W * Cache::kBytes;
  const int paired = n / (2 * W) * (2 * W), whole = n / W * W;
  for (int c = 0; c < paired; c += 2 * W) {
    Vec y = load(s.sums + c), z = load(s.sums + c + W);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const size_t place = c * Cache::kBytes;
      for (int byte = 0; byte < kPair; byte += 64) __builtin_prefetch(keys + p.next[i] + place + byte, 0, 3);
      const auto [v, w] = Cache::both(values + p.at[i] + place);
      y += s.weights[i] * v;
      z += s.weights[i] * w;
    }
    store(s.sums + c, y), store(s.sums + c + W, z);
  }
  for (int c = paired; c < whole; c += W) {
    Vec y = load(s.sums + c);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) y += s.weights[i] * Cache::get(values + p.at[i] + c * Cache::kBytes);
    store(s.sums + c, y);
  }
  for (int c = whole; c < n; ++c)
    for (int i = 0; i < p.here; ++i) s.sums[c] += s.weights[i] * Cache::one(values + p.at[i] + c * Cache::kBytes);
}

// All heads of a block of positions before the next block: a slot's heads are adjacent, so memory is read in long runs.
// Scores, softmax and sums are three loops over the heads, because a head's softmax is a chain of dependent
// instructions, and the chains of several heads overlap.
template <class Cache>
static void attend_row(const DecodeAttention& a, int token, int first_head, int last_head, int row, int position) {
  const int n = a.head_dim, padded = (n + W - 1) / W * W, shared = a.heads / a.kv_heads;
  const int first_query = first_head * shared, queries = (last_head - first_head) * shared;
  const char *keys = static_cast<const char*>(a.keys), *values = static_cast<const char*>(a.values);
  auto* states = reinterpret_cast<Softmax*>(a.scratch);
  float* rows = a.scratch + queries * (sizeof(Softmax) / sizeof(float));
  for (int g = 0; g < queries; ++g) {
    float *query = rows + g * (2 * padded + W), *sums = query + padded;
    for (int c = 0; c < padded; c += W) store(query + c, Vec{}), store(sums + c, Vec{});
    rotate(a, token, a.qkv + token * a.qkv_stride + (first_query + g) * n, a.q_norm, a.scaling, query);
    Cache::arrange(query, sums, n);
    states[g] = {query, sums, sums + padded, -INFINITY, 0};
  }
  const int first = a.window && position >= a.window ? position - a.window + 1 : 0;
  Walk walk(a, row, first, Cache::kBytes);
  Positions p;
  const auto count = [&](int from) { return position + 1 - from < W ? position + 1 - from : W; };
  walk.next(count(first), p.next);
  for (int from = first; from <= position; from += W) {
    __builtin_memcpy(p.at, p.next, sizeof p.at);
    p.here = count(from);
    if (from + W <= position) walk.next(count(from + W), p.next);
    const auto head = [&](int g) { return size_t(first_head + g / shared) * n * Cache::kBytes; };
    for (int g = 0; g < queries; ++g) score<Cache>(states[g], keys + head(g), values + head(g), p, n);
    for (int g = 0; g < queries; ++g) soften(states[g], p.here, padded);
    for (int g = 0; g < queries; ++g) add_values<Cache>(states[g], values + head(g), keys + head(g), p, n);
  }
  for (int g = 0; g < queries; ++g) {
    float* out = a.out + token * a.out_stride + (first_query + g) * n;
    float* sums = states[g].sums;
    for (int c = 0; c < padded; c += W) store(sums + c, load(sums + c) / states[g].total);
    Cache::restore(out, sums, n);
  }
}

static void attend(const DecodeAttention& a, int token, int first_head, int last_head, int row, int position) {
  if (a.dtype == Dtype::f32) attend_row<Fp32Cache>(a, token, first_head, last_head, row, position);
  else attend_row<Bf16Cache>(a, token, first_head, last_head, row, position);
}

static void query(const DecodeAttention& a, int token, int head, float* out) {
  rotate(a, token, a.qkv + token * a.qkv_stride + size_t(head) * a.head_dim, a.q_norm, 1.0f, out);
}

static void write(const DecodeAttention& a, int token, int head, int row, int position) {
  const int n = a.head_dim;
  const float* key = a.qkv + token * a.qkv_stride + size_t(a.heads + head) * n;
  const float* value = key + size_t(a.kv_heads) * n;
  rotate(a, token, key, a.k_norm, 1.0f, a.scratch);
  const int64_t page = a.page_table[row * a.pages_per_row + position / a.page_size];
  const size_t at = (size_t(page * a.page_size + position % a.page_size) * a.kv_heads + head) * n * size_of(a.dtype);
  narrow(static_cast<char*>(a.keys) + at, a.scratch, 1.0f, a.dtype, n);
  narrow(static_cast<char*>(a.values) + at, value, 1.0f, a.dtype, n);
}
