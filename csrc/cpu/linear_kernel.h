// The linear kernels, included once per instruction set (see isa.h) inside its namespace. No includes here.
//
// tile<P, MR, NB>() below is the whole loop: MR rows times NB blocks of accumulators, one segment of k. A policy P
// defines what a step of weights is and how it is multiplied: Fp32, Bf16 and Int8 convert to fp32 and work everywhere
// (GCC vector types), Bf16Dot and Int8Dot use the AVX-512 dot product instructions.

#if KERNEL_LEVEL >= 2
constexpr int kAccumulators = 24, kMaxRows = 6;
#elif KERNEL_LEVEL >= 1
constexpr int kAccumulators = 12, kMaxRows = 6;
#else
constexpr int kAccumulators = 8, kMaxRows = 2;
#endif
constexpr int kVecs = 16 / W;  // vectors per block of 16 outputs

struct Block {
  Vec v[kVecs];
};

// ---- policies -----------------------------------------------------------------------------------------------------

struct FloatSums {
  using Acc = Block;
  static constexpr int kRegisters = kVecs;
  static INLINE void begin(Acc& acc, const Input&, int, int) {
    for (int i = 0; i < kVecs; ++i) acc.v[i] = Vec{};
  }
  static INLINE Vec sum(const Acc& acc, int i, const Input&, int, int) { return acc.v[i]; }
};

struct Fp32 : FloatSums {
  static constexpr int kStep = 1;
  static INLINE void add(Acc& acc, const char* w, const char* x) {
    const float x0 = load<float>(x);
    for (int i = 0; i < kVecs; ++i) acc.v[i] += load(w + i * sizeof(Vec)) * splat(x0);
  }
  static constexpr int kInputBytes = 4;  // per step
};

struct Bf16 : FloatSums {
  static constexpr int kStep = 2, kInputBytes = 8;
  static INLINE void add(Acc& acc, const char* w, const char* x) {
    const float x0 = load<float>(x), x1 = load<float>(x + 4);
    for (int i = 0; i < kVecs; ++i) {
      IntVec pair = load<IntVec>(w + i * sizeof(Vec));
      acc.v[i] += (Vec)(pair << 16) * splat(x0);
      acc.v[i] += (Vec)(pair & (int32_t)0xffff0000) * splat(x1);
    }
  }
};

struct Int8 : FloatSums {
  static constexpr int kStep = 4, kInputBytes = 16;
  static INLINE void add(Acc& acc, const char* w, const char* x) {
    for (int i = 0; i < kVecs; ++i) {
      IntVec four = load<IntVec>(w + i * sizeof(Vec)) ^ (int32_t)0x80808080;  // back to signed bytes
      for (int j = 0; j < 4; ++j)
        acc.v[i] += __builtin_convertvector((four << (24 - 8 * j)) >> 24, Vec) * splat(load<float>(x + 4 * j));
    }
  }
};

#if KERNEL_LEVEL >= 3
struct Bf16Dot : FloatSums {
  static constexpr int kStep = 2, kInputBytes = 4;
  static INLINE void add(Acc& acc, const char* w, const char* x) {
    acc.v[0] = (Vec)_mm512_dpbf16_ps((__m512)acc.v[0], (__m512bh)_mm512_loadu_si512(w),
                                     (__m512bh)_mm512_set1_epi32(load<int32_t>(x)));
  }
};
#endif

