// The linear phases of the persistent kernel: y = act(weight f(input) + bias), a block's share of the outputs.
//
// The inputs of all B rows are staged in shared memory as fp32, normed on the way where the phase starts with a norm. A
// warp takes units: R weight rows by `chunk` loads of 32 x 16 bytes, so that even GPT-2's 6 to 24 outputs of a block
// keep 16 warps busy. A unit's sums over k are added up by the warp and put down; the chunks of an output are then
// added in order. R is 2 from 4 rows on (each x read from shared memory serves R weights: with 8 rows that is 8 bytes
// of shared memory per byte of weights, 86% of 4.3 TB/s at best, but R = 4 spills); chunk depends on k alone. So the
// order in which an output's terms are added depends neither on B nor on the number of blocks.
//
// Weights come to L2 96 KB ahead of their use (a block's share is one straight run of memory, 12 MB on 132 SMs
// together), and from there one turn ahead into registers: 64 bytes a thread, the first turn's before the barrier. With
// 8 rows a turn computes for so long that other warps hide its loads, and a second set of registers would spill.
#pragma once

#include "cuda/device.h"
#include "cuda/program.h"

namespace coconut_fast {

// Loads of one unit, by loads of a row: short rows are cut finely for balance, long ones coarsely for fewer sums.
static inline __host__ __device__ int chunk_of(int loads) { return loads < 8 ? 1 : loads < 16 ? 2 : 4; }

static inline __host__ __device__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Where element k of row m of the inputs is staged: load by load of 32 x V elements, the B rows of a load side by side
// (so that a lane finds them at constant distances), and of a row the first four of every lane's V, then the second:
// lanes read float4 that touch, free of bank conflicts.
template <int V, int B>
static __device__ __forceinline__ int place(int m, int k) {
  const int load = k / (kWarp * V), in = k % (kWarp * V);
  return (load * B + m) * kWarp * V + in % V / 4 * (kWarp * 4) + in / V * 4 + in % 4;
}

template <class T, int B>
struct Linear {
  static constexpr int V = kVector<T>, kLoad = kWarp * V;
  static constexpr int R = B < 4 ? 1 : 2, kSlots = 4 / R;
  static constexpr bool kAhead = B < 8;
  static constexpr int kFetch = 96 << 10;  // bytes
  using Held = uint4[kSlots][R];

  // One load of one unit: group of R rows (gate rows, then up rows), chunk `part` of the slice, load `at` of the chunk.
  struct Cursor {
    int group, part, at;
  };

  const T *weight, *bias;             // from the first output of the share on
  int width, first, count, second;    // k; outputs [first, first + count); where the up rows begin behind the gate rows
  int chunk, chunks, half, groups;    // loads of a unit, units of a row; groups of gate rows, of all
  int begin, staged;                  // the slice of chunks that is staged now: its first, and how many
  int group_step, part_step;          // from one unit of a warp to its next
  Cursor ahead;                       // what is loaded next, where loads run ahead

  __device__ void init(const void* matrix, const void* vector, int k, const Instruction& now, int gate_rows) {
    width = k, first = now.first, count = now.last - now.first, second = gate_rows;
    weight = static_cast<const T*>(matrix) + size_t(first) * width;
    bias = vector ? static_cast<const T*>(vector) + first : nullptr;
    chunk = chunk_of(divide_up(k, kLoad)), chunks = divide_up(divide_up(k, kLoad), chunk);
    half = divide_up(count, R), groups = second ? 2 * half : half;
  }

  __device__ Cursor start() const {
    const int warp = threadIdx.x / kWarp;
    return {warp / staged, warp % staged, 0};
  }

  __device__ void slice(int from, int at_once) {
    const int warps = blockDim.x / kWarp;
    begin = from, staged = min(at_once, chunks - from);
    group_step = warps / staged, part_step = warps % staged;
    ahead = start();
  }

  __device__ __forceinline__ void advance(Cursor& c) const {
    if (++c.at < chunk) return;
    c.at = 0, c.group += group_step, c.part += part_step;
    if (c.part >= staged) c.part -= staged, ++c.group;
  }

  // First output of a group, within the share.
  __device__ __forceinline__ int output_of(int group) const { return (group < half ? group : group - half) * R; }

  // The weights at `c` and behind, which is moved on.
  __device__ __forceinline__ void load(Cursor& c, Held& held) const {
#pragma unroll
    for (int q = 0; q < kSlots; ++q) {
      const int k = ((begin + c.part) * chunk + c.at) * kLoad + int(threadIdx.x % kWarp) * V;
      const int output = output_of(c.group), up = c.group >= half;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const bool there = c.group < groups && k < width && output + r < count;
        held[q][r] = there ? load_weights(weight + (output + r + up * second) * width + k) : uint4{};
        if (there) fetch_behind((output + r + up * count) * width + k);
      }
      advance(c);
    }
  }

  // Into L2: what this block reads kFetch behind element `at` of its share, gate rows and up rows end to end.
  __device__ __forceinline__ void fetch_behind(int at) const {
    at += kFetch / int(sizeof(T));
    const int one = count * width;
    if (at < (second ? 2 * one : one)) prefetch_line(weight + (at < one ? at : at + (second - count) * width));
  }

