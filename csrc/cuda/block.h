// One thread block of the persistent kernel: what it keeps in shared memory, and its share of every phase.
#pragma once

#include "cuda/attend.h"
#include "cuda/device.h"
#include "cuda/linear.h"
#include "cuda/program.h"

namespace coconut_fast {

constexpr int kOpcodes = kDown + 1;

// The arguments of a launch, and the offsets of the parts of shared memory, in units of 16 bytes.
struct Work {
  Arguments a;
  Deal deals[kOpcodes];
  float per_dim;  // 1 / dim
  int layers, rows, scratch, moments, data, ring;  // after this block's instructions and the deals
};

// The rows of the batch, as they are before the first pass.
struct RowStates {
  int passes[kMaxRows], lengths[kMaxRows], table[kMaxRows];
};

template <class To, class Word>
static __device__ void copy_words(To* to, const To* from, int count) {
  for (int i = threadIdx.x; i < count * int(sizeof(To) / sizeof(Word)); i += blockDim.x)
    reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
}

template <class T, int B>
struct Block {
  static constexpr int V = kVector<T>;
  const Work& w;
  const Arguments& a;
  int pass;
  Instruction* program;
  Deal* deals;
  Layer* layers;
  RowStates& rows;
  float *scratch, *data;
  float2* moments;  // (slices, B): mean of a slice, sum of squares about it
  Ring<T> ring;

  __device__ __forceinline__ Block(const Work& w)
      : w(w), a(w.a), pass(w.a.begin / w.a.phases), program(reinterpret_cast<Instruction*>(dynamic_shared())),
        deals(reinterpret_cast<Deal*>(program + w.a.phases)),
        layers(reinterpret_cast<Layer*>(dynamic_shared() + w.layers)),
        rows(*reinterpret_cast<RowStates*>(dynamic_shared() + w.rows)),
        scratch(reinterpret_cast<float*>(dynamic_shared() + w.scratch)),
        data(reinterpret_cast<float*>(dynamic_shared() + w.data)),
        moments(reinterpret_cast<float2*>(dynamic_shared() + w.moments)),
        ring(program, layers, deals, reinterpret_cast<uint4*>(dynamic_shared() + w.ring)) {
    copy_words<Instruction, uint4>(program, a.program + size_t(blockIdx.x) * a.phases, a.phases);
    copy_words<Layer, uint64_t>(layers, a.layers, a.depth);
    copy_words<Deal, int>(deals, w.deals, kOpcodes);
    if (threadIdx.x < kMaxRows) {
      const int m = threadIdx.x;
      const bool there = m < a.batch;
      rows.passes[m] = there ? max(min(a.remaining[m], a.passes), 0) : 0;
      rows.lengths[m] = there ? a.lengths[m] : 0, rows.table[m] = there ? a.rows[m] : 0;
    }
    __syncthreads();
  }

  __device__ __forceinline__ bool active(int m) const { return pass < rows.passes[m]; }

  // The lane's piece of the weight of the norm before a linear phase; zero beyond the end.
  __device__ __forceinline__ uint4 norm_weight(const Instruction& now, int k) const {
    const Layer& layer = layers[now.layer];
    const T* weight = static_cast<const T*>(now.opcode == kQkv ? layer.norm1 : layer.norm2);
    return k < a.dim ? *reinterpret_cast<const uint4*>(weight + k) : uint4{};
  }
  __device__ __forceinline__ uint4 norm_bias(const Instruction& now, int k) const {
    const Layer& layer = layers[now.layer];
    const T* bias = static_cast<const T*>(now.opcode == kQkv ? layer.norm1_bias : layer.norm2_bias);
    return bias && k < a.dim ? *reinterpret_cast<const uint4*>(bias + k) : uint4{};
  }

  __device__ __forceinline__ float bias(const Instruction& now, int output) const {
    const T* vector = static_cast<const T*>(bias_of(layers[now.layer], now.opcode));
    return vector ? to_float(vector[now.first + output]) : 0.0f;
  }

  // The lane's piece of all rows of (B, width) floats; zero for inactive rows and beyond the end.
  __device__ __forceinline__ void load(const float* from, int width, int k, float (&x)[B][V]) const {
#pragma unroll
    for (int m = 0; m < B; ++m)
#pragma unroll
      for (int v = 0; v < V; v += 4)
        put4(k < width && active(m) ? load4(from + size_t(m) * width + k + v) : float4{}, x[m] + v);
  }

  // The same for the attention output, combined from its splits.
  __device__ __forceinline__ void load_attention(int width, int window, int k, float (&x)[B][V]) const {
#pragma unroll
    for (int m = 0; m < B; ++m) {
#pragma unroll
      for (int v = 0; v < V; ++v) x[m][v] = 0;
      if (k < width && active(m)) combined<V>(a, m, k, Splits(rows.lengths[m] + pass, window), x[m]);
    }
  }

