// The linear phases of the persistent kernel: y = act(weight f(input) + bias), a block's share of the outputs.
//
// A row of weights is cut into slices of 32 x 16 bytes. A warp owns one slice (of each panel, where a row has more
// slices than the block has warps) and every groups-th row of the share. Its lanes hold their piece of the inputs of
// all B batch rows in registers, so that the loop over rows reads only weights. The warp reduces a slice's sums and
// writes them to shared memory; the slices of an output are then added in order. So the order in which an output's
// terms are added depends neither on B nor on the number of blocks.
//
// Weights depend on no other phase and are loaded far ahead of the barriers: every thread copies the 16 bytes that it
// will multiply into its own ring in shared memory, kDepth units ahead across phases and passes, 96 KB per block. Only
// the thread itself reads them, so waiting for its own copies suffices.
#pragma once

#include "cuda/device.h"
#include "cuda/program.h"

namespace coconut_fast {

static inline __host__ __device__ int divide_up(int a, int b) { return (a + b - 1) / b; }

// How the weights of an opcode are dealt to the warps of a block; computed on the host. No weights: no parts.
struct Deal {
  int width, slices;  // of a row: elements, and loads of 32 x 16 bytes
  int wide, groups;   // slices of a panel, one a warp; warps that share a slice's rows
  int inverse;        // warp / wide is warp * inverse >> 16
  int second;         // the row where a second matrix (up, after gate) begins, or 0
  int parts;          // how many: panel 0 of the first matrix, of the second, panel 1 ...
};

template <class T>
static inline Deal deal(int width, int second, int warps) {
  const int slices = divide_up(width, kWarp * kVector<T>), panels = divide_up(slices, warps);
  const int wide = divide_up(slices, panels);
  return {width, slices, wide, warps / wide, 65536 / wide + 1, second, second ? 2 * panels : panels};
}

static __device__ __forceinline__ const void* matrix_of(const Layer& layer, int opcode) {
  return opcode == kQkv ? layer.qkv : opcode == kOut ? layer.o : opcode == kUp ? layer.up : layer.down;
}

static __device__ __forceinline__ const void* bias_of(const Layer& layer, int opcode) {
  return opcode == kQkv  ? layer.qkv_bias
         : opcode == kOut ? layer.o_bias
         : opcode == kUp  ? layer.up_bias
                          : layer.down_bias;
}

// The rows of one part of a share that a warp multiplies, one after the other.
template <class T>
struct Rows {
  static constexpr int V = kVector<T>, kSlice = kWarp * V;
  int slice, k;          // the warp's slice of a weight row; the lane's first element
  int row, count, step;  // the next row, the rows of the share, the distance to the row after
  bool inside;           // whether the lane's elements exist

  __device__ __forceinline__ void init(const Instruction& now, const Deal& by, int part, int thread) {
    const int warp = thread / kWarp, group = warp * by.inverse >> 16;
    slice = (by.second ? part >> 1 : part) * by.wide + warp - group * by.wide;
    k = slice * kSlice + thread % kWarp * V, inside = k < by.width;
    count = now.last - now.first, step = by.groups;
    row = group < by.groups && slice < by.slices ? group : count;
  }
};

// How far a thread's copies have got. In shared memory, so that it occupies no registers between phases.
template <class T>
struct alignas(16) Place {
  int index, left, part, parts;  // instruction being copied, how many follow; part, number of parts of its share
  int row, count, step, put;     // as in Rows; the slot that is filled next
  const T* next;
  int stride, inside;  // elements between the warp's rows
};

// What a thread will multiply, up to kDepth units of 16 bytes ahead. A unit is taken when it is used; its slot is
// refilled at once in a phase of many units, else after the phase, while the block waits for others anyway.
template <class T>
struct Ring {
  static constexpr int kDepth = 12, kFew = 6;
  const Instruction* program;  // of this block
  const Layer* layers;
  const Deal* deals;
  uint4* slots;     // (kDepth, threads), from this thread's first
  Place<T>* place;  // of this thread
  int owed;         // slots whose units have been taken and that are not refilled yet

  // Shared memory of a block's rings.
  static __host__ __device__ size_t bytes(int threads) { return (sizeof(uint4) * kDepth + sizeof(Place<T>)) * threads; }

