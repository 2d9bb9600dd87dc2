// Includes ATTNKERN_KERNELS once per instruction set. Each copy is compiled for its set, in its own namespace
// attnkern::ATTNKERN_ISA, so that one binary uses what the processor offers.
#define ATTNKERN_ISA baseline
#define ATTNKERN_VECTOR_BYTES 16
#define ATTNKERN_VECTOR_REGISTERS 16
#include ATTNKERN_KERNELS
#undef ATTNKERN_ISA
#undef ATTNKERN_VECTOR_BYTES
#undef ATTNKERN_VECTOR_REGISTERS

#if defined(ATTNKERN_X86)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ATTNKERN_ISA avx2
#define ATTNKERN_VECTOR_BYTES 32
#define ATTNKERN_VECTOR_REGISTERS 16
#include ATTNKERN_KERNELS
#undef ATTNKERN_ISA
#undef ATTNKERN_VECTOR_BYTES
#undef ATTNKERN_VECTOR_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define ATTNKERN_ISA avx512
#define ATTNKERN_VECTOR_BYTES 64
#define ATTNKERN_VECTOR_REGISTERS 32
#include ATTNKERN_KERNELS
#undef ATTNKERN_ISA
#undef ATTNKERN_VECTOR_BYTES
#undef ATTNKERN_VECTOR_REGISTERS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
