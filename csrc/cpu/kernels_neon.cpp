// Compiled for aarch64 with -ffp-contract=off.
#include "simd_neon.h"
// What follows is written in this vocabulary.
#include "kernels.inl"

namespace signvote {
extern const Kernels kNeonKernels;
const Kernels kNeonKernels = SIGNVOTE_KERNELS("neon");
}  // namespace signvote