  // Writes the moments of this warp's slice of x to shared memory. About the slice's own mean: GPT-2's x has components
  // hundreds of times as large as the others, and sums of squares about zero would suffer from cancellation.
  __device__ __forceinline__ void slice_moments(int slice, bool inside, const float (&x)[B][V]) const {
    constexpr int kEach = kWarp / B, kSlice = Rows<T>::kSlice;
    const int lane = threadIdx.x % kWarp, there = min(kSlice, a.dim - slice * kSlice);
    float mean = 0, sums[B];
    if (a.layer_norm) {
#pragma unroll
      for (int m = 0; m < B; ++m) {
        sums[m] = 0;
#pragma unroll
        for (int v = 0; v < V; ++v) sums[m] += x[m][v];
      }
      warp_sums<B>(sums);
      mean = there == kSlice ? sums[0] * (1.0f / kSlice) : sums[0] / there;
    }
#pragma unroll
    for (int m = 0; m < B; ++m) {
      const float middle = B > 1 ? shuffle(mean, m * kEach) : mean;
      sums[m] = 0;
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float off = inside ? x[m][v] - middle : 0.0f;
        sums[m] = fmaf(off, off, sums[m]);
      }
    }
    warp_sums<B>(sums);
    if (lane % kEach == 0) moments[slice * B + lane / kEach] = {mean, sums[0]};
  }

  // Applies the norm, from all slices' moments.
  __device__ __forceinline__ void norm(const uint4& by, const uint4& with, float (&x)[B][V]) const {
    constexpr int kSlice = Rows<T>::kSlice;
    const int lane = threadIdx.x % kWarp, slices = deals[kQkv].slices;
    float mean = 0, squares = 0;
    for (int s = 0; s < slices; ++s)
      mean = fmaf(float(min(kSlice, a.dim - s * kSlice)), moments[s * B + lane % B].x, mean);
    mean *= w.per_dim;
    for (int s = 0; s < slices; ++s) {
      const float2 of = moments[s * B + lane % B];
      squares += fmaf(float(min(kSlice, a.dim - s * kSlice)), (of.x - mean) * (of.x - mean), of.y);
    }
    const float scale = rsqrtf(fmaf(squares, w.per_dim, a.eps));
    float weight[V], bias[V];
    spread<T>(by, weight), spread<T>(with, bias);
#pragma unroll
    for (int m = 0; m < B; ++m) {
      const float middle = B > 1 ? shuffle(mean, m) : mean, factor = B > 1 ? shuffle(scale, m) : scale;
#pragma unroll
      for (int v = 0; v < V; ++v) x[m][v] = fmaf((x[m][v] - middle) * factor, weight[v], bias[v]);
    }
  }

  // y = linear(input). Norm weights and biases are loaded before the barrier.
  __device__ __forceinline__ void linear(const Instruction& now, uint32_t due) {
    const Deal& by = deals[now.opcode];
    const bool norms = now.opcode == kQkv || now.opcode == kUp, adds = !norms;
    const int thread = opaque(threadIdx.x);
    Rows<T> own;
    own.init(now, by, 0, thread);
    const int outputs = own.count * B, panels = by.second ? by.parts / 2 : by.parts;
    const bool mine = thread < outputs;
    uint4 weight{}, offset{};
    if (norms) weight = norm_weight(now, own.k), offset = norm_bias(now, own.k);
    float early_bias = mine ? bias(now, thread / B) : 0.0f;
    wait(a.counter, due);
    float x[B][V], before = mine && adds ? *residual(now, thread) : 0.0f;
    if (norms) {
#pragma unroll 1
      for (int p = panels; p-- > 0;) {  // ends with the first panel
        const int s = own.slice + p * by.wide, k = own.k + p * by.wide * Rows<T>::kSlice;
        load(a.x, a.dim, k, x);
        if (s < by.slices && thread < by.wide * kWarp) slice_moments(s, k < by.width, x);
      }
      __syncthreads();
    }
    const bool few = by.parts * (own.count + by.groups - 1) <= Ring<T>::kFew * by.groups;
    if (few) copies_wait<Ring<T>::kDepth - Ring<T>::kFew>();
#pragma unroll 1
    for (int part = 0; part < by.parts; ++part) {
      const bool second = by.second && part & 1;
      if (part > 0) own.init(now, by, part, thread);
      if (!second) {
        if (norms) {
          if (part > 0) weight = norm_weight(now, own.k), offset = norm_bias(now, own.k), load(a.x, a.dim, own.k, x);
          norm(weight, offset, x);
        } else if (now.opcode == kOut) {
          load_attention(by.width, layers[now.layer].window, own.k, x);
        } else {
          load(a.mid, a.inner, own.k, x);
        }
      }
      products<T, B>(ring, a.phases, own, few, x, data + (second ? outputs * by.slices : 0), by.slices);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = thread; i < outputs; i += blockDim.x) {
      const int m = i % B, output = i / B, n = now.first + output;
      if (!active(m)) continue;
      if (i >= int(blockDim.x)) {  // the share has more outputs than threads
        early_bias = bias(now, output);
        if (adds) before = *residual(now, i);
      }
      const float* sums = data + output * by.slices * B + m;
      const float y = sum_of(sums, by.slices) + early_bias;
      if (now.opcode == kQkv) {
        a.qkv[size_t(m) * (a.heads + 2 * a.kv_heads) * a.head_dim + n] = y;
      } else if (now.opcode == kUp) {
        float& mid = a.mid[size_t(m) * a.inner + n];
        if (by.second) mid = silu(y) * (sum_of(sums + outputs * by.slices, by.slices) + bias(now, by.second + output));
        else mid = gelu_tanh(y);
      } else {
        *residual(now, i) = before + y;
      }
    }
  }

