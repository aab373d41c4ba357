// The linear phases of the persistent kernel: y = act(weight f(input) + bias), a block's share of the outputs.
//
// The inputs of all B rows are staged in shared memory as fp32, normed on the way where the phase starts with a norm.
// A warp takes units: R weight rows by `chunk` loads of 32 x 16 bytes, so that even GPT-2's 6 to 24 outputs of a block
// keep 16 warps busy. A unit's sums over k are added up by the warp and put down; the chunks of an output are then added
// in order. R grows with B (each x read from shared memory serves R weights); chunk depends on k alone. So the order
// in which an output's terms are added depends neither on B nor on the number of blocks.
//
// Loads run one turn ahead in registers (64 bytes a thread, 32 KB a block), the first turn's before the barrier.
#pragma once

#include "cuda/device.h"
#include "cuda/program.h"

namespace coconut_fast {

// Loads of one unit, by loads of a row: short rows are cut finely for balance, long ones coarsely for fewer sums.
static inline __host__ __device__ int chunk_of(int loads) { return loads < 8 ? 1 : loads < 16 ? 2 : 4; }

static inline __host__ __device__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// Where element k of a load lies among its 32 x V staged floats: each lane reads its V as float4, 32 lanes side by side,
// free of bank conflicts.
template <int V>
static __device__ __forceinline__ int place(int k) {
  return V == 4 ? k : (k & ~255) + (k % 8 / 4) * 128 + k % 256 / 8 * 4 + k % 4;
}

template <class T, int B>
struct Linear {
  static constexpr int V = kVector<T>, kLoad = kWarp * V;
  static constexpr int R = B == 8 ? 4 : B == 4 ? 2 : 1, kSlots = 4 / R;
  static constexpr int kFetch = 96 << 10;  // bytes of a block: 12 MB on 132 SMs, a quarter of L2
  using Held = uint4[kSlots][R];

  // One load of one unit: R rows from `group` * R on, chunk `part` of the slice, load `at` of the chunk.
  struct Cursor {
    int group, part, at;
  };

  const T *weight, *bias;
  int width, first, count, second, rows;     // k; outputs [first, first + count); where the up rows begin behind the gate's
  int chunk, chunks;                         // loads of a unit, units of a row
  int begin, staged;                         // the slice of chunks that is staged now: its first, and how many
  int groups, group_step, part_step;         // from one unit of a warp to its next
  Cursor ahead;                              // what is loaded next

  __device__ void init(const void* matrix, const void* vector, int k, const Instruction& now, int gate_rows) {
    weight = static_cast<const T*>(matrix), bias = static_cast<const T*>(vector), width = k;
    first = now.first, count = now.last - now.first, second = gate_rows, rows = gate_rows ? 2 * count : count;
    chunk = chunk_of(divide_up(k, kLoad)), chunks = divide_up(divide_up(k, kLoad), chunk), groups = divide_up(rows, R);
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

  __device__ const T* row_start(int row) const {  // of this block's share
    return weight + size_t(first + (row < count ? row : second - count + row)) * width;
  }

  __device__ __forceinline__ void load(Held& held) {
#pragma unroll
    for (int q = 0; q < kSlots; ++q) {
      const int k = ((begin + ahead.part) * chunk + ahead.at) * kLoad + int(threadIdx.x % kWarp) * V;
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const int row = ahead.group * R + r;
        held[q][r] = k < width && row < rows ? load_weights(row_start(row) + k) : uint4{};
      }
      advance(ahead);
    }
  }

