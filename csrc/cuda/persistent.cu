// The persistent kernel: runs a schedule (coconut_fast/infer/persistent.py) on thread blocks that stay resident.
//
// A block reads its next instruction, asks for the first weights of it, waits until all blocks have finished the phase
// before, runs its share, and counts up. The residual stream, all sums and the state are fp32 and added in a fixed order;
// weights and cache are bf16 or fp32. Memory a pass moves: all weights once, the keys and values of the rows, and
// per barrier a few KB of activations that stay in L2.
#include "cuda/attend.h"
#include "cuda/device.h"
#include "cuda/linear.h"
#include "cuda/program.h"

#include <cstdio>

namespace coconut_fast {

// Shared memory: where each row stands, scratch for sums over the block, then what the phase needs.
struct Rows {
  int passes[kMaxRows], lengths[kMaxRows];
};

static inline __host__ __device__ int scratch_floats(int threads) { return kMaxRows * (1 + threads / kWarp); }

template <class T, int B>
struct Block {
  using Lin = Linear<T, B>;
  const Arguments& a;
  const Rows& place;
  float* scratch;
  float* data;
  int capacity;  // floats of one row of staged inputs
  int pass = 0;
  bool active[B];

  __device__ Block(const Arguments& a, const Rows& place, float* after, int capacity)
      : a(a), place(place), scratch(after), data(after + scratch_floats(blockDim.x)), capacity(capacity) {}

  __device__ void start(int p) {
    pass = p;
#pragma unroll
    for (int m = 0; m < B; ++m) active[m] = m < a.batch && pass < place.passes[m];
  }

  __device__ bool linear(const Instruction& now, Lin& to) const {
    const Layer& layer = a.layers[now.layer];
    const int fused = a.heads * a.head_dim;
    switch (now.opcode) {
      case kQkv: to.init(layer.qkv, layer.qkv_bias, a.dim, now, 0); return true;
      case kOut: to.init(layer.o, layer.o_bias, fused, now, 0); return true;
      case kUp: to.init(layer.up, layer.up_bias, a.dim, now, a.gated ? a.inner : 0); return true;
      case kDown: to.init(layer.down, layer.down_bias, a.inner, now, 0); return true;
      default: return false;
    }
  }

  // Chunks of a row that fit into the staged inputs at once.
  __device__ int chunks_at_once(const Lin& lin) const { return capacity / (lin.chunk * Lin::kLoad); }

  // Into L2, while this block still waits or works: what the next instruction will read.
  __device__ void fetch(const Instruction& next) {
    Lin lin;
    if (linear(next, lin)) lin.fetch();
    else if (next.opcode == kAttend)
      each_split(next, [&](Attend<T>& attend, int m, int head, int split, const Splits& seen, int position) {
        attend.fetch(m, head, split, seen, position);
      });
  }

  template <class Run>
  __device__ void each_split(const Instruction& now, Run run) {
    Attend<T> attend(a, a.layers[now.layer], data);
    for (int tile = now.first; tile < now.last; ++tile) {
      const int way = tile % a.ways, head = tile / a.ways % a.heads, m = tile / a.ways / a.heads;
      if (m >= a.batch || pass >= place.passes[m]) continue;
      const int position = place.lengths[m] + pass;
      const Splits seen(position, a.layers[now.layer].window);
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
      const bool made = pass > 0 && pass <= place.passes[m], more = pass < place.passes[m];
      float *x = a.x + size_t(m) * a.dim, *hidden = a.hidden + size_t(m) * a.dim;
      // Each thread comes back to its own elements only, so nobody waits between these loops.
      if (made) {
        const T *weight = static_cast<const T*>(a.final_norm), *bias = static_cast<const T*>(a.final_norm_bias);
        const bool only[1] = {true};
        float mean[1], scale[1];
        statistics<1>(x, a.dim, a.layer_norm, a.eps, only, mean, scale, scratch);
        for (int k = threadIdx.x; k < a.dim; k += blockDim.x)
          hidden[k] = (x[k] - mean[0]) * scale[0] * to_float(weight[k]) + (bias ? to_float(bias[k]) : 0.0f);
      }
      if (more) {
        float factor = 1.0f;
        if (a.rescale > 0) {
          float squares[1] = {};
          for (int k = threadIdx.x; k < a.dim; k += blockDim.x) squares[0] = fmaf(hidden[k], hidden[k], squares[0]);
          block_sums<1>(squares, scratch);
          factor = a.rescale / fmaxf(sqrtf(squares[0]), 1.1754943508222875e-38f);
        }
        const T* embedding = static_cast<const T*>(a.embedding);
        if (embedding) embedding += size_t(place.lengths[m] + pass) * a.dim;
        for (int k = threadIdx.x; k < a.dim; k += blockDim.x)
          x[k] = hidden[k] * factor + (embedding ? to_float(embedding[k]) : 0.0f);
      }
      if (pass == a.passes && threadIdx.x == 0) {
        a.positions[m] += place.passes[m], a.lengths[m] += place.passes[m], a.remaining[m] -= place.passes[m];
      }
    }
  }

