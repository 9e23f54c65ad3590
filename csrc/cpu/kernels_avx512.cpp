// Compiled with -mavx512f -mavx512bw -mavx512dq -mavx512vl -mf16c -ffp-contract=off.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // said of GCC 12's own intrinsics: GCC bug 105593
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include "simd_avx512.h"
// What follows is written in this vocabulary.
#include "kernels.inl"

namespace signvote {
extern const Kernels kAvx512Kernels;
const Kernels kAvx512Kernels = SIGNVOTE_KERNELS("avx512");
}  // namespace signvote
