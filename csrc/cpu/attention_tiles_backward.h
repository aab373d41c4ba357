// The derivative of attention_tiles.h: weights are recomputed from lse, delta = dO . O. One task is one kv head of a
// row, all its lanes in rising order, so that dK and dV are summed in one fixed order.
// Included once per instruction set after attention_tiles.h.

// Scores (keys, 32) -> weights (times the dropout factor), dP -> score gradients, both in place.
template <bool CAP, bool DROP>
static void soften_block_backward(const Softener& soft, float* scores, float* grads, int64_t start, int64_t from,
                                  int64_t to, const float* lse, const float* delta) {
  for (int64_t lane = 0; lane < soft.group.width; lane += W) {
    const Vec l = load(lse + lane), d = load(delta + lane);
    for (int64_t j = from; j < to; ++j) {
      float *s_at = scores + j * kGroupLanes + lane, *g_at = grads + j * kGroupLanes + lane;
      Vec s = load(s_at), dp = load(g_at), slope = splat(1);
      if constexpr (CAP) {
        const Vec bent = tanh(s * soft.uncap);
        s = soft.cap * bent;
        slope = 1.0f - bent * bent;
      }
      const Vec p = exp(soft.masked(s, start + j, lane) - l);
      Vec kept = p;
      if constexpr (DROP) {
        const Vec factor = soft.factor(start + j, lane);
        dp *= factor;
        kept *= factor;
      }
      store(s_at, kept);
      store(g_at, p * (dp - d) * slope);
    }
  }
}

// What one lane group keeps while the blocks of keys go by: the query (scaled) and dO, transposed and as rows, dQ.
struct GroupGrads {
  float *query, *query_rows, *dout, *dout_rows, *dquery, *lse, *delta;

  static int64_t size(const Attention& a) {
    return kGroupLanes * (a.key_dim + 2 * up(a.key_dim, 16) + a.value_dim + up(a.value_dim, 16) + 2);
  }

  GroupGrads(const Attention& a, float* memory) {
    auto take = [&memory](int64_t width) { return std::exchange(memory, memory + width * kGroupLanes); };
    query = take(a.key_dim), query_rows = take(up(a.key_dim, 16)), dout = take(a.value_dim);
    dout_rows = take(up(a.value_dim, 16)), dquery = take(up(a.key_dim, 16)), lse = take(1), delta = take(1);
  }

  // rows, columns: space for a group's share of out
  void pack(const Attention& a, const Row& row, const AttentionGrads& grads, int64_t kv_head, const Group& group,
            float* rows, float* columns) const {
    const int64_t dim = a.value_dim;
    pack_lanes(a, row, kv_head, group, a.query, a.key_dim, static_cast<float>(a.scaling), query_rows, query);
    pack_lanes(a, row, kv_head, group, grads.grad_out, dim, 1, dout_rows, dout);
    pack_lanes(a, row, kv_head, group, grads.out, dim, 1, rows, columns);
    std::fill(dquery, dquery + kGroupLanes * up(a.key_dim, 16), 0.0f);
    const auto* given = static_cast<const float*>(grads.lse);
    for (int64_t i = 0; i < group.width; ++i)
      lse[i] = i < group.count ? given[row.pair(group.first + i, kv_head, a.heads)] : INFINITY;  // weights become 0
    // In the order of the product dP = V dO: where one weight is 1 and out is its value, dP - delta is exactly 0.
    for (int64_t i = 0; i < group.width; i += W) {
      Vec sum{};
      for (int64_t d = 0; d < dim; ++d) sum += load(columns + d * kGroupLanes + i) * load(dout + d * kGroupLanes + i);
      store(delta + i, sum);
    }
  }
};

// Adds the first `count` rows of a block (up(dim, 16) wide) to one head's rows of dK or dV.
static INLINE void add_block(const Attention& a, const Row& row, int64_t kv_head, const float* block, int64_t dim,
                             int64_t start, int64_t count, void* tensor) {
  for (int64_t j = 0; j < count; ++j)
    add_scaled(static_cast<float*>(tensor) + (row.slot(start + j) * a.kv_heads + kv_head) * dim, 1.0f,
               block + j * up(dim, 16), dim);
}

