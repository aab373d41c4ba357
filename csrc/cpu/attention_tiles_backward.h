// The derivative of attention_tiles.h: weights are recomputed from lse, delta = dO . O. One task is one kv head of a
// row, all its lanes in rising order, so that dK and dV are summed in one fixed order.
// Included once per instruction set after attention_tiles.h.

// One block of keys against one lane group, (keys, 32) each: the products q.k; dP, later overwritten by the score
// gradients as words along the keys; weights (times the dropout factor) and score gradients as rows of values.
struct BlockGrads {
  float *scores, *slopes, *weight_rows, *slope_rows;
};

template <class P, bool CAP, bool DROP>
static void soften_block_backward(const Softener& soft, const BlockGrads& block, int64_t start, int64_t from,
                                  int64_t to, const float* lse, const float* delta) {
  auto* weight_rows = reinterpret_cast<typename P::Value*>(block.weight_rows);
  auto* slope_rows = reinterpret_cast<typename P::Value*>(block.slope_rows);
  for (int64_t lane = 0; lane < soft.group.width; lane += W) {
    const Vec l = load(lse + lane), d = load(delta + lane);
    for (int64_t j = from; j < to; j += P::kStep) {
      Vec ds[P::kStep];
      for (int64_t i = 0; i < P::kStep; ++i) {
        const int64_t at = (j + i) * kGroupLanes + lane;
        Vec s = load(block.scores + at), dp = load(block.slopes + at), slope = splat(1);
        if constexpr (CAP) {
          const Vec bent = tanh(s * soft.uncap);
          s = soft.cap * bent;
          slope = 1.0f - bent * bent;
        } else {
          s *= soft.scaling;
        }
        const Vec p = exp(soft.masked(s, start + j + i, lane) - l);
        Vec kept = p;
        if constexpr (DROP) {
          const Vec factor = soft.factor(start + j + i, lane);
          dp *= factor;
          kept *= factor;
        }
        ds[i] = p * (dp - d) * slope;
        P::put(weight_rows + at, kept);
        P::put(slope_rows + at, ds[i]);
      }
      if constexpr (P::kStep > 1) store(block.slopes + j / P::kStep * kGroupLanes + lane, P::word(ds));
    }
  }
}

// The state of one lane group across the blocks of keys: query and dO as words along their dims and as words along the
// lanes, dQ, lse and delta.
template <class P>
struct GroupGrads {
  float *query, *query_rows, *dout, *dout_rows, *dquery, *lse, *delta;

  static int64_t size(const Attention& a) {
    return kGroupLanes * (3 * up(a.key_dim, 16) + 2 * up(a.value_dim, 16) + 2);
  }

  GroupGrads(const Attention& a, float* memory) {
    auto take = [&memory](int64_t width) { return std::exchange(memory, memory + width * kGroupLanes); };
    const int64_t Kp = up(a.key_dim, 16), Vp = up(a.value_dim, 16);
    query = take(Kp), query_rows = take(Kp), dout = take(Vp), dout_rows = take(Vp), dquery = take(Kp);
    lse = take(1), delta = take(1);
  }

  // rows, columns: space for one more packed tensor of the group
  void pack(const Attention& a, const Row& row, const AttentionGrads& grads, int64_t kv_head, const Group& group,
            float* rows, float* columns) const {
    const int64_t dim = a.value_dim;
    auto pack = [&](const void* tensor, int64_t dim, float* along_lanes, float* along_dim) {
      float* packed = P::kStep == 1 ? along_lanes : rows;
      pack_lanes<P>(a, row, kv_head, group, tensor, dim, packed, along_dim);
      stack<P>(packed, group.width, up(dim, 16), along_lanes);
    };
    pack(a.query, a.key_dim, query_rows, query);
    pack(grads.grad_out, dim, dout_rows, dout);
    pack_lanes<P>(a, row, kv_head, group, grads.out, dim, rows, columns);
    std::fill(dquery, dquery + kGroupLanes * up(a.key_dim, 16), 0.0f);
    const auto* given = static_cast<const float*>(grads.lse);
    for (int64_t i = 0; i < group.width; ++i)
      lse[i] = i < group.count ? given[row.pair(group.first + i, kv_head, a.heads)] : INFINITY;  // weights become 0
    // Summed in the order of dP = V dO: where one weight is 1 and out is its value, dP - delta is exactly 0.
    for (int64_t i = 0; i < group.width; i += W) {
      Vec sum{};
      for (int64_t d = 0; d < dim; d += P::kStep) {
        const int64_t at = d / P::kStep * kGroupLanes + i;
        sum = P::add_product(sum, load(columns + at), load(dout + at));
      }
      store(delta + i, sum);
    }
  }
};

// Adds rows [first, count) of a block (up(dim, 16) wide), times factor, to one head's rows of dK or dV.
static INLINE void add_block(const Attention& a, const Row& row, int64_t kv_head, const float* block, int64_t dim,
                             float factor, int64_t start, int64_t first, int64_t count, void* tensor) {
  for (int64_t j = first; j < count; ++j)
    add_scaled(static_cast<float*>(tensor) + (row.slot(start + j) * a.kv_heads + kv_head) * dim, factor,
               block + j * up(dim, 16), dim);
}

