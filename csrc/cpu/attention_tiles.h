// Attention of many queries: small matrix products over tiles of keys and lanes (a lane is one query of one head of the
// kv group), in the arithmetic P. Scores are laid out keys x lanes, so that the softmax needs no horizontal operation,
// and all products have one form, broadcast values times vectors:
//
//     S[key][lane] = K[key][:] Qt[:][lane]        dP[key][lane] = V[key][:] dOt[:][lane]
//     O[lane][:] += P[key][lane] V[key][:]        dQ[lane][:] += dS[key][lane] K[key][:]
//     dV[key][:] += P[key][lane] dO[lane][:]      dK[key][:] += dS[key][lane] Q[lane][:]
//
// Per score that is K + Kv multiply-adds forward and 3 K + 2 Kv backward, whose rate is the bound. In bf16 arithmetic
// weights and their gradients are rounded to bf16 for the products that follow; scores, softmax and sums are fp32.
// Included once per instruction set after attention_products.h.

// Up to 32 lanes of a task. Lanes beyond the row's last one repeat its position and hold zeros.
struct Group {
  int64_t first, count, width;  // lanes [first, first + count) of the row, width: count rounded up to 16s
  int64_t seen_from, seen_to;   // cache positions that any of them sees
  int64_t least, most;          // positions of the first and the last lane
  alignas(64) int32_t position[kGroupLanes];
  alignas(64) uint32_t word[kGroupLanes];

  Group(const Attention& a, const Row& row, const Task& t, int64_t index)
      : first(t.first_lane + index * kGroupLanes),
        count(std::min(kGroupLanes, t.last_lane - first)),
        width(up(count, 16)),
        seen_from(row.first_seen(first)),
        seen_to(row.position(first + count - 1) + 1),
        least(row.position(first)),
        most(seen_to - 1) {
    for (int64_t i = 0; i < width; ++i) {
      const int64_t e = first + std::min(i, count - 1), p = row.position(e);
      position[i] = static_cast<int32_t>(p);
      if (a.dropout > 0) word[i] = dropout_word(a.seed, row.slot(p), t.first_head * row.group + e % row.group);
    }
  }

  // The part [from, to) of the keys [start, start + keys) that these lanes see, in whole register tiles.
  void range(int64_t start, int64_t keys, int64_t& from, int64_t& to) const {
    from = std::max<int64_t>(0, seen_from - start) / MR * MR;
    to = std::max(from, up(std::min(keys, seen_to - start), MR));
  }
  // Whether every lane sees all of the keys [start + from, start + to).
  bool sees_all(const Row& row, int64_t start, int64_t from, int64_t to) const {
    return start + to - 1 <= least && (row.window == 0 || most - (start + from) < row.window);
  }
};

// Packs keys [start, start + keys) of one head, zero padded to whole tiles: (up(keys, MR), up(dim, 16)) values.
// Prefetches those of the next block, which are not contiguous because a slot holds all heads.
template <class P>
static INLINE void pack_block(const Attention& a, const Row& row, int64_t kv_head, const void* tensor, int64_t dim,
                              int64_t start, int64_t keys, float* block) {
  const int64_t padded = up(dim, 16), size = size_of(a.cache_dtype);
  const auto key = [&](int64_t position) {
    return static_cast<const char*>(tensor) + (row.slot(position) * a.kv_heads + kv_head) * dim * size;
  };
  auto* to = reinterpret_cast<typename P::Value*>(block);
  for (int64_t j = 0; j < up(keys, MR); ++j, to += padded) {
    int64_t filled = 0;
    if (j < keys) P::put(to, key(start + j), a.cache_dtype, filled = dim);
    if (start + j + kBlockKeys < row.length) fetch(key(start + j + kBlockKeys), dim * size);
    std::fill(to + filled, to + padded, typename P::Value{});
  }
}

