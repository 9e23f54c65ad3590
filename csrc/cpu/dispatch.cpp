#include "dispatch.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define SIGNVOTE_X86 1
#include <cpuid.h>
#endif

namespace signvote {

extern const Kernels kAvx512Kernels, kAvx2Kernels, kNeonKernels, kPortableKernels;

namespace {

#ifdef SIGNVOTE_X86
// __builtin_cpu_supports counts what the operating system has enabled. Not every compiler lets it ask for F16C, which
// needs no state beyond that of AVX.
bool has_avx2() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

struct List {
  const Kernels* entries[3];
  size_t count = 0;

  List() {
#ifdef SIGNVOTE_X86
    __builtin_cpu_init();
    if (has_avx512()) entries[count++] = &kAvx512Kernels;
    if (has_avx2()) entries[count++] = &kAvx2Kernels;
#elif defined(__aarch64__)
    entries[count++] = &kNeonKernels;
#endif
    entries[count++] = &kPortableKernels;
  }
};

}  // namespace

const Kernels* const* implementations(size_t* count) {
  static const List list;
  *count = list.count;
  return list.entries;
}

}  // namespace signvote
