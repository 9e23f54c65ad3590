// Compiled with -mavx2 -mf16c -ffp-contract=off.
#include "simd_avx2.h"
// What follows is written in this vocabulary.
#include "kernels.inl"

namespace signvote {
extern const Kernels kAvx2Kernels;
const Kernels kAvx2Kernels = SIGNVOTE_KERNELS("avx2");
}  // namespace signvote