#if KERNEL_LEVEL >= 3
struct Int8Dot {
  // Only vectors: GCC keeps a struct with mixed members in memory.
  struct Acc {
    IntVec high, low;
  };
  static constexpr int kStep = 4, kInputBytes = 4, kRegisters = 2;
  static INLINE void begin(Acc& acc, const Input& input, int row, int segment) {
    acc.high = IntVec{};
    acc.low = IntVec{} + input.offsets[row * input.segment_stride + segment];
  }
  static INLINE void add(Acc& acc, const char* w, const char* x, size_t low) {
    const __m512i weights = _mm512_loadu_si512(w);
    const __m512i high4 = _mm512_set1_epi32(load<int32_t>(x)), low4 = _mm512_set1_epi32(load<int32_t>(x + low));
    acc.high = (IntVec)_mm512_dpbusd_epi32((__m512i)acc.high, weights, high4);
    acc.low = (IntVec)_mm512_dpbusd_epi32((__m512i)acc.low, weights, low4);
  }
  // Exact: |sum| < 127 * 32512 * 512 < 2^31, and partial sums may wrap around modulo 2^32.
  static INLINE Vec sum(const Acc& acc, int, const Input& input, int row, int segment) {
    return __builtin_convertvector((acc.high << 8) + acc.low, Vec) *
           input.scales[row * input.segment_stride + segment];
  }
};
#endif

// ---- the loop -----------------------------------------------------------------------------------------------------

template <class P, int MR, int NB, bool kToL1>
static INLINE void tile(const char* w, size_t w_step, int steps, const Input& input, const char* x, int row,
                        int segment, bool first, const float* scales, float* out, size_t out_stride, const char* fetch,
                        int fetch_every, WeightPrefetch& prefetch, KVPrefetch& kv) {
  const char *at = kv.at, *const end = kv.end, *const weights_end = prefetch.end;
  if constexpr (MR <= 2) fetch = prefetch.at;
  typename P::Acc acc[MR][NB];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j) P::begin(acc[m][j], input, row + m, segment);
  int countdown = fetch_every;
  for (int s = 0; s < steps; ++s) {
    if (--countdown == 0) {
      for (int j = 0; j < NB; ++j) __builtin_prefetch(fetch + j * 64, 0, kToL1 ? 3 : 2);
      fetch += NB * 64;
      if (MR <= 2 && fetch == weights_end) fetch = prefetch.next;
      countdown = fetch_every;
      if (MR > 2 && at < end) {  // two lines, a third of those of weights at 32 rows: one or three were slower
        __builtin_prefetch(at, 0, 3);
        __builtin_prefetch(at + 64, 0, 3);
        at += 128;
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int j = 0; j < NB; ++j) {
        const char* at = x + m * input.stride + s * P::kInputBytes;
        if constexpr (P::kRegisters == kVecs) P::add(acc[m][j], w + j * 64, at);
        else P::add(acc[m][j], w + j * 64, at, input.low);
      }
    w += w_step;
  }
  if constexpr (MR <= 2) prefetch.at = fetch;
  else kv.at = at;
  // Unrolled, because otherwise GCC moves the accumulators through memory: 2% of a pass at batch 32.
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < NB; ++j)
#pragma GCC unroll 4
      for (int i = 0; i < kVecs; ++i) {
        float* to = out + m * out_stride + j * 16 + i * W;
        Vec total = P::sum(acc[m][j], i, input, row + m, segment);
        if (scales) total = unfused(total * load(scales + j * 16 + i * W));
        store(to, first ? total : load(to) + total);
      }
}

// What the row groups of a unit (a segment of a chunk) share.
struct Unit {
  const Linear* linear;
  const Input* input;
  const char* weights;  // of this chunk and segment
  const char* fetch;    // of the next one
  const float* scales;  // or null
  int steps, segment, groups;
  float* out;
  size_t out_stride;
  WeightPrefetch* prefetch;
  KVPrefetch* kv;
};

// Where a group starts prefetching: each group takes its part of the next unit, and each of its tiles a part of that,
// in the order of memory (lines in steps of a chunk came at half the rate on Zen 3). With two groups the unit is read
// twice, and where it and the next one do not fit in L1 together, prefetching runs three quarters of a unit ahead (4 to
// 7% of a bf16 pass of 8 rows).
static INLINE const char* fetch_of(const Unit& u, int group) {
  const size_t w_step = u.linear->bytes_per_step();
  if (u.groups != 2 || u.steps * w_step <= (16 << 10)) return u.fetch + size_t(u.steps / u.groups) * group * w_step;
  return group == 0 ? u.weights + size_t(u.steps * 3 / 4) * w_step : u.fetch + size_t(u.steps / 4) * w_step;
}

