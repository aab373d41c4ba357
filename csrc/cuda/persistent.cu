// The persistent kernel: runs a schedule (coconut_fast/infer/persistent.py) on thread blocks that stay resident.
//
// A block reads its next instruction, waits until all blocks have finished the phase that it depends on, runs its share
// and increments the barrier's counter; weights are copied ahead of the barriers. The residual stream, all sums and the
// state are fp32 and added in a fixed order; weights and cache are bf16 or fp32. A pass moves all weights once, the
// keys and values of the rows, and per barrier a few KB of activations that stay in L2.
#include <algorithm>

#include "cuda/block.h"

namespace coconut_fast {

template <class T, int B>
__global__ void __launch_bounds__(kThreads, 1) think(const __grid_constant__ Work work) {
  Block<T, B> block(work);
  const Arguments& a = work.a;
  int index = a.begin % a.phases;
  block.ring.start(a);
#pragma unroll 1
  while (block.pass * a.phases + index < a.end) {
    const Instruction& now = block.program[index];
    const uint32_t due = max(block.pass * a.phases + now.wait - a.begin, 0) * gridDim.x;  // all before `begin` is done
    if (now.opcode == kAttend) {
      block.attend(now, due);
    } else if (now.opcode == kFeed) {
      wait(a.counter, due);
      block.feed(now);
    } else {
      block.linear(now, due);
    }
    arrive(a.counter, now.arrive);
    block.ring.pay(a.phases);
    if (++index == a.phases) index = 0, ++block.pass;
  }
}

// ---- the launch, on the host --------------------------------------------------------------------------------------

// Deals the weights and lays out shared memory -> its bytes.
template <class T, int B>
static size_t lay_out(Work& work, int blocks, int threads) {
  const Arguments& a = work.a;
  const int warps = threads / kWarp, qkv = (a.heads + 2 * a.kv_heads) * a.head_dim;
  work.deals[kQkv] = deal<T>(a.dim, 0, warps), work.deals[kOut] = deal<T>(a.heads * a.head_dim, 0, warps);
  work.deals[kUp] = deal<T>(a.dim, a.gated ? a.inner : 0, warps), work.deals[kDown] = deal<T>(a.inner, 0, warps);
  const int outputs[kOpcodes] = {0, qkv, 0, a.dim, a.inner, a.dim};
  size_t sums = attend_floats(a.head_dim, threads);
  for (int op = 0; op < kOpcodes; ++op) {
    const Deal& by = work.deals[op];
    sums = std::max(sums, size_t(divide_up(outputs[op], blocks)) * (by.second ? 2 : 1) * by.slices * B);
  }
  work.per_dim = 1.0f / a.dim;
  size_t at = 0;
  const auto part = [&](size_t bytes) { return int((at += (bytes + 15) / 16) - (bytes + 15) / 16); };
  part(sizeof(Instruction) * a.phases + sizeof(Deal) * kOpcodes);
  work.layers = part(sizeof(Layer) * a.depth), work.rows = part(sizeof(RowStates));
  work.scratch = part(sizeof(float) * warps), work.moments = part(sizeof(float2) * work.deals[kQkv].slices * B);
  work.data = part(sizeof(float) * sums), work.ring = part(Ring<T>::bytes(threads));
  return at * 16;
}

// The error's text. Clears it in the runtime, which would otherwise report it to the next caller that checks.
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
  Work work{};
  work.a = a;
  const size_t bytes = lay_out<T, B>(work, blocks, threads);
  if (bytes > size_t(limit)) return "the model's layers are too wide for a block's shared memory";
  const auto kernel = think<T, B>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes));
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
  if (error != cudaSuccess) return explain(error);
  if (blocks > resident * processors) return "the device cannot keep so many blocks resident at once";
  void* arguments[] = {&work};
  error = cudaMemsetAsync(a.counter, 0, sizeof(uint32_t), stream);
  if (error == cudaSuccess)
    error = cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(threads), arguments, bytes, stream);
  return error == cudaSuccess ? nullptr : explain(error);
}

template <class T>
static const char* launch_batch(const Arguments& a, int blocks, int threads, cudaStream_t stream) {
  if (a.batch <= 1) return launch<T, 1>(a, blocks, threads, stream);
  if (a.batch <= 2) return launch<T, 2>(a, blocks, threads, stream);
  return launch<T, 4>(a, blocks, threads, stream);
}

}  // namespace coconut_fast

extern "C" const char* coconut_fast_persistent(const coconut_fast::Arguments* arguments, int blocks, int threads,
                                               void* stream) {
  using namespace coconut_fast;
  const Arguments& a = *arguments;
  if (a.batch < 1 || a.batch > kMaxRows) return "a batch has 1 to 4 rows";
  if (threads % kWarp || threads < kWarp || threads > kThreads) return "threads are not whole warps, at most 512";
  if (a.head_dim > kWarp * (a.bf16 ? kVector<Bf16> : kVector<float>)) return "a head is wider than 32 loads";
  const auto queue = static_cast<cudaStream_t>(stream);
  return a.bf16 ? launch_batch<Bf16>(a, blocks, threads, queue) : launch_batch<float>(a, blocks, threads, queue);
}
