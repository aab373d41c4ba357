// The linear phases of the persistent kernel: y = act(weight f(input) + bias), a block's share of the outputs.
//
// The inputs of all B rows are staged in shared memory as fp32, normed on the way where the phase starts with a norm.
// A warp takes units: R weight rows by `chunk` loads of 32 x 16 bytes, so that even GPT-2's 6 to 24 outputs of a block
// keep 16 warps busy. A unit's sums over k are added up by the warp and put down; the chunks of an output are then added
// in order. R grows with B (each x read from shared memory serves R weights); chunk depends on k alone. So the order
// in which an output's terms are added depends neither on B nor on the number of blocks.
//
// Loads run kSlots ahead in registers (64 bytes a thread, 32 KB a block), the first of them before the barrier.
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
  using Held = uint4[kSlots][R];

  const T *weight, *bias;
  int width, first, count, second, rows;  // k; outputs [first, first + count); offset of the up rows behind the gate rows
  int chunk, chunks;                      // loads of a unit, units of a row
  int begin, end;                         // chunks that are staged now

  __device__ void init(const void* matrix, const void* vector, int k, const Instruction& now, int gate_rows) {
    weight = static_cast<const T*>(matrix), bias = static_cast<const T*>(vector), width = k;
    first = now.first, count = now.last - now.first, second = gate_rows, rows = gate_rows ? 2 * count : count;
    chunk = chunk_of(divide_up(k, kLoad)), chunks = divide_up(divide_up(k, kLoad), chunk);
  }

  __device__ void slice(int from, int to) { begin = from, end = to < chunks ? to : chunks; }

  __device__ int units() const { return divide_up(rows, R) * (end - begin); }

  // How many slots this warp has.
  __device__ int slots() const {
    const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
    return divide_up(max(units() - warp, 0), warps) * chunk;
  }

  // Output row `row` of this block's share.
  __device__ const T* row_start(int row) const {
    return weight + size_t(first + (row < count ? row : second - count + row)) * width;
  }

  // Group of R rows, and chunk, of this warp's unit number `turn`.
  __device__ void unit(int turn, int& row, int& part) const {
    const int u = threadIdx.x / kWarp + turn * (blockDim.x / kWarp);
    row = u / (end - begin) * R, part = begin + u % (end - begin);
  }

  __device__ __forceinline__ void load(int slot, int limit, Held& held) const {
#pragma unroll
    for (int q = 0; q < kSlots; ++q) {
      int row = 0, part = 0;
      const bool there = slot + q < limit;
      if (there) unit((slot + q) / chunk, row, part);
      const int k = (part * chunk + (slot + q) % chunk) * kLoad + int(threadIdx.x % kWarp) * V;
#pragma unroll
      for (int r = 0; r < R; ++r)
        held[q][r] = there && k < width && row + r < rows ? load_weights(row_start(row + r) + k) : uint4{};
    }
  }

  // Products of the staged slice: input (B, staged floats), sums (rows, chunks, B). held: the first slots' weights.
  __device__ __forceinline__ void multiply(const float* input, int staged, Held& held, float* sums) const {
    const int limit = slots(), lane = threadIdx.x % kWarp;
    float total[R * B] = {};
    for (int slot = 0; slot < limit; slot += kSlots) {
      Held next;
      load(slot + kSlots, limit, next);
#pragma unroll
      for (int q = 0; q < kSlots; ++q) {
        if (slot + q >= limit) break;
        int row, part;
        unit((slot + q) / chunk, row, part);
        const int at = (slot + q) % chunk;
        const float* x = input + ((part - begin) * chunk + at) * kLoad + lane * 4;
        float w[R][V];
#pragma unroll
        for (int r = 0; r < R; ++r) unpack(held[q][r], w[r]);
#pragma unroll
        for (int m = 0; m < B; ++m)
#pragma unroll
          for (int v = 0; v < V; v += 4) {
            const float4 four = *reinterpret_cast<const float4*>(x + m * staged + v * kWarp);
#pragma unroll
            for (int r = 0; r < R; ++r) {
              float& sum = total[r * B + m];
              sum = fmaf(w[r][v], four.x, sum), sum = fmaf(w[r][v + 1], four.y, sum);
              sum = fmaf(w[r][v + 2], four.z, sum), sum = fmaf(w[r][v + 3], four.w, sum);
            }
          }
        if (at + 1 == chunk) {
          const int which = warp_sums<R * B>(total), r = which / B;
          if (lane % (kWarp / (R * B)) == 0 && row + r < rows)
            sums[((row + r) * chunks + part) * B + which % B] = total[0];
#pragma unroll
          for (float& sum : total) sum = 0;
        }
      }
#pragma unroll
      for (int q = 0; q < kSlots; ++q)
#pragma unroll
        for (int r = 0; r < R; ++r) held[q][r] = next[q][r];
    }
  }

  // Output `index` of the share (its up row where `up`) for batch row m, with bias.
  __device__ float output(const float* sums, int index, int m, bool up) const {
    const float* parts = sums + size_t(up ? count + index : index) * chunks * B + m;
    float sum = 0;
    for (int c = 0; c < chunks; ++c) sum += parts[c * B];
    return bias ? sum + to_float(bias[(up ? second : 0) + first + index]) : sum;
  }

  // The start of the share into L2: what the registers and the loads behind them will ask for.
  __device__ void fetch() const {
    const size_t bytes = min(size_t(count) * width * sizeof(T), size_t(kFetch));
    prefetch(row_start(0), bytes);
    if (second && bytes < kFetch) prefetch(row_start(count), min(bytes, size_t(kFetch) - bytes));
  }
  static constexpr int kFetch = 96 << 10;  // of a block: 12 MB on 132 SMs, a quarter of L2
};

// Norm statistics of the rows of x, from shared or L1-cached global memory: y = (x - mean) * scale * weight + bias.
// Two passes over the row: GPT-2's x has components hundreds of times the others, and one pass would cancel.
template <int B>
static __device__ void statistics(const float* x, int dim, bool centred, float eps, const bool (&active)[B],
                                  float (&mean)[B], float (&scale)[B], float* scratch) {
#pragma unroll
  for (int m = 0; m < B; ++m) mean[m] = 0;
  if (centred) {
    for (int k = threadIdx.x; k < dim; k += blockDim.x)
#pragma unroll
      for (int m = 0; m < B; ++m)
        if (active[m]) mean[m] += x[size_t(m) * dim + k];
    block_sums<B>(mean, scratch);
#pragma unroll
    for (int m = 0; m < B; ++m) mean[m] /= dim;
  }
#pragma unroll
  for (int m = 0; m < B; ++m) scale[m] = 0;
  for (int k = threadIdx.x; k < dim; k += blockDim.x)
#pragma unroll
    for (int m = 0; m < B; ++m)
      if (active[m]) {
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
