// All kernels of one instruction set: included inside its namespace with KERNEL_LEVEL defined (the number of its Isa).
// The order matters: each header uses what the ones before it define.
#include "cpu/vec.h"
#define INLINE_LAMBDA __attribute__((always_inline))
#include "cpu/rowwise_kernel.h"
#include "cpu/decode_attention_kernel.h"
#include "cpu/linear_kernel.h"
#include "cpu/sampling_kernel.h"

#if KERNEL_LEVEL >= 3
constexpr InputKind kBf16Input = InputKind::bf16, kInt8Input = InputKind::split16;
constexpr LinearKernel kBf16 = linear_chunk<Bf16Dot>, kInt8 = linear_chunk<Int8Dot>;
#else
constexpr InputKind kBf16Input = InputKind::fp32, kInt8Input = InputKind::fp32;
constexpr LinearKernel kBf16 = linear_chunk<Bf16>, kInt8 = linear_chunk<Int8>;
#endif

static const Kernels kTable = {
    .isa = static_cast<Isa>(KERNEL_LEVEL),
    .input = {InputKind::fp32, kBf16Input, kInt8Input},
    .linear = {linear_chunk<Fp32>, kBf16, kInt8},
    .norm = norm,
    .prepare = prepare,
    .finish_store = finish_store,
    .finish_add = finish_add,
    .finish_activate = finish_activate,
    .rotary = rotary,
    .write = write,
    .query = query,
    .attend = attend,
    .pick = pick,
    .tally = tally,
    .collect = collect,
};
