#include "cpu/kernels.h"

#include <stdexcept>
#include <string>

namespace coconut_fast {

const Kernels& kernels_for(Isa isa) {
  const Kernels* found = nullptr;
  switch (isa) {
    case Isa::portable: found = portable_kernels(); break;
    case Isa::avx2: found = avx2_kernels(); break;
    case Isa::avx512: found = avx512_kernels(); break;
    case Isa::avx512_bf16: found = avx512_bf16_kernels(); break;
    case Isa::amx: found = amx_kernels(); break;
  }
  if (!found) throw std::invalid_argument(std::string("this build has no kernels for ") + isa_name(isa));
  return *found;
}

}  // namespace coconut_fast
