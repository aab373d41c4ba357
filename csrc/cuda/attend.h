// The attention phase of the persistent kernel: one query head of one row over one split of its cache at a time.
//
//     s_j = scaling q.k_j,  top = max s_j,  partial = sum exp(s_j - top) v_j,  stats = (top, sum exp(s_j - top))
//
// for the split's positions j that the query sees. q and the token's own key are normed and rotated here; the block
// that has the last split of a kv head's first query appends key and value to the cache. All blocks take them from the
// projection, rounded as the cache stores them, so that none waits for the append. The next phase combines the splits.
//
// Each of the grouped heads reads the same keys and values, from L2: at batch 1 this keeps 32 blocks busy instead of 8;
// with 4 rows it costs about 2.5 us per layer on a Llama-1B shape with 400 tokens, beside 30 for weights (predicted).
#pragma once

#include "cuda/device.h"
#include "cuda/linear.h"
#include "cuda/program.h"

namespace coconut_fast {

// The first position that a query at `position` sees, and the first and last split of those it sees.
struct Splits {
  int low, first, last;
  __device__ Splits(int position, int window) {
    low = window && position >= window ? position + 1 - window : 0;
    first = low / kSplit, last = position / kSplit;
  }
};

// Shared memory of this phase, in floats.
static inline __host__ __device__ int attend_floats(int head_dim, int threads) {
  return 8 * threads + (2 + head_dim) * (threads / kWarp);
}

// The warps take turns through a split's positions, each loading kHeld times 32 x 16 bytes of keys and of values at a
// time. Lanes that share a position hold 16 bytes of it each and keep their own top, total and sums, joined at the end.
template <class T>
struct DecodeAttention {
  static constexpr int V = kVector<T>, kHeld = 2;
  const Arguments& a;
  const Layer& layer;
  const int32_t* pages;  // of the row
  float* shared;
  int head, kv_head, position, i, turn, step;  // i: the lane's first element; turn: its position in a round of `step`
  int lanes, head_dim, page_size, thread;
  uint4 keys[kHeld], values[kHeld];

  __device__ __forceinline__ DecodeAttention(const Arguments& a, const Layer& layer, float* shared)
      : a(a), layer(layer), shared(shared), head_dim(opaque(a.head_dim)), page_size(opaque(a.page_size)),
        thread(opaque(threadIdx.x)) {
    int bits = 0;
#pragma unroll 1
    while (V << bits < head_dim) ++bits;
    lanes = 1 << bits, i = (thread & (lanes - 1)) * V, turn = thread >> bits, step = int(blockDim.x) >> bits;
  }

  __device__ __forceinline__ void place(int query_head, int at_position, const int32_t* row_pages) {
    head = query_head, kv_head = head / (a.heads / a.kv_heads), position = at_position, pages = row_pages;
  }

  // The offset of the lane's 16 bytes of position j, in elements.
  __device__ __forceinline__ size_t at(int j) const {
    const int slot = pages[j / page_size] * page_size + j % page_size;
    return (size_t(slot) * a.kv_heads + kv_head) * head_dim + i;
  }

  // Loads keys and values of the positions from `from` on that are in the cache.
  __device__ __forceinline__ void load(int from) {
#pragma unroll
    for (int h = 0; h < kHeld; ++h) {
      const int j = from + h * step + turn;
      keys[h] = values[h] = uint4{};
      if (j >= position || i >= head_dim) continue;
      const size_t where = at(j);
      keys[h] = *reinterpret_cast<const uint4*>(static_cast<const T*>(layer.keys) + where);
      values[h] = *reinterpret_cast<const uint4*>(static_cast<const T*>(layer.values) + where);
    }
  }

  // The lane's elements of a vector; zero beyond the end.
  __device__ __forceinline__ void piece(const float* from, float (&to)[V]) const {
#pragma unroll
    for (int u = 0; u < V; u += 4) put4(i < head_dim ? load4(from + i + u) : float4{}, to + u);
  }

