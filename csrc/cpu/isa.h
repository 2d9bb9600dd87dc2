// The instruction set that this process uses: the best one that the processor supports, or the one named by the
// environment variable ATTNKERN_CPU_ISA (baseline, avx2 or avx512; one that the processor lacks is ignored). With
// -DATTNKERN_BASELINE_ONLY the library has the baseline only and builds in a third of the time.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(ATTNKERN_BASELINE_ONLY)
#define ATTNKERN_X86 1
#include <emmintrin.h>
#endif

namespace attnkern {

enum class Isa { baseline, avx2, avx512 };

inline Isa isa() {
  static const Isa chosen = [] {
#if defined(ATTNKERN_X86)
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    const char* asked = std::getenv("ATTNKERN_CPU_ISA");
    const bool any = asked == nullptr || std::strcmp(asked, "avx512") == 0;
    if (has_avx512 && any)
      return Isa::avx512;
    if (has_avx2 && (any || std::strcmp(asked, "avx2") == 0))
      return Isa::avx2;
#endif
    return Isa::baseline;
  }();
  return chosen;
}

// The function of the chosen instruction set: ATTNKERN_BY_ISA(pool_tiles<T>, shape, ...).
#if defined(ATTNKERN_X86)
#define ATTNKERN_BY_ISA(function, ...)                                                                                 \
  (isa() == Isa::avx512 ? avx512::function(__VA_ARGS__)                                                                \
   : isa() == Isa::avx2 ? avx2::function(__VA_ARGS__)                                                                  \
                        : baseline::function(__VA_ARGS__))
#else
#define ATTNKERN_BY_ISA(function, ...) baseline::function(__VA_ARGS__)
#endif

} // namespace attnkern
