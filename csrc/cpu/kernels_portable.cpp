// Compiled with no instruction set beyond the architecture's own, and -ffp-contract=off.
#include "simd_portable.h"
// What follows is written in this vocabulary.
#include "kernels.inl"

namespace signvote {
extern const Kernels kPortableKernels;
const Kernels kPortableKernels = SIGNVOTE_KERNELS("portable");
}  // namespace signvote
