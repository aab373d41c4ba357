// One thread block of the persistent kernel: what it keeps in shared memory, and its share of every phase.
#pragma once

#include "cuda/attend.h"
#include "cuda/device.h"
#include "cuda/linear.h"
#include "cuda/program.h"

namespace coconut_fast {

// What all threads of a block know, at the start of its shared memory. The arguments are here because what the compiler
// would compute of kernel parameters ahead of the loop over phases takes 40 registers; instructions and the layers'
// pointers because no phase should begin with a chain of loads.
template <class T>
struct Board {
  Arguments arguments;
  int capacity;                             // floats of one row of staged inputs
  int passes[kMaxRows], lengths[kMaxRows];  // of the rows, before the first pass
  float mean[kMaxRows], scale[kMaxRows];    // of the norm that a phase begins with
  Instruction* program;                     // of this block
  Layer* layers;
  float *scratch, *data;  // for sums over the block; for what the phase needs
  T *norm, *norm_bias;    // the phase's
};

template <class T>
struct Offsets {  // of the parts behind the board, in bytes
  size_t program, layers, scratch, norm, norm_bias, data;

  __host__ __device__ Offsets(const Arguments& a, int threads) {
    program = (sizeof(Board<T>) + 15) / 16 * 16;
    layers = program + sizeof(Instruction) * a.phases;
    scratch = (layers + sizeof(Layer) * a.depth + 15) / 16 * 16;
    norm = scratch + sizeof(float) * kMaxRows * (1 + threads / kWarp);
    norm_bias = norm + sizeof(T) * a.dim;
    data = norm_bias + sizeof(T) * a.dim;
  }
};

template <class To, class Word>
static __device__ void copy_words(To* to, const To* from, int count) {
  for (int i = threadIdx.x; i < count * int(sizeof(To) / sizeof(Word)); i += blockDim.x)
    reinterpret_cast<Word*>(to)[i] = reinterpret_cast<const Word*>(from)[i];
}

template <class T, int B>
struct Block {
  using Lin = Linear<T, B>;
  // What a thread's own output adds to its sum, asked for ahead of it.
  struct Early {
    float bias, up_bias, x;
  };

  Board<T>& board;
  const Arguments& a;
  int pass = 0;

  __device__ Block(const Arguments& given, int capacity)
      : board(*reinterpret_cast<Board<T>*>(dynamic_shared())), a(board.arguments) {
    char* start = reinterpret_cast<char*>(&board);
    const Offsets<T> at(given, blockDim.x);
    if (threadIdx.x == 0) {
      board.arguments = given, board.capacity = capacity;
      board.program = reinterpret_cast<Instruction*>(start + at.program);
      board.layers = reinterpret_cast<Layer*>(start + at.layers);
      board.scratch = reinterpret_cast<float*>(start + at.scratch);
      board.norm = reinterpret_cast<T*>(start + at.norm), board.norm_bias = reinterpret_cast<T*>(start + at.norm_bias);
      board.data = reinterpret_cast<float*>(start + at.data);
    }
    if (threadIdx.x < kMaxRows) {
      const int m = threadIdx.x;
      board.passes[m] = m < given.batch ? max(min(given.remaining[m], given.passes), 0) : 0;
      board.lengths[m] = m < given.batch ? given.lengths[m] : 0;
    }
    __syncthreads();
    copy_words<Instruction, uint4>(board.program, a.program + size_t(blockIdx.x) * a.phases, a.phases);
    copy_words<Layer, uint64_t>(board.layers, a.layers, a.depth);
    __syncthreads();
  }

  __device__ bool active(int m) const { return pass < board.passes[m]; }

  __device__ bool linear(const Instruction& now, Lin& to) const {
    const Layer& layer = board.layers[now.layer];
    switch (now.opcode) {
      case kQkv: to.init(layer.qkv, layer.qkv_bias, a.dim, now, 0); return true;
      case kOut: to.init(layer.o, layer.o_bias, a.heads * a.head_dim, now, 0); return true;
      case kUp: to.init(layer.up, layer.up_bias, a.dim, now, a.gated ? a.inner : 0); return true;
      case kDown: to.init(layer.down, layer.down_bias, a.inner, now, 0); return true;
      default: return false;
    }
  }