static void tiles_backward(const Attention& a, const Task& t, const AttentionGrads& grads) {
  static thread_local Scratch scratch;
  const Row row(a, t.b);
  const int64_t K = a.key_dim, Kp = up(K, 16), Kv = a.value_dim, Vp = up(Kv, 16), kv_head = t.first_head;
  constexpr int64_t groups = kChunkLanes / kGroupLanes, lanes = kGroupLanes;
  scratch.reset((kBlockKeys * 2 * (Kp + Vp + lanes) + lanes * (Vp + Kv) + groups * GroupGrads::size(a)) * 4 + 9 * 64);
  float *keys = scratch.take<float>(kBlockKeys * Kp), *dkeys = scratch.take<float>(kBlockKeys * Kp);
  float *values = scratch.take<float>(kBlockKeys * Vp), *dvalues = scratch.take<float>(kBlockKeys * Vp);
  float *weights = scratch.take<float>(kBlockKeys * lanes), *slopes = scratch.take<float>(kBlockKeys * lanes);
  float *out_rows = scratch.take<float>(lanes * Vp), *out_columns = scratch.take<float>(lanes * Kv);
  float* kept = scratch.take<float>(groups * GroupGrads::size(a));
  const bool cap = a.softcap != 0, drop = a.dropout > 0;
  auto soften = cap ? (drop ? soften_block_backward<true, true> : soften_block_backward<true, false>)
                    : (drop ? soften_block_backward<false, true> : soften_block_backward<false, false>);

  for (int64_t lane = t.first_lane; lane < t.last_lane; lane += kChunkLanes) {
    const Task chunk{t.b, kv_head, kv_head + 1, lane, std::min(lane + kChunkLanes, t.last_lane), true};
    const int64_t used = (chunk.last_lane - lane + lanes - 1) / lanes;
    for (int64_t g = 0; g < used; ++g)
      GroupGrads(a, kept + g * GroupGrads::size(a))
          .pack(a, row, grads, kv_head, Group(a, row, chunk, g), out_rows, out_columns);
    const int64_t seen_from = row.first_seen(lane), seen_to = row.position(chunk.last_lane - 1) + 1;
    for (int64_t start = seen_from / kBlockKeys * kBlockKeys; start < seen_to; start += kBlockKeys) {
      const int64_t count = std::min(kBlockKeys, seen_to - start);
      pack_block(a, row, kv_head, a.keys, K, start, count, keys);
      pack_block(a, row, kv_head, a.values, Kv, start, count, values);
      std::fill(dkeys, dkeys + kBlockKeys * Kp, 0.0f);
      std::fill(dvalues, dvalues + kBlockKeys * Vp, 0.0f);
      for (int64_t g = 0; g < used; ++g) {
        const Group group(a, row, chunk, g);
        const GroupGrads mine(a, kept + g * GroupGrads::size(a));
        int64_t from, to;
        group.range(start, count, from, to);
        if (from >= to) continue;
        for (int64_t j = from; j < to; j += MR) {
          strip<true, Start::zero>(keys + j * Kp, Kp, mine.query, lanes, weights + j * lanes, lanes, group.width,
                                   0, K);
          strip<true, Start::zero>(values + j * Vp, Vp, mine.dout, lanes, slopes + j * lanes, lanes, group.width,
                                   0, Kv);
        }
        const Softener soft{a, group, group.sees_all(row, start, from, to)};
        soften(soft, weights, slopes, start, from, to, mine.lse, mine.delta);
        for (int64_t j = from; j < to; j += MR) {
          // Lanes before `first` stand before all of these keys.
          const int64_t first = std::max<int64_t>(0, row.first_lane(start + j) - group.first);
          strip<true, Start::add>(weights + j * lanes, lanes, mine.dout_rows, Vp, dvalues + j * Vp, Vp, Vp, first,
                                  group.width);
          strip<true, Start::add>(slopes + j * lanes, lanes, mine.query_rows, Kp, dkeys + j * Kp, Kp, Kp, first,
                                  group.width);
        }
        for (int64_t i = 0; i < group.width; i += MR) {
          const int64_t end = std::min<int64_t>(to, group.position[i + MR - 1] + 1 - start);
          strip<false, Start::add>(slopes + i, lanes, keys, Kp, mine.dquery + i * Kp, Kp, Kp, from,
                                   std::max(from, end));
        }
      }
      add_block(a, row, kv_head, dkeys, K, start, count, grads.grad_keys);
      add_block(a, row, kv_head, dvalues, Kv, start, count, grads.grad_values);
    }
    for (int64_t e = lane; e < chunk.last_lane; ++e) {
      const GroupGrads mine(a, kept + (e - lane) / lanes * GroupGrads::size(a));
      const int64_t pair = row.pair(e, kv_head, a.heads);
      narrow(static_cast<char*>(grads.grad_query) + pair * K * size_of(a.query_dtype),
             mine.dquery + (e - lane) % lanes * Kp, static_cast<float>(a.scaling), a.query_dtype, K);
    }
  }
}
