// Enough of CUDA for csrc/cuda/persistent.cu to run on a CPU: g++ -include tests/cuda_on_cpu.h -x c++ persistent.cu.
//
// Every CUDA thread of the grid is a fiber with its own stack; one OS thread runs them in turn. A fiber yields where
// CUDA threads wait for each other (__syncthreads, a shuffle, the grid barrier), and only there: so what one block
// writes before a barrier is visible after it, and a barrier that not all threads reach hangs here as it does on a
// device. Blocks run in the order of their numbers up to their next wait; COCONUT_FAST_REVERSED in the environment
// reverses it.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__
#define __grid_constant__

using std::max;
using std::min;

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct dim3 {
  unsigned x, y = 1, z = 1;
  dim3(unsigned x) : x(x) {}
};

namespace cuda_on_cpu {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

// Threads that wait for each other: `size` of them must arrive before any continues.
struct Meeting {
  int size = 0, here = 0;
  unsigned round = 0;
};

struct Block {
  Meeting all;
  std::vector<Meeting> warps;
  std::vector<float> exchanged;  // (2, threads): values lanes exchange; with two, one meeting per shuffle is enough
  std::unique_ptr<float4[]> shared;
};

struct Fiber {
  jmp_buf place;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  dim3 thread{0}, block{0};
  Block* home = nullptr;
  unsigned shuffles = 0;
  bool started = false, finished = false;
};

inline Fiber* current = nullptr;
inline jmp_buf scheduler;
inline dim3 block_size{0}, grid_size{0};
inline void (*entry)(void*) = nullptr;
inline void* entry_argument = nullptr;

inline void give_way() {
  if (!_setjmp(current->place)) _longjmp(scheduler, 1);
}

inline void meet(Meeting& meeting) {
  const unsigned round = meeting.round;
  if (++meeting.here == meeting.size) {
    meeting.here = 0, ++meeting.round;
    return;
  }
  while (meeting.round == round) give_way();
}

inline void run_fiber() {
  entry(entry_argument);
  current->finished = true;
  _longjmp(scheduler, 1);
}

// Runs a fiber until it yields. Only starting one switches contexts through the kernel (two system calls).
__attribute__((noinline)) inline void resume(Fiber& fiber) {
  current = &fiber;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.place, 1);
  fiber.started = true;
  setcontext(&fiber.context);
}

__attribute__((noinline)) inline void prepare(Fiber& fiber, int thread, int block, Block& home) {
  fiber.thread = dim3(thread), fiber.block = dim3(block), fiber.home = &home;
  fiber.stack = std::make_unique_for_overwrite<char[]>(kStack);
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, run_fiber, 0);
}

inline void run_grid(int blocks, int threads, size_t shared_bytes) {
  grid_size = dim3(blocks), block_size = dim3(threads);
  std::vector<Block> homes(blocks);
  std::vector<std::unique_ptr<Fiber>> fibers;
  for (int b = 0; b < blocks; ++b) {
    Block& home = homes[b];
    home.all.size = threads;
    home.warps.resize(threads / kWarp);
    for (Meeting& warp : home.warps) warp.size = kWarp;
    home.exchanged.resize(2 * threads);
    home.shared = std::make_unique<float4[]>((shared_bytes + 15) / 16);
    std::memset(home.shared.get(), 0xff, shared_bytes);  // NaN: nothing may be read that has not been written
    for (int t = 0; t < threads; ++t) {
      fibers.push_back(std::make_unique<Fiber>());
      prepare(*fibers.back(), t, b, home);
    }
  }
  if (std::getenv("COCONUT_FAST_REVERSED")) std::reverse(fibers.begin(), fibers.end());
  for (bool more = true; more;) {
    more = false;
    for (const auto& fiber : fibers) {
      if (!fiber->finished) resume(*fiber);
      more |= !fiber->finished;
    }
  }
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->thread)
#define blockIdx (cuda_on_cpu::current->block)
#define blockDim (cuda_on_cpu::block_size)
#define gridDim (cuda_on_cpu::grid_size)

inline void __syncthreads() { cuda_on_cpu::meet(cuda_on_cpu::current->home->all); }
inline void __syncwarp() {
  cuda_on_cpu::meet(cuda_on_cpu::current->home->warps[threadIdx.x / cuda_on_cpu::kWarp]);
}
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline void yield_block() { cuda_on_cpu::give_way(); }
inline float4* dynamic_shared() { return cuda_on_cpu::current->home->shared.get(); }

inline float __shfl_sync(unsigned, float x, int lane) {
  cuda_on_cpu::Fiber& me = *cuda_on_cpu::current;
  float* side = me.home->exchanged.data() + (me.shuffles++ % 2) * blockDim.x;
  side[threadIdx.x] = x;
  __syncwarp();
  return side[threadIdx.x / cuda_on_cpu::kWarp * cuda_on_cpu::kWarp + lane];
}
inline float __shfl_xor_sync(unsigned all, float x, int mask) {
  return __shfl_sync(all, x, int(threadIdx.x % cuda_on_cpu::kWarp) ^ mask);
}

// ---- the host's side ----------------------------------------------------------------------------------------------

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum { cudaDevAttrMaxSharedMemoryPerBlockOptin, cudaDevAttrMultiProcessorCount };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };

// Small on purpose where a test asks for it: long rows are then staged slice by slice.
inline int shared_limit() {
  const char* asked = std::getenv("COCONUT_FAST_SHARED_LIMIT");
  return asked ? std::atoi(asked) : 227 << 10;
}

// An error stays until it is read, and makes a launch fail.
inline cudaError_t last_error = cudaSuccess;
inline cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
inline const char* cudaGetErrorString(cudaError_t error) { return error ? "invalid value" : "no error"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
  return *value = attribute == cudaDevAttrMultiProcessorCount ? 132 : shared_limit(), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, int, int) {
  return std::getenv("COCONUT_FAST_ATTRIBUTE_FAILS") ? last_error = cudaErrorInvalidValue : cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t) {
  return std::memset(p, value, bytes), cudaSuccess;
}

template <class Argument>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Argument), dim3 blocks, dim3 threads, void** arguments,
                                        size_t shared_bytes, cudaStream_t) {
  if (last_error) return last_error;
  struct Call {
    void (*kernel)(Argument);
    void** arguments;
  } call{kernel, arguments};
  cuda_on_cpu::entry = [](void* p) {
    const Call& call = *static_cast<Call*>(p);
    call.kernel(*static_cast<std::remove_const_t<Argument>*>(call.arguments[0]));
  };
  cuda_on_cpu::entry_argument = &call;
  cuda_on_cpu::run_grid(blocks.x, threads.x, shared_bytes);
  return cudaSuccess;
}