  __device__ bool normed(const Instruction& now, const void*& weight, const void*& bias) const {
    const Layer& layer = board.layers[now.layer];
    weight = now.opcode == kQkv ? layer.norm1 : layer.norm2;
    bias = now.opcode == kQkv ? layer.norm1_bias : layer.norm2_bias;
    return now.opcode == kQkv || now.opcode == kUp;
  }

  // Chunks of a row that fit into the staged inputs at once.
  __device__ int chunks_at_once(const Lin& lin) const { return board.capacity / (lin.chunk * Lin::kLoad); }

  // Into L2, while this block still waits or works: what the next instruction will read.
  __device__ void fetch(const Instruction& next) {
    Lin lin;
    const void *weight, *bias;
    if (linear(next, lin)) lin.fetch();
    if (normed(next, weight, bias)) {
      prefetch(weight, a.dim * sizeof(T));
      if (bias) prefetch(bias, a.dim * sizeof(T));
    }
    if (next.opcode == kAttend)
      each_split(next, [&](Attend<T>& attend, int m, int head, int split, const Splits& seen, int position) {
        attend.fetch(m, head, split, seen, position);
      });
  }

  // Before the barrier: a linear phase's first weights, its norm, and the biases of this thread's own output.
  __device__ void ask(const Instruction& now, Lin& lin, typename Lin::Held& held, Early& early) {
    lin.slice(0, chunks_at_once(lin));
    lin.load(lin.ahead, held);
    const void *weight, *bias;
    if (normed(now, weight, bias))
#pragma unroll 1
      for (int i = threadIdx.x * kVector<T>; i < a.dim; i += blockDim.x * kVector<T>) {
        copy_async(board.norm + i, static_cast<const T*>(weight) + i);
        if (bias) copy_async(board.norm_bias + i, static_cast<const T*>(bias) + i);
      }
    const int index = lin.count ? threadIdx.x % lin.count : 0;
    const bool mine = int(threadIdx.x) < lin.count * B;
    early.bias = mine ? lin.bias_of(index, false) : 0.0f;
    early.up_bias = mine && lin.second ? lin.bias_of(index, true) : 0.0f;
  }

  template <class Run>
  __device__ void each_split(const Instruction& now, Run run) {
    const Layer& layer = board.layers[now.layer];
    Attend<T> attend(a, layer, board.data);
    for (int tile = now.first; tile < now.last; ++tile) {
      const int way = tile % a.ways, head = tile / a.ways % a.heads, m = tile / a.ways / a.heads;
      if (!active(m)) continue;
      const int position = board.lengths[m] + pass;
      const Splits seen(position, layer.window);
      for (int s = seen.first + (way + a.ways - seen.first % a.ways) % a.ways; s <= seen.last; s += a.ways)
        run(attend, m, head, s, seen, position);
    }
  }

  __device__ void attend(const Instruction& now) {
    each_split(now, [](Attend<T>& attend, int m, int head, int split, const Splits& seen, int position) {
      attend.run(m, head, split, seen, position);
    });
  }

  // The end of a pass and the start of the next; behind the last pass, its end alone.
  __device__ void feed(const Instruction& now) {
    for (int m = now.first; m < now.last; ++m) {
      const bool made = pass > 0 && pass <= board.passes[m];
      float *x = a.x + size_t(m) * a.dim, *hidden = a.hidden + size_t(m) * a.dim;
      // Each thread comes back to its own elements only, so nobody waits between these loops.
      if (made) {
        const T *weight = static_cast<const T*>(a.final_norm), *bias = static_cast<const T*>(a.final_norm_bias);
        statistics<1>(x, a.dim, a.layer_norm, a.eps, 1, board.mean, board.scale, board.scratch);
        for (int k = threadIdx.x; k < a.dim; k += blockDim.x)
          hidden[k] = (x[k] - board.mean[0]) * board.scale[0] * to_float(weight[k]) + (bias ? to_float(bias[k]) : 0.0f);
      }
      if (active(m)) {
        float factor = 1.0f;
        if (a.rescale > 0) {
          float squares[1] = {};
          for (int k = threadIdx.x; k < a.dim; k += blockDim.x) squares[0] = fmaf(hidden[k], hidden[k], squares[0]);
          block_sums<1>(squares, board.scratch);
          factor = a.rescale / fmaxf(sqrtf(squares[0]), 1.1754943508222875e-38f);
        }
        const T* embedding = static_cast<const T*>(a.embedding);
        if (embedding) embedding += size_t(board.lengths[m] + pass) * a.dim;
        for (int k = threadIdx.x; k < a.dim; k += blockDim.x)
          x[k] = hidden[k] * factor + (embedding ? to_float(embedding[k]) : 0.0f);
      }
      if (pass == a.passes && threadIdx.x == 0)
        a.positions[m] += board.passes[m], a.lengths[m] += board.passes[m], a.remaining[m] -= board.passes[m];
    }
  }