  // to = rotated(normed(from)) * factor: the lane's elements of a head. Halves meet at a multiple of four.
  __device__ __forceinline__ void rotate(const float* from, const void* weight, float factor, float (&to)[V]) const {
    const int half = head_dim / 2, i = opaque(this->i);
    const T* norm = static_cast<const T*>(weight);
    piece(from, to);
    float scale = 1.0f;
    if (norm) {
      float squares = 0;
#pragma unroll
      for (int u = 0; u < V; ++u) squares = fmaf(to[u], to[u], squares);
#pragma unroll 1
      for (int mask = lanes / 2; mask > 0; mask /= 2) squares += shuffle_xor(squares, mask);
      scale = rsqrtf(squares / head_dim + a.eps);
    }
#pragma unroll
    for (int u = 0; u < V; u += 4) {
      const int d = i + u;
      if (d >= head_dim) break;
      const bool first = d < half;
      const int low = first ? d : d - half, other = first ? d + half : low;
      float by[4], far[4], cos[4] = {1.0f, 1.0f, 1.0f, 1.0f}, sin[4] = {};
      put4(norm ? load4(norm + d) : float4{1.0f, 1.0f, 1.0f, 1.0f}, by);
#pragma unroll
      for (int e = 0; e < 4; ++e) to[u + e] *= scale * by[e] * factor;
      if (!a.cos) continue;
      put4(norm ? load4(norm + other) : float4{1.0f, 1.0f, 1.0f, 1.0f}, by), put4(load4(from + other), far);
      put4(load4(a.cos + size_t(position) * half + low), cos), put4(load4(a.sin + size_t(position) * half + low), sin);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float turned = far[e] * (scale * by[e] * factor) * sin[e];
        to[u + e] = fmaf(to[u + e], cos[e], first ? -turned : turned);
      }
    }
  }

