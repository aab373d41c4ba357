#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

#include <unistd.h>

#if COCONUT_FAST_X86
#include <sys/syscall.h>
#endif

namespace coconut_fast {

namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16, Isa::amx};

Isa detect() {
#if COCONUT_FAST_X86
  // These builtins also ask the operating system whether it saves the wide registers.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::portable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  // Every CPU that multiplies bf16 this way multiplies bytes too; the int8 kernels of this set rely on it.
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

// Linux lets a process use tiles (8 KiB more to save per thread) once it has asked; its children then may, too.
bool may_use_tiles() {
#if COCONUT_FAST_X86
  constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool allowed = has_tiles() && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return allowed;
#else
  return false;
#endif
}

}  // namespace

bool has_tiles() {
#if COCONUT_FAST_X86
  return detect() == Isa::avx512_bf16 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         __builtin_cpu_supports("amx-int8");
#else
  return false;
#endif
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
  }
  return "?";
}

bool l1_is_large() {
#ifdef _SC_LEVEL1_DCACHE_SIZE
  static const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
#else
  constexpr long bytes = 0;
#endif
  return bytes <= 0 || bytes >= 48 << 10;  // unknown: large
}

Isa best_isa() {
  static const Isa detected = detect();
  const char* asked = std::getenv("COCONUT_FAST_ISA");
  if (asked == nullptr || *asked == '\0') return detected;
  for (Isa isa : kAll) {
    if (std::string(asked) != isa_name(isa)) continue;
    if (isa <= detected || (isa == Isa::amx && may_use_tiles())) return isa;
    throw std::invalid_argument(std::string("COCONUT_FAST_ISA is ") + asked + ", but this machine runs at most " +
                                isa_name(detected) + (has_tiles() ? ": Linux refuses it the use of tiles" : ""));
  }
  throw std::invalid_argument(std::string("COCONUT_FAST_ISA is ") + asked +
                              "; expected portable, avx2, avx512, avx512_bf16 or amx");
}

}  // namespace coconut_fast