  // y = linear(inputs of the phase), the held weights having been asked for before the barrier.
  __device__ void run(const Instruction& now, Lin& lin, typename Lin::Held& held) {
    float mean[B], scale[B];
    const Layer& layer = a.layers[now.layer];
    const bool normed = now.opcode == kQkv || now.opcode == kUp;
    if (normed) statistics<B>(a.x, a.dim, a.layer_norm, a.eps, active, mean, scale, scratch);
    float* sums = data + B * capacity;
    const int at_once = chunks_at_once(lin);
    for (int from = 0; from < lin.chunks; from += at_once) {
      lin.slice(from, from + at_once);
      if (from > 0) {
        lin.load(0, lin.slots(), held);
        __syncthreads();  // the slice before has been read
      }
      const int staged = (lin.end - lin.begin) * lin.chunk * Lin::kLoad, first = from * lin.chunk * Lin::kLoad;
      const T* weight = static_cast<const T*>(now.opcode == kQkv ? layer.norm1 : layer.norm2);
      const T* bias = static_cast<const T*>(now.opcode == kQkv ? layer.norm1_bias : layer.norm2_bias);
#pragma unroll
      for (int m = 0; m < B; ++m) {
        const Splits seen(active[m] ? place.lengths[m] + pass : 0, layer.window);
        for (int i = threadIdx.x; i < staged; i += blockDim.x) {
          const int k = first + i;
          float value = 0.0f;  // of rows that rest, and behind the end of the row
          if (active[m] && k < lin.width) {
            if (normed) {
              value = (a.x[size_t(m) * a.dim + k] - mean[m]) * scale[m] * to_float(weight[k]);
              if (bias) value += to_float(bias[k]);
            } else if (now.opcode == kOut) {
              value = combined(a, m, k, seen);
            } else {
              value = a.mid[size_t(m) * a.inner + k];
            }
          }
          data[m * staged + chunk_place(i)] = value;
        }
      }
      __syncthreads();
      lin.multiply(data, staged, held, sums);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < lin.count * B; i += blockDim.x) {
      const int m = i / lin.count, index = i % lin.count, n = now.first + index;
      if (m >= a.batch || pass >= place.passes[m]) continue;
      float y = lin.output(sums, index, m, false);
      switch (now.opcode) {
        case kQkv: a.qkv[size_t(m) * (a.heads + 2 * a.kv_heads) * a.head_dim + n] = y; break;
        case kUp:
          a.mid[size_t(m) * a.inner + n] = a.gated ? silu(y) * lin.output(sums, index, m, true) : gelu_tanh(y);
          break;
        default: a.x[size_t(m) * a.dim + n] += y;
      }
    }
  }

