// Chooses the instruction set at run time. Compiled for the baseline.
#include <cstring>

#ifdef SAM_X86_64
#include <cpuid.h>
#endif

#include "kernels.h"

namespace sam {

extern const Kernels kernels_baseline;
#ifdef SAM_X86_64
extern const Kernels kernels_avx2;
#endif
#ifdef SAM_AVX512
extern const Kernels kernels_avx512;
#endif

const Kernels* select_kernels(const char* isa) {
  auto chosen = [&](const Kernels& kernels) { return isa == nullptr || std::strcmp(isa, kernels.isa) == 0; };
#ifdef SAM_X86_64
  __builtin_cpu_init();
  // Clang before 17 does not know "f16c".
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
  const bool avx2 = __builtin_cpu_supports("avx2") && f16c && __builtin_cpu_supports("fma");
#ifdef SAM_AVX512
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && chosen(kernels_avx512)) return &kernels_avx512;
#endif
  if (avx2 && chosen(kernels_avx2)) return &kernels_avx2;
#endif
  return chosen(kernels_baseline) ? &kernels_baseline : nullptr;
}

}  // namespace sam