template <class P, int MR, int NB, bool kToL1>
static void row_group(const Unit& u, int row, int group) {
  const size_t w_step = u.linear->bytes_per_step();
  const size_t before = size_t(u.segment) * kSegment / P::kStep * P::kInputBytes;
  const char* x = u.input->data + row * u.input->stride + before;
  const char* fetch = fetch_of(u, group);
  const size_t share = size_t(u.steps / u.groups) * 64;  // of it that a block fetches
  for (int j = 0; j < u.linear->wide; j += NB) {
    if constexpr (MR > 2) u.kv->advance();
    tile<P, MR, NB, kToL1>(u.weights + j * 64, w_step, u.steps, *u.input, x, row, u.segment, u.segment == 0,
                           u.scales ? u.scales + j * 16 : nullptr, u.out + row * u.out_stride + j * 16, u.out_stride,
                           fetch + share * j, u.groups, *u.prefetch, *u.kv);
  }
}

// A small L1 has no room for the next unit where a few groups read this one, unless units are small (widest_for in
// pack.cpp). Which few was measured on Zen 4.
template <class P, int MR, int NB>
static void row_group(const Unit& u, int row, int group) {
  constexpr bool kFloats = P::kRegisters == kVecs;
  if (KERNEL_LEVEL < 2 || MR <= 2 || l1_is_large() || u.groups > (kFloats ? 3 : 2) || (kFloats && u.groups == 1))
    return row_group<P, MR, NB, true>(u, row, group);
  if constexpr (MR > 2) row_group<P, MR, NB, false>(u, row, group);
}

template <class P, int MR>
static void row_group(const Unit& u, int row, int group) {
  constexpr int fit = kAccumulators / (MR * P::kRegisters);
  if constexpr (fit >= 4)
    if (u.linear->wide == 4) return row_group<P, MR, 4>(u, row, group);
  if constexpr (fit >= 2)
    if (u.linear->wide >= 2) return row_group<P, MR, 2>(u, row, group);
  row_group<P, MR, 1>(u, row, group);
}

template <class P>
static void linear_chunk(const Linear& linear, int chunk, const Input& input, int rows, float* out, size_t out_stride,
                         WeightPrefetch& prefetch, KVPrefetch& kv) {
  Unit u{&linear, &input, linear.chunk(chunk), nullptr, nullptr, 0, 0, 0, out, out_stride, &prefetch, &kv};
  if (linear.scales) u.scales = linear.scales + size_t(chunk) * linear.width();
  u.groups = (rows + kMaxRows - 1) / kMaxRows;
  const int segments = linear.segments();
  for (u.segment = 0; u.segment < segments; ++u.segment) {
    const int from = u.segment * kSegment, to = from + kSegment;
    u.steps = ((to < linear.k_padded ? to : linear.k_padded) - from) / P::kStep;
    const char* following = u.weights + u.steps * linear.bytes_per_step();
    u.fetch = following == prefetch.end ? prefetch.next : following;
    for (int group = 0, row = 0; group < u.groups; ++group) {
      const int size = rows / u.groups + (group < rows % u.groups);
      switch (size) {
        case 1: row_group<P, 1>(u, row, group); break;
        case 2: row_group<P, 2>(u, row, group); break;
#if KERNEL_LEVEL >= 1
        case 3: row_group<P, 3>(u, row, group); break;
        case 4: row_group<P, 4>(u, row, group); break;
        case 5: row_group<P, 5>(u, row, group); break;
        case 6: row_group<P, 6>(u, row, group); break;
#endif
      }
      row += size;
    }
    u.weights = following;
  }
}