  static __device__ __forceinline__ int chunk_place(int i) { return coconut_fast::place<kVector<T>>(i); }
};

template <class T, int B>
__global__ void __launch_bounds__(kThreads, 1) think(const Arguments a, int capacity) {
  float4* shared = dynamic_shared();
  Rows& rows = *reinterpret_cast<Rows*>(shared);
  if (threadIdx.x < kMaxRows) {
    const int m = threadIdx.x;
    rows.passes[m] = m < a.batch ? max(min(a.remaining[m], a.passes), 0) : 0;
    rows.lengths[m] = m < a.batch ? a.lengths[m] : 0;
  }
  __syncthreads();
  Block<T, B> block(a, rows, reinterpret_cast<float*>(&rows + 1), capacity);
  const Instruction* program = a.program + size_t(blockIdx.x) * a.phases;
  Instruction next = program[a.begin % a.phases];
  for (int at = a.begin; at < a.end; ++at) {
    const Instruction now = next;
    next = program[(at + 1) % a.phases];
    block.start(at / a.phases);
    Linear<T, B> lin;
    typename Linear<T, B>::Held held;
    const bool linear = block.linear(now, lin);
    if (linear) {
      lin.slice(0, block.chunks_at_once(lin));
      lin.load(0, lin.slots(), held);
    }
    if (at + 1 < a.end) block.fetch(next);
    const int due = at / a.phases * a.phases + now.wait - a.begin;  // phases before `begin` are complete
    wait(a.counter, max(due, 0) * gridDim.x);
    if (linear) block.run(now, lin, held);
    else if (now.opcode == kAttend) block.attend(now);
    else block.feed(now);
    if (now.arrive) arrive(a.counter);
  }
}

// ---- the launch, on the host --------------------------------------------------------------------------------------

// Floats of one row's staged inputs, so that all of a block's shared memory fits into `limit` bytes; 0 where none fits.
template <class T, int B>
static int choose_capacity(const Arguments& a, int blocks, int threads, size_t limit, size_t& bytes) {
  using Lin = Linear<T, B>;
  const struct {
    int outputs, width;
  } phases[] = {{(a.heads + 2 * a.kv_heads) * a.head_dim, a.dim},
                {a.dim, a.heads * a.head_dim},
                {a.gated ? 2 * a.inner : a.inner, a.dim},
                {a.dim, a.inner}};
  size_t sums = 0;
  int widest = 0, step = 0;
  for (const auto& phase : phases) {
    const int loads = divide_up(phase.width, Lin::kLoad), chunk = chunk_of(loads), chunks = divide_up(loads, chunk);
    const size_t rows = divide_up(phase.outputs, blocks) + 1;  // a gated share has two roundings
    if (rows * chunks * B > sums) sums = rows * chunks * B;
    if (chunks * chunk * Lin::kLoad > widest) widest = chunks * chunk * Lin::kLoad;
    if (chunk * Lin::kLoad > step) step = chunk * Lin::kLoad;
  }
  const size_t fixed = sizeof(Rows) + sizeof(float) * scratch_floats(threads);
  for (int capacity = divide_up(widest, step) * step; capacity > 0; capacity -= step) {
    size_t floats = B * size_t(capacity) + sums;
    if (floats < size_t(attend_floats(a.head_dim, threads))) floats = attend_floats(a.head_dim, threads);
    bytes = fixed + sizeof(float) * floats;
    if (bytes <= limit) return capacity;
  }
  return 0;
}

template <class T, int B>
static const char* launch(const Arguments& a, int blocks, int threads, cudaStream_t stream) {
  int device = 0, limit = 0, processors = 0, resident = 0;
  if (cudaGetDevice(&device) != cudaSuccess) return "no CUDA device";
  cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  size_t bytes = 0;
  int capacity = choose_capacity<T, B>(a, blocks, threads, limit, bytes);
  if (!capacity) return "the model's layers are too wide for a block's shared memory";
  const auto kernel = think<T, B>;
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
  if (blocks > resident * processors) return "the device cannot keep so many blocks resident at once";
  Arguments copy = a;
  void* arguments[] = {&copy, &capacity};
  cudaMemsetAsync(a.counter, 0, sizeof(uint32_t), stream);
  const cudaError_t error = cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, bytes, stream);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class T>
static const char* launch_batch(const Arguments& a, int blocks, int threads, cudaStream_t stream) {
  if (a.batch <= 1) return launch<T, 1>(a, blocks, threads, stream);
  if (a.batch <= 2) return launch<T, 2>(a, blocks, threads, stream);
  if (a.batch <= 4) return launch<T, 4>(a, blocks, threads, stream);
  return launch<T, 8>(a, blocks, threads, stream);
}

}  // namespace coconut_fast

extern "C" const char* coconut_fast_persistent(const coconut_fast::Arguments* arguments, int blocks, int threads,
                                               void* stream) {
  using namespace coconut_fast;
  const Arguments& a = *arguments;
  if (a.batch < 1 || a.batch > kMaxRows) return "a batch has 1 to 8 rows";
  if (threads % kWarp || threads < kWarp || threads > kThreads) return "threads are not whole warps, at most 512";
  if (a.head_dim > kMaxHead) return "a head has more than 256 dimensions";
  const auto queue = static_cast<cudaStream_t>(stream);
  return a.bf16 ? launch_batch<Bf16>(a, blocks, threads, queue) : launch_batch<float>(a, blocks, threads, queue);
}
