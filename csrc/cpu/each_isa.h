// Includes KERNEL_SOURCE once per instruction set, in the namespaces portable, avx2, avx512 and, where the includer
// defines KERNEL_BF16, avx512_bf16 of coconut_fast. See isa.h for how and why; the includer must first include all
// headers that the source needs.
namespace coconut_fast {

#define KERNEL_LEVEL 0
namespace portable {
#include KERNEL_SOURCE
}  // namespace portable
#undef KERNEL_LEVEL

#if COCONUT_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#define KERNEL_LEVEL 1
namespace avx2 {
#include KERNEL_SOURCE
}  // namespace avx2
#undef KERNEL_LEVEL
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#define KERNEL_LEVEL 2
namespace avx512 {
#include KERNEL_SOURCE
}  // namespace avx512
#undef KERNEL_LEVEL
#pragma GCC pop_options

#ifdef KERNEL_BF16
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx512vnni,prefer-vector-width=512")
#define KERNEL_LEVEL 3
namespace avx512_bf16 {
#include KERNEL_SOURCE
}  // namespace avx512_bf16
#undef KERNEL_LEVEL
#pragma GCC pop_options
#endif
#endif

}  // namespace coconut_fast

#undef KERNEL_SOURCE
#undef KERNEL_BF16
