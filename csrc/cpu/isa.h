// Which instruction set the CPU kernels use. An x86-64 binary chooses at run time; on Arm it is the portable one.
//
// A kernel source is compiled once per instruction set, in its own namespace and with exactly that set enabled: by
// each_isa.h, or, for the native engine, by one file per set (kernels_*.cpp). Standard headers are included before,
// outside the pragmas, so that nothing they define needs a newer CPU. The source learns its target from KERNEL_LEVEL,
// the number of the Isa: up to GCC 12 the pragma does not change macros such as __AVX2__ and __AVX512F__ in C++.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define COCONUT_FAST_X86 1
#else
#define COCONUT_FAST_X86 0
#endif

namespace coconut_fast {

// In rising order; each contains the ones before it. The names are those COCONUT_FAST_ISA takes.
enum class Isa {
  portable,     // whatever the compiler assumes: SSE2 on x86-64, NEON on aarch64
  avx2,         // avx2,fma,f16c
  avx512,       // + avx512f,avx512bw,avx512dq,avx512vl
  avx512_bf16,  // + avx512bf16,avx512vnni
  amx,          // + amx-tile,amx-bf16,amx-int8, for products of batches in the chain
};

// The best set that this build has and this machine runs, except amx. The environment variable COCONUT_FAST_ISA, read
// at every call, requests another one by name; a name that is unknown or that this machine cannot run throws
// std::invalid_argument. amx must be requested: its kernels have never run on a CPU that has tiles.
Isa best_isa();

// Whether amx can be requested: the CPU has tiles, and the operating system saves them.
bool has_tiles();

const char* isa_name(Isa isa);

// Whether the L1 data cache has 48 KiB or more (or an unknown size), so that weights can be prefetched into it beside
// those being read. Where it has 32 they displace each other, and are better prefetched to L2 (measured on Zen 4).
bool l1_is_large();

inline void fetch_line(const void* at, bool to_l1) {
  if (to_l1) __builtin_prefetch(at, 0, 3);
  else __builtin_prefetch(at, 0, 2);
}

}  // namespace coconut_fast
