// Attention of one new token over its row of the paged cache, included once per instruction set after rowwise_kernel.h.
//
// W positions at a time: their scores are W dot products side by side, turned into one vector by a tree of shuffles;
// softmax is online (running maximum and sum, output rescaled when the maximum grows). Everything is fp32, in an order
// that depends on the row alone. Bound by reading keys and values: 2 * K values per position and kv head.

// lane l of the result: a[l] + a[l + w] where bit w of l is clear, b[l - w] + b[l] where it is set
template <int w, int... l>
static INLINE Vec fold(Vec a, Vec b, std::integer_sequence<int, l...>) {
#if defined(__clang__)
  const Vec first = __builtin_shufflevector(a, b, ((l & w) ? W + l - w : l)...);
  const Vec second = __builtin_shufflevector(a, b, ((l & w) ? W + l : l + w)...);
#else
  const Vec first = __builtin_shuffle(a, b, IntVec{((l & w) ? W + l - w : l)...});
  const Vec second = __builtin_shuffle(a, b, IntVec{((l & w) ? W + l : l + w)...});
#endif
  return first + second;
}

// vectors -> one vector of their W sums
template <int w = W / 2>
static INLINE Vec sums_of(Vec* v) {
  for (int i = 0; i < w; ++i) v[i] = fold<w>(v[i], v[i + w], std::make_integer_sequence<int, W>{});
  if constexpr (w > 1) return sums_of<w / 2>(v);
  return v[0];
}

struct Fp32Cache {
  static constexpr int kBytes = 4;
  static INLINE Vec get(const char* p) { return load(p); }
  static INLINE float one(const char* p) { return load<float>(p); }
};

struct Bf16Cache {
  static constexpr int kBytes = 2;
  static INLINE Vec get(const char* p) {
    typedef uint16_t Half __attribute__((vector_size(W * 2)));
    return bits<Vec>(__builtin_convertvector(load<Half>(p), WordVec) << 16);
  }
  static INLINE float one(const char* p) { return bf16_to_f32(load<uint16_t>(p)); }
};

// Byte offsets of consecutive positions of a row in the storage.
struct Walk {
  const Attend& a;
  const int32_t* pages;
  int64_t page, offset;
  size_t slot_bytes;

  Walk(const Attend& a, int row, int position, int bytes)
      : a(a), pages(a.page_table + row * a.pages_per_row), page(position / a.page_size),
        offset(position % a.page_size), slot_bytes(size_t(a.kv_heads) * a.head_dim * bytes) {}

  // Of the next `count` positions, the last one repeated up to W.
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
  float* sums;      // (padded,): of exp(score - highest) * value
  float highest, total;
};

// One query head and W positions (`here` of them real), whose keys and values start at keys + at[i], values + at[i].
template <class Cache>
static INLINE void attend_block(Softmax& s, const char* keys, const char* values, const size_t* at, int here, int n) {
  const int whole = n / W * W, padded = (n + W - 1) / W * W;
  Vec dots[W] = {};
  for (int c = 0; c < whole; c += W) {
    const Vec q = load(s.query + c);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) dots[i] += q * Cache::get(keys + at[i] + c * Cache::kBytes);
  }
  Vec score = sums_of(dots);
  for (int c = whole; c < n; ++c)
    for (int i = 0; i < W; ++i) score[i] += s.query[c] * Cache::one(keys + at[i] + c * Cache::kBytes);
  for (int i = here; i < W; ++i) score[i] = -INFINITY;
  const float top = largest(score);
  if (top > s.highest) {
    const float shrink = exp(splat(s.highest - top))[0];
    s.highest = top, s.total *= shrink;
    for (int c = 0; c < padded; c += W) store(s.sums + c, load(s.sums + c) * shrink);
  }
  float weight[W];
  const Vec weights = exp(score - s.highest);
  store(weight, weights);
  s.total += total(weights);
  for (int c = 0; c < whole; c += W) {
    Vec y = load(s.sums + c);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) y += weight[i] * Cache::get(values + at[i] + c * Cache::kBytes);
    store(s.sums + c, y);
  }
  for (int c = whole; c < n; ++c)
    for (int i = 0; i < here; ++i) s.sums[c] += weight[i] * Cache::one(values + at[i] + c * Cache::kBytes);
}