  // Elements k to k + 3 of row m of a linear phase's input.
  __device__ __forceinline__ float4 input(const Instruction& now, int m, int k, const Splits& seen, bool biased) const {
    if (now.opcode == kOut) return combined(a, m, k, seen);
    if (now.opcode == kDown) return load4(a.mid + size_t(m) * a.inner + k);
    const float4 x = load4(a.x + size_t(m) * a.dim + k);
    const float mean = board.mean[m], scale = board.scale[m];
    float y[4] = {x.x - mean, x.y - mean, x.z - mean, x.w - mean};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      y[i] *= scale * to_float(board.norm[k + i]);
      if (biased) y[i] += to_float(board.norm_bias[k + i]);
    }
    return {y[0], y[1], y[2], y[3]};
  }

  // y = linear(input): what `ask` asked for is there, or comes.
  __device__ void run(const Instruction& now, Lin& lin, typename Lin::Held& held, Early& early) {
    const int outputs = lin.count * B;
    const bool adds = now.opcode == kOut || now.opcode == kDown;
    const int own = threadIdx.x;
    early.x = adds && own < outputs && active(own / lin.count) ? *residual(lin, own) : 0.0f;
    const void *weight, *bias;
    if (normed(now, weight, bias)) {
      unsigned rows = 0;
      for (int m = 0; m < B; ++m) rows |= unsigned(active(m)) << m;
      copies_done();
      statistics<B>(a.x, a.dim, a.layer_norm, a.eps, rows, board.mean, board.scale, board.scratch);
    }
    float* sums = board.data + B * board.capacity;
    for (int from = 0; from < lin.chunks; from += lin.staged) {
      if (from > 0) {
        lin.slice(from, chunks_at_once(lin));
        lin.load(lin.ahead, held);
        __syncthreads();  // the slice before has been read
      }
      const int staged = lin.staged * lin.chunk * Lin::kLoad, first = from * lin.chunk * Lin::kLoad;
#pragma unroll 1
      for (int m = 0; m < B; ++m) {
        const bool live = active(m);
        const Splits seen(board.lengths[m] + pass, board.layers[now.layer].window);
#pragma unroll 2
        for (int i = threadIdx.x * 4; i < staged; i += blockDim.x * 4) {  // zero for rows that rest, and behind the end
          const bool there = live && first + i < lin.width;
          const float4 four = there ? input(now, m, first + i, seen, bias) : float4{};
          *reinterpret_cast<float4*>(board.data + place<kVector<T>, B>(m, i)) = four;
        }
      }
      __syncthreads();
      lin.multiply(board.data, held, sums);
    }
    __syncthreads();
#pragma unroll 1
    for (int i = threadIdx.x; i < outputs; i += blockDim.x) {
      if (!active(i / lin.count)) continue;
      if (i >= int(blockDim.x)) {  // a share of more outputs than threads
        early.bias = lin.bias_of(i % lin.count, false);
        if (lin.second) early.up_bias = lin.bias_of(i % lin.count, true);
        if (adds) early.x = *residual(lin, i);
      }
      finish(now, lin, sums, i, early);
    }
  }

  // Where output i (row, then output of the share) is added to.
  __device__ float* residual(const Lin& lin, int i) const {
    return a.x + size_t(i / lin.count) * a.dim + lin.first + i % lin.count;
  }

  __device__ void finish(const Instruction& now, const Lin& lin, const float* sums, int i, const Early& early) const {
    const int m = i / lin.count, index = i % lin.count, n = lin.first + index;
    const float y = lin.sum_of(sums, index, false, m) + early.bias;
    if (now.opcode == kQkv) {
      a.qkv[size_t(m) * (a.heads + 2 * a.kv_heads) * a.head_dim + n] = y;
    } else if (now.opcode == kUp) {
      const float up = a.gated ? lin.sum_of(sums, index, true, m) + early.up_bias : 0.0f;
      a.mid[size_t(m) * a.inner + n] = a.gated ? silu(y) * up : gelu_tanh(y);
    } else {
      *residual(lin, i) = early.x + y;
    }
  }
};

}  // namespace coconut_fast