  // Products of the staged slice into sums (outputs, or gates then ups; chunks; B). held: the first slots' weights.
  __device__ __forceinline__ void multiply(const float* input, Held& held, float* sums) {
    const int lane = threadIdx.x % kWarp;
    float total[R * B] = {};
    for (Cursor now = start(); now.group < groups;) {
      Held next;
      if constexpr (kAhead) load(ahead, next);
#pragma unroll
      for (int q = 0; q < kSlots; ++q) {
        if (now.group >= groups) break;
        const float* x = input + (now.part * chunk + now.at) * B * kLoad + lane * 4;
#pragma unroll 1  // the halves of a bf16 load by turns: both at once would spill
        for (int v = 0; v < V; v += 4) {
          float w[R][4];
#pragma unroll
          for (int r = 0; r < R; ++r) unpack<T>(held[q][r], v, w[r]);
#pragma unroll
          for (int m = 0; m < B; ++m) {
            const float4 four = load4(x + m * kLoad + v * kWarp);
#pragma unroll
            for (int r = 0; r < R; ++r) {
              float& sum = total[r * B + m];
              sum = fmaf(w[r][0], four.x, sum), sum = fmaf(w[r][1], four.y, sum);
              sum = fmaf(w[r][2], four.z, sum), sum = fmaf(w[r][3], four.w, sum);
            }
          }
        }
        if (now.at + 1 == chunk) {
          warp_sums<R * B>(total);
          const int which = lane / (kWarp / (R * B)), output = output_of(now.group) + which / B;
          const int row = now.group < half ? output : count + output;
          if (lane % (kWarp / (R * B)) == 0 && output < count)
            sums[(row * chunks + begin + now.part) * B + which % B] = total[0];
#pragma unroll
          for (float& sum : total) sum = 0;
        }
        advance(now);
      }
      if constexpr (!kAhead) {
        Cursor same = now;
        load(same, held);
      }
      if constexpr (kAhead)
#pragma unroll
        for (int q = 0; q < kSlots; ++q)
#pragma unroll
          for (int r = 0; r < R; ++r) held[q][r] = next[q][r];
    }
  }

  // Sum of an output of the share (of its up row) for batch row m, its chunks in order.
  __device__ float sum_of(const float* sums, int output, bool up, int m) const {
    const int row = up ? count + output : output;
    float sum = 0;
    for (int c = 0; c < chunks; ++c) sum += sums[(row * chunks + c) * B + m];
    return sum;
  }

  __device__ float bias_of(int output, bool up) const {
    return bias ? to_float(bias[output + (up ? second : 0)]) : 0.0f;
  }

  // The start of the share into L2: what the loads of the next phase will ask for.
  __device__ void fetch() const {
    const int bytes = min(count * width * int(sizeof(T)), kFetch), left = second ? min(bytes, kFetch - bytes) : 0;
    prefetch(weight, bytes);
    prefetch(weight + size_t(second) * width, left);
    if (bias) prefetch(bias, count * sizeof(T));
    if (bias && second) prefetch(bias + second, count * sizeof(T));
  }
};

// Norm statistics of B rows of x, (B, dim), into mean and scale (shared memory), known to all threads of the
// block afterwards: y = (x - mean) * scale * weight + bias. Rows without their bit in `active` are not read.
// Two passes over a row: GPT-2's x has components hundreds of times the others, and one pass would cancel.
template <int B>
static __device__ void statistics(const float* x, int dim, bool centred, float eps, unsigned active, float* mean,
                                  float* scale, float* scratch) {
  float sums[B] = {};
  if (centred) {
    for (int k = threadIdx.x * 4; k < dim; k += blockDim.x * 4)
#pragma unroll
      for (int m = 0; m < B; ++m)
        if (active >> m & 1) {
          const float4 four = load4(x + size_t(m) * dim + k);
          sums[m] += (four.x + four.y) + (four.z + four.w);
        }
    block_sums<B>(sums, scratch);
#pragma unroll
    for (int m = 0; m < B; ++m) sums[m] /= dim;
  }
  float squares[B] = {};
  for (int k = threadIdx.x * 4; k < dim; k += blockDim.x * 4)
#pragma unroll
    for (int m = 0; m < B; ++m)
      if (active >> m & 1) {
        const float4 four = load4(x + size_t(m) * dim + k);
        const float off[4] = {four.x - sums[m], four.y - sums[m], four.z - sums[m], four.w - sums[m]};
#pragma unroll
        for (int i = 0; i < 4; ++i) squares[m] = fmaf(off[i], off[i], squares[m]);
      }
  block_sums<B>(squares, scratch);
  if (threadIdx.x == 0)
#pragma unroll
    for (int m = 0; m < B; ++m) mean[m] = sums[m], scale[m] = 1.0f / sqrtf(squares[m] / dim + eps);
  __syncthreads();
}

// x sigmoid(y)
static __device__ __forceinline__ float times_sigmoid(float x, float y) { return x / (1.0f + expf(-y)); }

static __device__ __forceinline__ float silu(float x) { return times_sigmoid(x, x); }

static __device__ __forceinline__ float gelu_tanh(float x) {  // 0.5 (1 + tanh(u)) is sigmoid(2 u)
  return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
}

}  // namespace coconut_fast