  // Products of the staged slice: input (B, staged floats), sums (rows, chunks, B). held: the first slots' weights.
  __device__ __forceinline__ void multiply(const float* input, Held& held, float* sums) {
    const int lane = threadIdx.x % kWarp, stride = staged * chunk * kLoad;
    float total[R * B] = {};
    for (Cursor now = start(); now.group < groups;) {
      Held next;
      load(next);
#pragma unroll
      for (int q = 0; q < kSlots; ++q) {
        if (now.group >= groups) break;
        const float* x = input + (now.part * chunk + now.at) * kLoad + lane * 4;
#pragma unroll
        for (int v = 0; v < V; v += 4) {
          float w[R][4];
#pragma unroll
          for (int r = 0; r < R; ++r) unpack<T>(held[q][r], v, w[r]);
#pragma unroll
          for (int m = 0; m < B; ++m) {
            const float4 four = *reinterpret_cast<const float4*>(x + m * stride + v * kWarp);
#pragma unroll
            for (int r = 0; r < R; ++r) {
              float& sum = total[r * B + m];
              sum = fmaf(w[r][0], four.x, sum), sum = fmaf(w[r][1], four.y, sum);
              sum = fmaf(w[r][2], four.z, sum), sum = fmaf(w[r][3], four.w, sum);
            }
          }
        }
        if (now.at + 1 == chunk) {
          const int which = warp_sums<R * B>(total), row = now.group * R + which / B;
          if (lane % (kWarp / (R * B)) == 0 && row < rows)
            sums[(row * chunks + begin + now.part) * B + which % B] = total[0];
#pragma unroll
          for (float& sum : total) sum = 0;
        }
        advance(now);
      }
#pragma unroll
      for (int q = 0; q < kSlots; ++q)
#pragma unroll
        for (int r = 0; r < R; ++r) held[q][r] = next[q][r];
    }
  }

  // Sum of local row `row` for batch row m, its chunks in order.
  __device__ float sum_of(const float* sums, int row, int m) const {
    float sum = 0;
    for (int c = 0; c < chunks; ++c) sum += sums[(row * chunks + c) * B + m];
    return sum;
  }

  __device__ float bias_of(int row) const {
    return bias ? to_float(bias[first + (row < count ? row : second - count + row)]) : 0.0f;
  }

  // The start of the share into L2: what the loads of the next phase will ask for.
  __device__ void fetch() const {
    const size_t bytes = min(size_t(count) * width * sizeof(T), size_t(kFetch));
    prefetch(row_start(0), bytes);
    if (second && bytes < kFetch) prefetch(row_start(count), min(bytes, size_t(kFetch) - bytes));
    if (bias && count) prefetch(bias + first, count * sizeof(T));
    if (bias && count && second) prefetch(bias + second + first, count * sizeof(T));
  }
};

// Norm statistics of the `active` rows of x (bit m is row m): y = (x - mean) * scale * weight + bias.
// Two passes over the row: GPT-2's x has components hundreds of times the others, and one pass would cancel.
template <int B>
static __device__ void statistics(const float* x, int dim, bool centred, float eps, unsigned active,
                                  float (&mean)[B], float (&scale)[B], float* scratch) {
#pragma unroll
  for (int m = 0; m < B; ++m) mean[m] = 0;
  if (centred) {
    for (int k = threadIdx.x; k < dim; k += blockDim.x)
#pragma unroll
      for (int m = 0; m < B; ++m)
        if (active >> m & 1) mean[m] += x[size_t(m) * dim + k];
    block_sums<B>(mean, scratch);
#pragma unroll
    for (int m = 0; m < B; ++m) mean[m] /= dim;
  }
#pragma unroll
  for (int m = 0; m < B; ++m) scale[m] = 0;
  for (int k = threadIdx.x; k < dim; k += blockDim.x)
#pragma unroll
    for (int m = 0; m < B; ++m)
      if (active >> m & 1) {
        const float off = x[size_t(m) * dim + k] - mean[m];
        scale[m] = fmaf(off, off, scale[m]);
      }
  block_sums<B>(scale, scratch);
#pragma unroll
  for (int m = 0; m < B; ++m) scale[m] = 1.0f / sqrtf(scale[m] / dim + eps);
}

// x sigmoid(y)
static __device__ __forceinline__ float times_sigmoid(float x, float y) { return x / (1.0f + expf(-y)); }

static __device__ __forceinline__ float silu(float x) { return times_sigmoid(x, x); }

static __device__ __forceinline__ float gelu_tanh(float x) {  // 0.5 (1 + tanh(u)) is sigmoid(2 u)
  return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
}

}  // namespace coconut_fast