// Packs a group's lanes of a (T, heads, dim) tensor: as rows of values, (width, up(dim, 16)), zero padded, and as words
// along dim, (up(dim, 16) / kStep, 32), after which up to W - 1 rows of garbage are written. Prefetches the next group.
template <class P>
static INLINE void pack_lanes(const Attention& a, const Row& row, int64_t kv_head, const Group& group,
                              const void* tensor, int64_t dim, float* rows, float* columns) {
  const int64_t padded = up(dim, 16), words = padded / P::kStep, size = size_of(a.query_dtype);
  const auto lane = [&](int64_t e) {
    return static_cast<const char*>(tensor) + row.pair(e, kv_head, a.heads) * dim * size;
  };
  auto* to = reinterpret_cast<typename P::Value*>(rows);
  std::fill(to, to + group.width * padded, typename P::Value{});
  for (int64_t i = 0; i < group.count; ++i, to += padded) {
    P::put(to, lane(group.first + i), a.query_dtype, dim);
    if (const int64_t next = group.first + i + kGroupLanes; next < row.lanes()) fetch(lane(next), dim * size);
  }
  for (int64_t i = 0; i < group.width; i += W)
    for (int64_t d = 0; d < words; d += W) {
      Vec tile[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) tile[l] = load(rows + (i + l) * words + d);
      transpose(tile);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(columns + (d + l) * kGroupLanes + i, tile[l]);
    }
}

// Turns raw scores into weights, one vector of lanes at a time.
struct Softener {
  const Attention& a;
  const Group& group;
  bool sees_all;
  float scaling = static_cast<float>(a.scaling), cap = static_cast<float>(a.softcap);
  float uncap = a.softcap != 0 ? static_cast<float>(a.scaling / a.softcap) : 0;
  float kept = static_cast<float>(1 / (1 - a.dropout));
  WordVec threshold = dropout_threshold(a.dropout) - WordVec{};

  INLINE Vec masked(Vec s, int64_t key, int64_t lane) const {
    if (sees_all) return s;
    const IntVec distance = load<IntVec>(group.position + lane) - static_cast<int32_t>(key);
    IntVec seen = distance >= 0;
    if (a.window != 0) seen &= distance < static_cast<int32_t>(a.window);
    return seen ? s : splat(-INFINITY);
  }
  // 0 or 1 / (1 - dropout)
  INLINE Vec factor(int64_t key, int64_t lane) const {
    WordVec x = load<WordVec>(group.word + lane) ^ static_cast<uint32_t>(key) * kPositionStep;
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    x = (x ^ x >> 16) >> 8;
    return x >= threshold ? splat(kept) : Vec{};
  }
};

// Online softmax of one block: products q.k (keys, 32) -> weights in place, as words along the keys; per lane the
// largest score, the total of the weights, and alpha, the factor on the sums of the blocks before.
template <class P, bool CAP, bool DROP>
static void soften_block(const Softener& soft, float* scores, int64_t start, int64_t from, int64_t to, float* most,
                         float* total, float* alpha) {
  for (int64_t lane = 0; lane < soft.group.width; lane += W) {
    const Vec before = load(most + lane);
    Vec top = before, sum{};
    for (int64_t j = from; j < to; ++j) {
      Vec s = load(scores + j * kGroupLanes + lane);
      s = CAP ? soft.cap * tanh(s * soft.uncap) : s * soft.scaling;
      s = soft.masked(s, start + j, lane);
      top = larger(s, top);
      store(scores + j * kGroupLanes + lane, s);
    }
    for (int64_t j = from; j < to; j += P::kStep) {
      Vec p[P::kStep];
      for (int64_t i = 0; i < P::kStep; ++i) {
        p[i] = exp(load(scores + (j + i) * kGroupLanes + lane) - top);
        sum += p[i];
        if constexpr (DROP) p[i] *= soft.factor(start + j + i, lane);
      }
      store(scores + j / P::kStep * kGroupLanes + lane, P::word(p));
    }
    const Vec scale = exp(before - top);
    store(alpha + lane, scale);
    store(most + lane, top);
    store(total + lane, load(total + lane) * scale + sum);
  }
}

