// The attention phase of the persistent kernel: one query head of one row over one split of its cache at a time.
//
//     s_j = scaling q.k_j,  top = max s_j,  partial = sum exp(s_j - top) v_j,  stats = (top, sum exp(s_j - top))
//
// for the split's positions j that the query sees. q and the token's own key are normed and rotated here; the block
// that has the last split of a kv head's first query appends key and value to the cache, and the others take them from
// the projection as well, rounded as the cache holds them: nobody waits for the append. The next phase adds the splits
// up.
//
// Grouped heads read the same keys and values each for itself, from L2: at batch 1 that makes 32 blocks busy where 8
// would be; at batch 8 it costs about 5 us a layer on a Llama-1B shape with 400 tokens, beside 30 us of weights
// (predicted).
#pragma once

#include "cuda/device.h"
#include "cuda/linear.h"
#include "cuda/program.h"

namespace coconut_fast {

// The splits that a query at `position` sees, and the first position of the first.
struct Splits {
  int low, first, last;
  __device__ Splits(int position, int window) {
    low = window && position >= window ? position + 1 - window : 0;
    first = low / kSplit, last = position / kSplit;
  }
};

// Shared memory of this phase, in floats.
static inline __host__ __device__ int attend_floats(int head_dim, int threads) {
  return 2 * kSplit + (3 + threads / kWarp) * head_dim;
}

template <class T>
struct Attend {
  static constexpr int V = kVector<T>;
  const Arguments& a;
  const Layer& layer;
  float *query, *key, *value, *scores, *sums;  // shared memory
  int32_t* slots;                              // of the split's positions, in shared memory
  int lanes;                                   // that share a position: 16 bytes of it each

  __device__ Attend(const Arguments& a, const Layer& layer, float* shared) : a(a), layer(layer) {
    slots = reinterpret_cast<int32_t*>(shared), scores = shared + kSplit;
    query = scores + kSplit, key = query + a.head_dim, value = key + a.head_dim, sums = value + a.head_dim;
    lanes = 1;
    while (lanes < kWarp && lanes * V < a.head_dim) lanes *= 2;
  }

  __device__ int32_t slot_of(int m, int position) const {
    const int32_t* pages = a.page_table + size_t(a.rows[m]) * a.pages_per_row;
    return pages[position / a.page_size] * a.page_size + position % a.page_size;
  }

  // to = rotated(normed(from)) * factor, by one warp.
  __device__ void rotate(const float* from, const void* weight, int position, float factor, float* to) const {
    const int half = a.head_dim / 2, lane = threadIdx.x % kWarp;
    const T* norm = static_cast<const T*>(weight);
    float scale = 1.0f;
    if (norm) {
      float squares = 0;
      for (int i = lane; i < a.head_dim; i += kWarp) squares = fmaf(from[i], from[i], squares);
      scale = 1.0f / sqrtf(warp_sum(squares) / a.head_dim + a.eps);
    }
    for (int i = lane; i < half; i += kWarp) {
      float low = from[i] * scale, high = from[half + i] * scale;
      if (norm) low *= to_float(norm[i]), high *= to_float(norm[half + i]);
      if (a.cos) {
        const float cos = a.cos[size_t(position) * half + i], sin = a.sin[size_t(position) * half + i];
        const float turned = low * cos - high * sin;
        high = high * cos + low * sin, low = turned;
      }
      to[i] = low * factor, to[half + i] = high * factor;
    }
  }

  // Split `split` of head `head` of batch row m, whose token stands at `position`.
  // What the next call overwrites first, the last one has read before its last __syncthreads.
  __device__ void run(int m, int head, int split, const Splits& seen, int position) {
    const int n = a.head_dim, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp, lane = threadIdx.x % kWarp;
    const int group = a.heads / a.kv_heads, kv_head = head / group;
    const int from = max(seen.low, split * kSplit), to = min(position + 1, (split + 1) * kSplit);
    const float* fused = a.qkv + size_t(m) * (a.heads + 2 * a.kv_heads) * n;
    for (int j = from + threadIdx.x; j < to; j += blockDim.x) slots[j - from] = slot_of(m, j);
    if (warp == 0) rotate(fused + head * n, layer.q_norm, position, layer.scaling, query);
    if (warp == warps - 1 && split == seen.last) {
      const float* own = fused + (a.heads + kv_head) * n;
      rotate(own, layer.k_norm, position, 1.0f, key);
      __syncwarp();
      for (int i = lane; i < n; i += kWarp) {
        const T k = from_float<T>(key[i]), v = from_float<T>(own[a.kv_heads * n + i]);
        key[i] = to_float(k), value[i] = to_float(v);
        if (head % group) continue;
        const size_t at = (size_t(slot_of(m, position)) * a.kv_heads + kv_head) * n + i;
        static_cast<T*>(layer.keys)[at] = k, static_cast<T*>(layer.values)[at] = v;
      }
    }
    __syncthreads();
    score(from, to, kv_head, position);
    __syncthreads();
    float top = -INFINITY, total = 0;
    for (int j = lane; j < to - from; j += kWarp) top = fmaxf(top, scores[j]);
    top = warp_max(top);
    for (int j = lane; j < to - from; j += kWarp) total += expf(scores[j] - top);
    total = warp_sum(total);
    add_values(from, to, kv_head, position, top);
    __syncthreads();
    const size_t index = (size_t(m) * a.heads + head) * a.splits + split;
    for (int d = threadIdx.x; d < n; d += blockDim.x) {
      float sum = 0;
      for (int w = 0; w < warps; ++w) sum += sums[w * n + d];
      a.partial[index * n + d] = sum;
    }
    if (threadIdx.x == 0) a.stats[2 * index] = top, a.stats[2 * index + 1] = total;
  }

