#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace coconut_fast {

namespace {

constexpr Isa kAll[] = {Isa::portable, Isa::avx2, Isa::avx512, Isa::avx512_bf16};

Isa detect() {
#if COCONUT_FAST_X86
  // These builtins also ask the operating system whether it saves the wide registers.
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")))
    return Isa::portable;
  if (!(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")))
    return Isa::avx2;
  // Every CPU that multiplies bf16 this way multiplies bytes too; the int8 kernels of this set count on it.
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? Isa::avx512_bf16 : Isa::avx512;
#else
  return Isa::portable;
#endif
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_bf16: return "avx512_bf16";
  }
  return "?";
}

Isa best_isa() {
  static const Isa detected = detect();
  const char* asked = std::getenv("COCONUT_FAST_ISA");
  if (asked == nullptr || *asked == '\0') return detected;
  for (Isa isa : kAll) {
    if (std::string(asked) != isa_name(isa)) continue;
    if (isa <= detected) return isa;
    throw std::invalid_argument(std::string("COCONUT_FAST_ISA is ") + asked + ", but this machine runs at most " +
                                isa_name(detected));
  }
  throw std::invalid_argument(std::string("COCONUT_FAST_ISA is ") + asked +
                              "; expected portable, avx2, avx512 or avx512_bf16");
}

}  // namespace coconut_fast
