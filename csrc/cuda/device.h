// The few device words the persistent kernel uses, each in one place: loads, prefetch, warp sums, the grid barrier.
// Inline PTX stands behind __CUDA_ARCH__; elsewhere plain C++ with the same meaning, which is how the kernel's own
// source runs on a CPU in the tests (tests/cuda_on_cpu.h gives the rest: __syncthreads, threadIdx, shuffles).
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
static __device__ __forceinline__ float4* dynamic_shared() {
  extern __shared__ float4 memory[];
  return memory;
}
#endif

#include <cstdint>

namespace coconut_fast {

constexpr int kWarp = 32;

struct Bf16 {
  uint16_t bits;
};

static __device__ __forceinline__ float as_float(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

static __device__ __forceinline__ uint32_t as_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(x);
#else
  return __builtin_bit_cast(uint32_t, x);
#endif
}

static __device__ __forceinline__ float to_float(float x) { return x; }
static __device__ __forceinline__ float to_float(Bf16 x) { return as_float(uint32_t(x.bits) << 16); }

template <class T>
static __device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {  // to the nearest, ties to even; NaN stays NaN
  const uint32_t bits = as_bits(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

// The values in one 128-bit load.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// Values from, ..., from + 3 of a load; from is a constant multiple of 4.
template <class T>
static __device__ __forceinline__ void unpack(const uint4& v, int from, float (&x)[4]) {
  if constexpr (sizeof(T) == 4) {
    x[0] = as_float(v.x), x[1] = as_float(v.y), x[2] = as_float(v.z), x[3] = as_float(v.w);
  } else {
    const uint32_t low = from ? v.z : v.x, high = from ? v.w : v.y;
    x[0] = as_float(low << 16), x[1] = as_float(low & 0xffff0000u);
    x[2] = as_float(high << 16), x[3] = as_float(high & 0xffff0000u);
  }
}

static __device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }

// Weights: read once a pass and by one block, so they leave L1 to what is read again.
static __device__ __forceinline__ uint4 load_weights(const void* p) {
#ifdef __CUDA_ARCH__
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
#else
  return *static_cast<const uint4*>(p);
#endif
}

// Into L2. The CPU reads a byte: an address that is not the model's must not go unnoticed there.
static __device__ __forceinline__ void prefetch_line(const void* p) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#else
  (void)*static_cast<const volatile char*>(p);
#endif
}

// Sixteen bytes from global to shared memory, not waited for.
static __device__ __forceinline__ void copy_async(void* to, const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from));
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

// This thread's copies have come; others see them behind the next __syncthreads.
static __device__ __forceinline__ void copies_done() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

constexpr int kLine = 128;

// The lines of [p, p + bytes) into L2, shared out over the block.
static __device__ __forceinline__ void prefetch(const void* p, size_t bytes) {
#pragma unroll 1
  for (size_t at = threadIdx.x * size_t(kLine); at < bytes; at += blockDim.x * size_t(kLine))
    prefetch_line(static_cast<const char*>(p) + at);
}

static __device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x = fmaxf(x, shuffle_xor(x, mask));
  return x;
}

// N sums over the warp at once: afterwards v[0] of a lane is sum number lane / (32 / N). Each step halves how many sums
// a lane works on, so 32 sums cost 31 shuffles, not 160. Every sum is the same tree as warp_sum's, whatever N.
template <int N, int Mask = kWarp / 2>
static __device__ __forceinline__ void warp_sums(float* v) {
  if constexpr (N > 1) {
    const bool upper = threadIdx.x & Mask;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float kept = upper ? v[i + N / 2] : v[i], given = upper ? v[i] : v[i + N / 2];
      v[i] = kept + shuffle_xor(given, Mask);
    }
    warp_sums<N / 2, Mask / 2>(v);
  } else if constexpr (Mask > 0) {
    v[0] += shuffle_xor(v[0], Mask);
    warp_sums<1, Mask / 2>(v);
  }
}

// N sums over the block, known to all of its threads afterwards. scratch: N * (1 + warps) floats of shared memory.
template <int N>
static __device__ void block_sums(float (&v)[N], float* scratch) {
  const int warps = blockDim.x / kWarp, warp = threadIdx.x / kWarp;
  warp_sums<N>(v);
  __syncthreads();  // the last sums have been read
  if (threadIdx.x % (kWarp / N) == 0) scratch[N * (1 + warp) + threadIdx.x % kWarp / (kWarp / N)] = v[0];
  __syncthreads();
  if (threadIdx.x < N) {
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += scratch[N * (1 + w) + threadIdx.x];
    scratch[threadIdx.x] = sum;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = scratch[i];
}

// ---- the grid barrier: one number that only grows ---------------------------------------------------------------

// All that this block has written is visible to whoever sees the count.
static __device__ __forceinline__ void arrive(uint32_t* counter, uint32_t count) {
  __syncthreads();
  if (threadIdx.x == 0) {
#ifdef __CUDA_ARCH__
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(counter), "r"(count) : "memory");
#else
    *counter += count;
#endif
  }
}

static __device__ __forceinline__ void wait(const uint32_t* counter, uint32_t count) {
  if (threadIdx.x == 0) {
#ifdef __CUDA_ARCH__
    uint32_t seen;
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    while (seen < count);
#elif !defined(__CUDACC__)  // nvcc reads this for the host too
    while (*static_cast<const volatile uint32_t*>(counter) < count) yield_block();
#endif
  }
  __syncthreads();
}

}  // namespace coconut_fast