template <class P>
static void tiles_backward(const Attention& a, const Task& t, const AttentionGrads& grads) {
  Scratch& scratch = thread_scratch();
  const Row row(a, t.b);
  const int64_t K = a.key_dim, Kp = up(K, 16), Kv = a.value_dim, Vp = up(Kv, 16), kv_head = t.first_head;
  const int64_t widest = std::max(Kp, Vp), kept_size = GroupGrads<P>::size(a);
  constexpr int64_t groups = kChunkLanes / kGroupLanes, lanes = kGroupLanes, step = P::kStep;
  scratch.reset((kBlockKeys * (3 * Kp + 2 * Vp + 4 * lanes) + 2 * lanes * widest + groups * kept_size) * 4 + 12 * 64);
  float *keys = scratch.take<float>(kBlockKeys * Kp), *dkeys = scratch.take<float>(kBlockKeys * Kp);
  float *values = scratch.take<float>(kBlockKeys * Vp), *dvalues = scratch.take<float>(kBlockKeys * Vp);
  float* stacked = scratch.take<float>(kBlockKeys * Kp);
  float *scores = scratch.take<float>(kBlockKeys * lanes), *slopes = scratch.take<float>(kBlockKeys * lanes);
  float* weight_rows = step == 1 ? scores : scratch.take<float>(kBlockKeys * lanes);
  float* slope_rows = step == 1 ? slopes : scratch.take<float>(kBlockKeys * lanes);
  const BlockGrads block{scores, slopes, weight_rows, slope_rows};
  float *rows = scratch.take<float>(lanes * widest), *columns = scratch.take<float>(lanes * widest);
  float* kept = scratch.take<float>(groups * kept_size);
  const bool cap = a.softcap != 0, drop = a.dropout > 0;
  auto soften = cap ? (drop ? soften_block_backward<P, true, true> : soften_block_backward<P, true, false>)
                    : (drop ? soften_block_backward<P, false, true> : soften_block_backward<P, false, false>);

  for (int64_t lane = t.first_lane; lane < t.last_lane; lane += kChunkLanes) {
    const Task chunk{t.b, kv_head, kv_head + 1, lane, std::min(lane + kChunkLanes, t.last_lane), true};
    const int64_t used = (chunk.last_lane - lane + lanes - 1) / lanes;
    for (int64_t g = 0; g < used; ++g)
      GroupGrads<P>(a, kept + g * kept_size).pack(a, row, grads, kv_head, Group(a, row, chunk, g), rows, columns);
    const int64_t seen_from = row.first_seen(lane), seen_to = row.position(chunk.last_lane - 1) + 1;
    for (int64_t start = seen_from / kBlockKeys * kBlockKeys; start < seen_to; start += kBlockKeys) {
      const int64_t count = std::min(kBlockKeys, seen_to - start);
      pack_block<P>(a, row, kv_head, a.keys, K, start, count, keys);
      pack_block<P>(a, row, kv_head, a.values, Kv, start, count, values);
      const float* key_words = stack<P>(keys, up(count, MR), Kp, stacked);
      const int64_t kept_from = std::clamp<int64_t>(grads.from(t.b) - start, 0, count);
      // Prefetch what add_block adds to: waiting for it was a sixth of a tail's time.
      for (int64_t j = start + kept_from; j < start + count; ++j) {
        const int64_t at = row.slot(j) * a.kv_heads + kv_head;
        fetch(static_cast<const float*>(grads.grad_keys) + at * K, K * 4);
        fetch(static_cast<const float*>(grads.grad_values) + at * Kv, Kv * 4);
      }
      std::fill(dkeys, dkeys + kBlockKeys * Kp, 0.0f);
      std::fill(dvalues, dvalues + kBlockKeys * Vp, 0.0f);
      for (int64_t g = 0; g < used; ++g) {
        const Group group(a, row, chunk, g);
        const GroupGrads<P> mine(a, kept + g * kept_size);
        int64_t from, to;
        group.range(start, count, from, to);
        if (from >= to) continue;
        for (int64_t j = from; j < to; j += MR) {
          strip<P, true, Start::zero>(keys + j * Kp / step, Kp / step, mine.query, lanes, scores + j * lanes, lanes,
                                      group.width, 0, K);
          strip<P, true, Start::zero>(values + j * Vp / step, Vp / step, mine.dout, lanes, slopes + j * lanes, lanes,
                                      group.width, 0, Kv);
        }
        const Softener soft{a, group, group.sees_all(row, start, from, to)};
        soften(soft, block, start, from, to, mine.lse, mine.delta);
        for (int64_t j = std::max(from, kept_from / MR * MR); j < to; j += MR) {
          // Lanes before `first` have positions before all of these keys.
          const int64_t first = std::max<int64_t>(0, row.first_lane(start + j) - group.first);
          strip<P, true, Start::add>(weight_rows + j * lanes / step, lanes / step, mine.dout_rows, Vp,
                                     dvalues + j * Vp, Vp, Vp, first, group.width);
          strip<P, true, Start::add>(slope_rows + j * lanes / step, lanes / step, mine.query_rows, Kp,
                                     dkeys + j * Kp, Kp, Kp, first, group.width);
        }
        for (int64_t i = 0; i < group.width; i += MR) {
          const int64_t end = std::min<int64_t>(to, group.position[i + MR - 1] + 1 - start);
          strip<P, false, Start::add>(slopes + i, lanes, key_words, Kp, mine.dquery + i * Kp, Kp, Kp, from,
                                      std::max(from, end));
        }
      }
      add_block(a, row, kv_head, dkeys, K, static_cast<float>(a.scaling), start, kept_from, count, grads.grad_keys);
      add_block(a, row, kv_head, dvalues, Kv, 1.0f, start, kept_from, count, grads.grad_values);
    }
    for (int64_t e = lane; e < chunk.last_lane; ++e) {
      const GroupGrads<P> mine(a, kept + (e - lane) / lanes * kept_size);
      const int64_t pair = row.pair(e, kv_head, a.heads);
      narrow(static_cast<char*>(grads.grad_query) + pair * K * size_of(a.query_dtype),
             mine.dquery + (e - lane) % lanes * Kp, static_cast<float>(a.scaling), a.query_dtype, K);
    }
  }
}