  // The element to which output i (output of the share, then row) is added.
  __device__ __forceinline__ float* residual(const Instruction& now, int i) const {
    return a.x + size_t(i % B) * a.dim + now.first + i / B;
  }

  __device__ __forceinline__ float sum_of(const float* sums, int slices) const {
    float sum = 0;
#pragma unroll 4
    for (int s = 0; s < slices; ++s) sum += sums[s * B];
    return sum;
  }

  // All splits of this block's share; the first one's keys and values are loaded before the barrier.
  __device__ __forceinline__ void attend(const Instruction& now, uint32_t due) {
    DecodeAttention<T> attend(a, layers[now.layer], data);
    const int ways = opaque(a.ways), heads = opaque(a.heads);
    bool waited = false;
#pragma unroll 1
    for (int tile = now.first; tile < now.last; ++tile) {
      const int row_head = tile / ways, way = tile - row_head * ways, m = row_head / heads;
      if (!active(m)) continue;
      const int position = rows.lengths[m] + pass;
      const Splits seen(position, attend.layer.window);
      attend.place(row_head - m * heads, position, a.page_table + size_t(rows.table[m]) * a.pages_per_row);
#pragma unroll 1
      for (int s = seen.first + (way + ways - seen.first % ways) % ways; s <= seen.last; s += ways) {
        attend.load(s * kSplit);
        if (!waited) wait(a.counter, due);
        waited = true;
        attend.run(m, s, seen);
      }
    }
    if (!waited) wait(a.counter, due);
  }

  // The end of a pass and the start of the next; after the last pass, only its end.
  __device__ void feed(const Instruction& now) {
    for (int m = now.first; m < now.last; ++m) {
      const bool made = pass > 0 && pass <= rows.passes[m];
      float *x = a.x + size_t(m) * a.dim, *hidden = a.hidden + size_t(m) * a.dim;
      // Each thread only touches its own elements, so these loops need no synchronisation.
      if (made) {
        const T *weight = static_cast<const T*>(a.final_norm), *bias = static_cast<const T*>(a.final_norm_bias);
        float mean = 0, squares = 0;
        if (a.layer_norm) {
          for (int k = threadIdx.x; k < a.dim; k += blockDim.x) mean += x[k];
          mean = block_sum(mean, scratch) / a.dim;
        }
        for (int k = threadIdx.x; k < a.dim; k += blockDim.x) squares = fmaf(x[k] - mean, x[k] - mean, squares);
        const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / a.dim + a.eps);
        for (int k = threadIdx.x; k < a.dim; k += blockDim.x)
          hidden[k] = (x[k] - mean) * scale * to_float(weight[k]) + (bias ? to_float(bias[k]) : 0.0f);
      }
      if (active(m)) {
        float factor = 1.0f;
        if (a.rescale > 0) {
          float squares = 0;
          for (int k = threadIdx.x; k < a.dim; k += blockDim.x) squares = fmaf(hidden[k], hidden[k], squares);
          factor = a.rescale / fmaxf(sqrtf(block_sum(squares, scratch)), 1.1754943508222875e-38f);
        }
        const T* embedding = static_cast<const T*>(a.embedding);
        if (embedding) embedding += size_t(rows.lengths[m] + pass) * a.dim;
        for (int k = threadIdx.x; k < a.dim; k += blockDim.x)
          x[k] = hidden[k] * factor + (embedding ? to_float(embedding[k]) : 0.0f);
      }
      if (pass == a.passes && threadIdx.x == 0)
        a.positions[m] += rows.passes[m], a.lengths[m] += rows.passes[m], a.remaining[m] -= rows.passes[m];
    }
  }
};

}  // namespace coconut_fast