  __device__ __forceinline__ Ring(const Instruction* program, const Layer* layers, const Deal* deals, uint4* memory)
      : program(program), layers(layers), deals(deals), slots(memory + opaque(threadIdx.x)),
        place(reinterpret_cast<Place<T>*>(memory + kDepth * blockDim.x) + opaque(threadIdx.x)), owed(0) {}

  __device__ __forceinline__ void start(const Arguments& a) {
    *place = {a.begin % a.phases - 1, a.end - a.begin, 0, 0, 0, 0, 0, 0, nullptr, 0, 0};
    owed = kDepth;
    pay(a.phases);
  }

  // Advances to the next part in which this warp has rows; false after the last.
  __device__ __forceinline__ bool turn(Place<T>& at, int phases) const {
#pragma unroll 1
    while (at.row >= at.count) {
      if (++at.part >= at.parts) {
        if (at.left == 0) return false;
        --at.left, at.index = at.index + 1 == phases ? 0 : at.index + 1;
        at.part = -1, at.parts = deals[program[at.index].opcode].parts;
        continue;
      }
      const Instruction& now = program[at.index];
      const Deal& by = deals[now.opcode];
      Rows<T> rows;
      rows.init(now, by, at.part, opaque(threadIdx.x));
      at.row = rows.row, at.count = rows.count, at.step = rows.step, at.inside = rows.inside;
      at.stride = by.groups * by.width;
      const int first = now.first + (at.part & 1 ? by.second : 0) + rows.row;
      at.next = static_cast<const T*>(matrix_of(layers[now.layer], now.opcode)) + size_t(first) * by.width + rows.k;
    }
    return true;
  }

  // Refills the slots whose units have been taken, one group of copies each.
  __device__ __forceinline__ void pay(int phases) {
    if (owed == 0) return;
    Place<T> at = *place;
#pragma unroll 1
    for (; owed > 0; --owed) {
      if (at.row < at.count || turn(at, phases)) {
        if (at.inside) copy_async(slots + at.put * blockDim.x, at.next);
        at.row += at.step, at.next += at.stride;
      }
      at.put = at.put + 1 == kDepth ? 0 : at.put + 1;
      copies_end();
    }
    *place = at;
  }

  // The next unit; `put` is the first slot that is owed.
  __device__ __forceinline__ uint4 take(int put, bool inside) {
    const int at = put + owed++;
    return inside ? slots[(at < kDepth ? at : at - kDepth) * blockDim.x] : uint4{};
  }
};

// Writes this warp's slice of sums (rows, slices, B) for one part of a share.
template <class T, int B>
static __device__ __forceinline__ void products(Ring<T>& ring, int phases, Rows<T>& rows, bool few,
                                                const float (&x)[B][kVector<T>], float* sums, int slices) {
  constexpr int V = kVector<T>, R = B > 2 ? 8 / B : 4;  // rows at once
  const int lane = threadIdx.x % kWarp, which = lane / (kWarp / (R * B));
#pragma unroll 1
  for (; rows.row < rows.count; rows.row += R * rows.step) {
    const int put = ring.place->put;
    if (!few) copies_wait<Ring<T>::kDepth - R>();
    float total[R * B] = {};
#pragma unroll
    for (int r = 0; r < R; ++r) {
      if (rows.row + r * rows.step >= rows.count) break;
      float w[V];
      spread<T>(ring.take(put, rows.inside), w);
#pragma unroll
      for (int v = 0; v < V; ++v)
#pragma unroll
        for (int m = 0; m < B; ++m) total[r * B + m] = fmaf(w[v], x[m][v], total[r * B + m]);
    }
    if (!few) ring.pay(phases);
    warp_sums<R * B>(total);
    const int row = rows.row + which / B * rows.step;
    if (lane % (kWarp / (R * B)) == 0 && row < rows.count) sums[(row * slices + rows.slice) * B + which % B] = total[0];
  }
}

// x sigmoid(y)
static __device__ __forceinline__ float times_sigmoid(float x, float y) { return x / (1.0f + expf(-y)); }

static __device__ __forceinline__ float silu(float x) { return times_sigmoid(x, x); }

static __device__ __forceinline__ float gelu_tanh(float x) {  // 0.5 (1 + tanh(u)) is sigmoid(2 u)
  return times_sigmoid(x, 1.5957691216057308f * (x + 0.044715f * x * x * x));
}

}  // namespace coconut_fast
