// The few device primitives the persistent kernel uses: loads, prefetch, warp sums, the grid barrier. Inline PTX is
// under __CUDA_ARCH__; elsewhere plain C++ does the same, so that the tests can run the kernel's own source on a CPU
// (tests/cuda_on_cpu.h provides the rest: __syncthreads, threadIdx, shuffles).
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

// Returns x, hiding its value from the compiler: computations with it cannot be hoisted out of the loop over phases,
// where they would occupy registers in all of them.
static __device__ __forceinline__ int opaque(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// How many values one 128-bit load has.
template <class T>
constexpr int kVector = 16 / sizeof(T);

// The values of a load.
template <class T>
static __device__ __forceinline__ void spread(const uint4& v, float (&x)[kVector<T>]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) x[i] = as_float(words[i]);
    else x[2 * i] = as_float(words[i] << 16), x[2 * i + 1] = as_float(words[i] & 0xffff0000u);
  }
}

// The values of a load, each rounded to the storage type.
template <class T>
static __device__ __forceinline__ uint4 pack(const float (&x)[kVector<T>]) {
  if constexpr (sizeof(T) == 4) return {as_bits(x[0]), as_bits(x[1]), as_bits(x[2]), as_bits(x[3])};
  else {
    uint32_t two[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      two[i] = from_float<T>(x[2 * i]).bits | uint32_t(from_float<T>(x[2 * i + 1]).bits) << 16;
    return {two[0], two[1], two[2], two[3]};
  }
}

static __device__ __forceinline__ float4 load4(const float* p) { return *reinterpret_cast<const float4*>(p); }
static __device__ __forceinline__ float4 load4(const Bf16* p) {
  const uint2 v = *reinterpret_cast<const uint2*>(p);
  return {as_float(v.x << 16), as_float(v.x & 0xffff0000u), as_float(v.y << 16), as_float(v.y & 0xffff0000u)};
}

static __device__ __forceinline__ void put4(const float4& v, float* x) {
  x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
}

// Copies sixteen bytes from global to shared memory asynchronously.
static __device__ __forceinline__ void copy_async(void* to, const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(uint32_t(__cvta_generic_to_shared(to))), "l"(from)
               : "memory");
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

// Ends a group of this thread's copies.
static __device__ __forceinline__ void copies_end() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;");
#endif
}

// Waits until all but the last N groups of this thread's copies have arrived, visible to this thread.
template <int N>
static __device__ __forceinline__ void copies_wait() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

static __device__ __forceinline__ float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }

// The value of lane `from`.
static __device__ __forceinline__ float shuffle(float x, int from) { return __shfl_sync(~0u, x, from); }

static __device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = kWarp / 2; mask > 0; mask /= 2) x += shuffle_xor(x, mask);
  return x;
}

// N sums over the warp at once: afterwards v[0] of a lane is sum number lane / (32 / N). Each step halves the number
// of sums a lane works on, so 32 sums cost 31 shuffles, not 160. Every sum is the same tree as warp_sum's, whatever N.
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

// A sum over the block, known to all of its threads afterwards. scratch: a float of shared memory for each warp.
static __device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  __syncthreads();  // the previous sums have been read
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0;
  for (unsigned w = 0; w < blockDim.x / kWarp; ++w) sum += scratch[w];
  return sum;
}

// ---- the grid barrier: one number that only grows ---------------------------------------------------------------

// Everything this block has written is visible to any block that sees the count.
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
#elif !defined(__CUDACC__)  // nvcc compiles this for the host too
    while (*static_cast<const volatile uint32_t*>(counter) < count) yield_block();
#endif
  }
  __syncthreads();
}

}  // namespace coconut_fast