  // Into L2: what this block will read of the cache for this split.
  __device__ void fetch(int m, int head, int split, const Splits& seen, int position) {
    const int from = max(seen.low, split * kSplit), to = min(position, (split + 1) * kSplit);
    const size_t offset = size_t(head / (a.heads / a.kv_heads)) * a.head_dim;
#pragma unroll 1
    for (int j = from + threadIdx.x; j < to; j += blockDim.x) {
      const size_t at = size_t(slot_of(m, j)) * a.kv_heads * a.head_dim + offset;
#pragma unroll 1
      for (int i = 0; i < a.head_dim; i += kLine / int(sizeof(T))) {
        prefetch_line(static_cast<const T*>(layer.keys) + at + i);
        prefetch_line(static_cast<const T*>(layer.values) + at + i);
      }
    }
  }

 private:
  // Sixteen bytes of a stored key or value.
  __device__ __forceinline__ uint4 stored(const void* side, int slot, int kv_head, int i) const {
    const T* start = static_cast<const T*>(side) + (size_t(slot) * a.kv_heads + kv_head) * a.head_dim + i;
    return *reinterpret_cast<const uint4*>(start);
  }

  __device__ void score(int from, int to, int kv_head, int position) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, at_once = kWarp / lanes;
    const int step = blockDim.x / kWarp * at_once;
#pragma unroll 2
    for (int start = from + warp * at_once; start < to; start += step) {  // the same for all lanes of a warp
      const int j = start + lane / lanes;
      float dot = 0;
      if (j < to)
#pragma unroll 1
        for (int i = lane % lanes * V; i < a.head_dim; i += lanes * V) {
          uint4 k{};
          if (j != position) k = stored(layer.keys, slots[j - from], kv_head, i);
#pragma unroll
          for (int v = 0; v < V; v += 4) {
            float x[4];
            unpack<T>(k, v, x);
#pragma unroll
            for (int u = 0; u < 4; ++u) dot = fmaf(query[i + v + u], j == position ? key[i + v + u] : x[u], dot);
          }
        }
      for (int mask = lanes / 2; mask > 0; mask /= 2) dot += shuffle_xor(dot, mask);
      if (j < to && lane % lanes == 0) scores[j - from] = dot;
    }
  }

  // sums (warps, K): each warp's positions, weighted.
  __device__ void add_values(int from, int to, int kv_head, int position, float top) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, at_once = kWarp / lanes;
    const int step = blockDim.x / kWarp * at_once, turns = divide_up(a.head_dim, lanes * V);
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {  // the same for all lanes
      const int i = (turn * lanes + lane % lanes) * V;
      float sum[V] = {};
      if (i < a.head_dim) {
#pragma unroll 2
        for (int j = from + warp * at_once + lane / lanes; j < to; j += step) {
          uint4 stored_value{};
          if (j != position) stored_value = stored(layer.values, slots[j - from], kv_head, i);
          const float weight = expf(scores[j - from] - top);
#pragma unroll
          for (int v = 0; v < V; v += 4) {
            float x[4];
            unpack<T>(stored_value, v, x);
#pragma unroll
            for (int u = 0; u < 4; ++u) sum[v + u] = fmaf(weight, j == position ? value[i + v + u] : x[u], sum[v + u]);
          }
        }
      }
#pragma unroll
      for (int v = 0; v < V; ++v) {
        for (int mask = kWarp / 2; mask >= lanes; mask /= 2) sum[v] += shuffle_xor(sum[v], mask);
        if (lane < lanes && i < a.head_dim) sums[warp * a.head_dim + i + v] = sum[v];
      }
    }
  }
};

// Elements k to k + 3 of a row's attention (of one head: its width is a multiple of 4), the splits added up in order.
static __device__ __forceinline__ float4 combined(const Arguments& a, int m, int k, const Splits& seen) {
  const size_t head = (size_t(m) * a.heads + k / a.head_dim) * a.splits;
  const float *stats = a.stats + 2 * head, *partial = a.partial + head * a.head_dim + k % a.head_dim;
  float top = -INFINITY, total = 0;
  float4 sum{}, next = load4(partial + size_t(seen.first) * a.head_dim);  // beside the stats, not behind them
#pragma unroll 1
  for (int s = seen.first; s <= seen.last; ++s) top = fmaxf(top, stats[2 * s]);
#pragma unroll 1
  for (int s = seen.first; s <= seen.last; ++s) {
    const float weight = expf(stats[2 * s] - top);
    const float4 part = next;
    if (s < seen.last) next = load4(partial + size_t(s + 1) * a.head_dim);
    total = fmaf(weight, stats[2 * s + 1], total);
    sum.x = fmaf(weight, part.x, sum.x), sum.y = fmaf(weight, part.y, sum.y);
    sum.z = fmaf(weight, part.z, sum.z), sum.w = fmaf(weight, part.w, sum.w);
  }
  return {sum.x / total, sum.y / total, sum.z / total, sum.w / total};
}

}  // namespace coconut_fast
