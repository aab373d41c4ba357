// The persistent kernel: runs a schedule (coconut_fast/infer/persistent.py) on thread blocks that stay resident.
//
// A block reads its next instruction, asks for the first weights of it, waits until all blocks have finished the phase
// before, runs its share, and counts up. The residual stream, all sums and the state are fp32 and added in a fixed
// order; weights and cache are bf16 or fp32. Memory a pass moves: all weights once, the keys and values of the rows,
// and per barrier a few KB of activations that stay in L2.
#include "cuda/block.h"

namespace coconut_fast {

template <class T, int B>
__global__ void __launch_bounds__(kThreads, 1) think(const Arguments a, int capacity) {
  Block<T, B> block(a, capacity);
  for (int at = a.begin; at < a.end; ++at) {
    const Instruction& now = block.board.program[at % a.phases];
    block.pass = at / a.phases;
    Linear<T, B> lin;
    typename Linear<T, B>::Held held;
    typename Block<T, B>::Early early;
    const bool linear = block.linear(now, lin);
    if (linear) block.ask(now, lin, held, early);
    if (at + 1 < a.end) block.fetch(block.board.program[(at + 1) % a.phases]);
    const int due = block.pass * a.phases + now.wait - a.begin;  // phases before `begin` are complete
    wait(a.counter, max(due, 0) * gridDim.x);
    if (linear) block.run(now, lin, held, early);
    else if (now.opcode == kAttend) block.attend(now);
    else block.feed(now);
    arrive(a.counter, now.arrive);
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
  const size_t fixed = Offsets<T>(a, threads).data;
  for (int capacity = divide_up(widest, step) * step; capacity > 0; capacity -= step) {
    size_t floats = B * size_t(capacity) + sums;
    if (floats < size_t(attend_floats(a.head_dim, threads))) floats = attend_floats(a.head_dim, threads);
    bytes = fixed + sizeof(float) * floats;
    if (bytes <= limit) return capacity;
  }
  return 0;
}

// The error in words; the runtime forgets it, or it would show it to whoever asks for one next.
static const char* explain(cudaError_t error) {
  cudaGetLastError();
  return cudaGetErrorString(error);
}

template <class T, int B>
static const char* launch(const Arguments& a, int blocks, int threads, cudaStream_t stream) {
  int device = 0, limit = 0, processors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return explain(error);
  size_t bytes = 0;
  int capacity = choose_capacity<T, B>(a, blocks, threads, limit, bytes);
  if (!capacity) return "the model's layers are too wide for a block's shared memory";
  const auto kernel = think<T, B>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
  if (error != cudaSuccess) return explain(error);
  if (blocks > resident * processors) return "the device cannot keep so many blocks resident at once";
  Arguments copy = a;
  void* arguments[] = {&copy, &capacity};
  error = cudaMemsetAsync(a.counter, 0, sizeof(uint32_t), stream);
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, bytes, stream);
  return error == cudaSuccess ? nullptr : explain(error);
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