// All heads of a block of positions before the next block: a slot's heads lie side by side, so memory is read in long
// runs.
template <class Cache>
static void attend_row(const Attend& a, int token, int first_head, int last_head, int row, int position) {
  const int n = a.head_dim, padded = (n + W - 1) / W * W, shared = a.heads / a.kv_heads;
  const int first_query = first_head * shared, queries = (last_head - first_head) * shared;
  const char *keys = static_cast<const char*>(a.keys), *values = static_cast<const char*>(a.values);
  auto* states = reinterpret_cast<Softmax*>(a.scratch);
  float* rows = a.scratch + queries * (sizeof(Softmax) / sizeof(float));
  for (int g = 0; g < queries; ++g) {
    float *query = rows + 2 * g * padded, *sums = query + padded;
    for (int c = 0; c < padded; c += W) store(query + c, Vec{}), store(sums + c, Vec{});
    rotate(a, token, a.qkv + token * a.qkv_stride + (first_query + g) * n, a.q_norm, a.scaling, query);
    states[g] = {query, sums, -INFINITY, 0};
  }
  const int first = a.window && position >= a.window ? position - a.window + 1 : 0;
  Walk walk(a, row, first, Cache::kBytes);
  size_t at[W], ahead[W] = {};
  const auto count = [&](int p) { return position + 1 - p < W ? position + 1 - p : W; };
  walk.next(count(first), ahead);
  for (int p = first; p <= position; p += W) {
    __builtin_memcpy(at, ahead, sizeof at);
    const bool more = p + W <= position;
    if (more) walk.next(count(p + W), ahead);
    for (int head = first_head; head < last_head; ++head) {
      const size_t offset = size_t(head) * n * Cache::kBytes;
      // To L2: two blocks of all heads are larger than L1.
      for (int i = 0; more && i < W; ++i)
        for (int byte = 0; byte < n * Cache::kBytes; byte += 64) {
          __builtin_prefetch(keys + ahead[i] + offset + byte, 0, 2);
          __builtin_prefetch(values + ahead[i] + offset + byte, 0, 2);
        }
      for (int g = 0; g < shared; ++g)
        attend_block<Cache>(states[(head - first_head) * shared + g], keys + offset, values + offset, at, count(p), n);
    }
  }
  for (int g = 0; g < queries; ++g)
    for (int c = 0; c < n; ++c)
      a.out[token * a.out_stride + (first_query + g) * n + c] = states[g].sums[c] / states[g].total;
}

static void attend(const Attend& a, int token, int first_head, int last_head, int row, int position) {
  if (a.dtype == Dtype::f32) attend_row<Fp32Cache>(a, token, first_head, last_head, row, position);
  else attend_row<Bf16Cache>(a, token, first_head, last_head, row, position);
}

static void query(const Attend& a, int token, int head, float* out) {
  rotate(a, token, a.qkv + token * a.qkv_stride + size_t(head) * a.head_dim, a.q_norm, 1.0f, out);
}

static void write(const Attend& a, int token, int head, int row, int position) {
  const int n = a.head_dim;
  const float* key = a.qkv + token * a.qkv_stride + size_t(a.heads + head) * n;
  const float* value = key + size_t(a.kv_heads) * n;
  rotate(a, token, key, a.k_norm, 1.0f, a.scratch);
  const int64_t page = a.page_table[row * a.pages_per_row + position / a.page_size];
  const size_t at = (size_t(page * a.page_size + position % a.page_size) * a.kv_heads + head) * n * size_of(a.dtype);
  narrow(static_cast<char*>(a.keys) + at, a.scratch, 1.0f, a.dtype, n);
  narrow(static_cast<char*>(a.values) + at, value, 1.0f, a.dtype, n);
}