  // Split `split` of batch row m, whose first keys and values have been loaded.
  __device__ __forceinline__ void run(int m, int split, const Splits& seen) {
    const int n = head_dim, group = a.heads / a.kv_heads, lane = thread % kWarp, warp = thread / kWarp;
    const float* fused = a.qkv + size_t(m) * (a.heads + 2 * a.kv_heads) * n;
    float query[V];
    uint4* stash = reinterpret_cast<uint4*>(shared) + thread;
    if (split == seen.last) {  // the token's own key and value, rounded as the cache stores them
      const float* own = fused + (a.heads + kv_head) * n;
      rotate(own, layer.k_norm, 1.0f, query);
      const uint4 own_key = pack<T>(query);
      piece(own + a.kv_heads * n, query);
      const uint4 own_value = pack<T>(query);
      stash[0] = own_key, stash[blockDim.x] = own_value;
      if (turn == 0 && i < n && head % group == 0) {
        const size_t where = at(position);
        *reinterpret_cast<uint4*>(static_cast<T*>(layer.keys) + where) = own_key;
        *reinterpret_cast<uint4*>(static_cast<T*>(layer.values) + where) = own_value;
      }
    }
    rotate(fused + head * n, layer.q_norm, layer.scaling, query);
    float top = -INFINITY, total = 0, sum[V] = {};
    const int to = min(position + 1, (split + 1) * kSplit);
#pragma unroll 1
    for (int from = split * kSplit; from < to; from += kHeld * step) {
      if (from > split * kSplit) load(from);
      float score[kHeld], best = top;
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int j = from + h * step + turn;
        if (j == position && split == seen.last) keys[h] = stash[0], values[h] = stash[blockDim.x];
        float x[V];
        spread<T>(keys[h], x), score[h] = 0;
#pragma unroll
        for (int u = 0; u < V; ++u) score[h] = fmaf(query[u], x[u], score[h]);
      }
#pragma unroll 1
      for (int mask = lanes / 2; mask > 0; mask /= 2)
#pragma unroll
        for (float& each : score) each += shuffle_xor(each, mask);
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const int j = from + h * step + turn;
        if (j < seen.low || j >= to) score[h] = -INFINITY;
        best = fmaxf(best, score[h]);
      }
      const float shrink = top == best ? 1.0f : expf(top - best);
      top = best, total *= shrink;
#pragma unroll
      for (int u = 0; u < V; ++u) sum[u] *= shrink;
#pragma unroll
      for (int h = 0; h < kHeld; ++h) {
        const float weight = score[h] == -INFINITY ? 0.0f : expf(score[h] - top);
        float x[V];
        spread<T>(values[h], x);
        total += weight;
#pragma unroll
        for (int u = 0; u < V; ++u) sum[u] = fmaf(weight, x[u], sum[u]);
      }
    }
    join(lane, warp, top, total, sum, (size_t(m) * a.heads + head) * a.splits + split);
  }

 private:
  // Combines the lanes' and warps' results for a split into partial and stats.
  __device__ __forceinline__ void join(int lane, int warp, float top, float total, float (&sum)[V], size_t index) {
    const int n = head_dim, warps = blockDim.x / kWarp;
    float *tops = shared + 8 * blockDim.x, *totals = tops + warps, *sums = totals + warps;
    float best = top;
#pragma unroll 1
    for (int mask = kWarp / 2; mask >= lanes; mask /= 2) best = fmaxf(best, shuffle_xor(best, mask));
    const float shrink = top == best ? 1.0f : expf(top - best);
    total *= shrink;
#pragma unroll
    for (float& each : sum) each *= shrink;
#pragma unroll 1
    for (int mask = kWarp / 2; mask >= lanes; mask /= 2) {
      total += shuffle_xor(total, mask);
#pragma unroll
      for (float& each : sum) each += shuffle_xor(each, mask);
    }
    if (lane < lanes && i < n)
#pragma unroll
      for (int u = 0; u < V; ++u) sums[warp * n + i + u] = sum[u];
    if (lane == 0) tops[warp] = best, totals[warp] = total;
    __syncthreads();
    for (int d = thread; d < n; d += blockDim.x) {
      float highest = tops[0], all = 0, found = 0;
#pragma unroll 4
      for (int w = 1; w < warps; ++w) highest = fmaxf(highest, tops[w]);
#pragma unroll 4
      for (int w = 0; w < warps; ++w) {
        const float weight = tops[w] == highest ? 1.0f : expf(tops[w] - highest);
        all = fmaf(weight, totals[w], all), found = fmaf(weight, sums[w * n + d], found);
      }
      a.partial[index * n + d] = found;
      if (d == 0) a.stats[2 * index] = highest, a.stats[2 * index + 1] = all;
    }
    __syncthreads();  // before the next split
  }
};

// Elements [k, k + V) of a row's attention output, of one head, the splits combined in order.
template <int V>
static __device__ __forceinline__ void combined(const Arguments& a, int m, int k, const Splits& seen, float (&x)[V]) {
  const size_t head = (size_t(m) * a.heads + k / a.head_dim) * a.splits;
  const float *stats = a.stats + 2 * head, *partial = a.partial + head * a.head_dim + k % a.head_dim;
  float top = stats[2 * seen.first], total = stats[2 * seen.first + 1];
#pragma unroll
  for (int v = 0; v < V; v += 4) put4(load4(partial + size_t(seen.first) * a.head_dim + v), x + v);
#pragma unroll 1
  for (int s = seen.first + 1; s <= seen.last; ++s) {
    const float next = stats[2 * s], best = fmaxf(top, next), old = expf(top - best), weight = expf(next - best);
    top = best, total = fmaf(weight, stats[2 * s + 1], total * old);
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      float part[4];
      put4(load4(partial + size_t(s) * a.head_dim + v), part);
#pragma unroll
      for (int e = 0; e < 4; ++e) x[v + e] = fmaf(weight, part[e], x[v + e] * old);
    }
  }
  const float share = 1.0f / total;
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] *= share;
}

}  // namespace coconut_fast
