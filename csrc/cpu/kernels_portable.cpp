// The chain's kernels for Isa::portable.
#include <cmath>
#include <utility>

#include "cpu/kernels.h"
#include "cpu/sampling.h"

#define KERNEL_LEVEL 0
namespace coconut_fast::portable {
#include "cpu/kernels_body.h"
}

const coconut_fast::Kernels* coconut_fast::portable_kernels() { return &portable::kTable; }