template <class P>
static void tiles_forward(const Attention& a, const Task& t, void* out, void* lse) {
  Scratch& scratch = thread_scratch();
  const Row row(a, t.b);
  const int64_t K = a.key_dim, Kp = up(K, 16), Vp = up(a.value_dim, 16), kv_head = t.first_head;
  const int64_t groups = (t.last_lane - t.first_lane + kGroupLanes - 1) / kGroupLanes, lanes = groups * kGroupLanes;
  scratch.reset(tiles_bytes(K, a.value_dim, lanes));
  float *keys = scratch.take<float>(kBlockKeys * Kp), *values = scratch.take<float>(kBlockKeys * Vp);
  float *stacked = scratch.take<float>(kBlockKeys * Vp), *scores = scratch.take<float>(kBlockKeys * kGroupLanes);
  float *query = scratch.take<float>(lanes * Kp), *sums = scratch.take<float>(lanes * Vp);
  float *most = scratch.take<float>(lanes), *total = scratch.take<float>(lanes);
  float *alpha = scratch.take<float>(kGroupLanes), *rows = scratch.take<float>(kGroupLanes * Kp);

  std::fill(sums, sums + lanes * Vp, 0.0f);
  // Below every finite score, but not -inf: exp(most - top) must be 0 or 1, never NaN, before any key has been seen.
  std::fill(most, most + lanes, std::numeric_limits<float>::lowest());
  std::fill(total, total + lanes, 0.0f);
  for (int64_t g = 0; g < groups; ++g)
    pack_lanes<P>(a, row, kv_head, Group(a, row, t, g), a.query, K, rows, query + g * kGroupLanes * Kp);
  const bool cap = a.softcap != 0, drop = a.dropout > 0;
  auto soften = cap ? (drop ? soften_block<P, true, true> : soften_block<P, true, false>)
                    : (drop ? soften_block<P, false, true> : soften_block<P, false, false>);
  const int64_t seen_from = row.first_seen(t.first_lane), seen_to = row.position(t.last_lane - 1) + 1;
  for (int64_t start = seen_from / kBlockKeys * kBlockKeys; start < seen_to; start += kBlockKeys) {
    const int64_t count = std::min(kBlockKeys, seen_to - start);
    pack_block<P>(a, row, kv_head, a.keys, K, start, count, keys);
    pack_block<P>(a, row, kv_head, a.values, a.value_dim, start, count, values);
    const float* value_words = stack<P>(values, up(count, MR), Vp, stacked);
    for (int64_t g = 0; g < groups; ++g) {
      const Group group(a, row, t, g);
      int64_t from, to;
      group.range(start, count, from, to);
      if (from >= to) continue;
      for (int64_t j = from; j < to; j += MR)
        strip<P, true, Start::zero>(keys + j * Kp / P::kStep, Kp / P::kStep, query + g * kGroupLanes * Kp, kGroupLanes,
                                    scores + j * kGroupLanes, kGroupLanes, group.width, 0, K);
      const Softener soft{a, group, group.sees_all(row, start, from, to)};
      const int64_t at = g * kGroupLanes;
      soften(soft, scores, start, from, to, most + at, total + at, alpha);
      for (int64_t i = 0; i < group.width; i += MR) {
        const int64_t end = std::min<int64_t>(to, group.position[i + MR - 1] + 1 - start);
        strip<P, false, Start::scaled>(scores + i, kGroupLanes, value_words, Vp, sums + (at + i) * Vp, Vp, Vp, from,
                                       std::max(from, end), alpha + i);
      }
    }
  }
  for (int64_t e = t.first_lane; e < t.last_lane; ++e) {
    const int64_t i = e - t.first_lane, pair = row.pair(e, kv_head, a.heads);
    narrow(static_cast<char*>(out) + pair * a.value_dim * size_of(a.query_dtype), sums + i * Vp, 1 / total[i],
           a.query_dtype, a.value_dim);
    static_cast<float*>(lse)[pair] = most[i] + std::log(total[i]);
  }
}
