// Every CPU kernel, once, in the vocabulary of simd_portable.h. kernels_<isa>.cpp includes one simd_<isa>.h, then this
// file, and defines its table; the linkage rules of simd_portable.h hold in all that is included here.
//
// Numbers are told apart by integer comparisons of their bits, which no floating-point environment changes and which
// make one template of all dtypes.
#include <fenv.h>
#include <string.h>

// Of a kernel: everything it calls is inlined, which GCC's own limits would stop in the midst of an inner loop. Not
// under the address sanitizer, whose code makes that take a minute to compile.
#if defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define SIGNVOTE_FLATTEN __attribute__((flatten))
#else
#define SIGNVOTE_FLATTEN
#endif

// In this order: each uses what stands above it.
// clang-format off
#include "blocks.inl"
#include "pack.inl"
#include "pack_ternary.inl"
#include "momentum.inl"
#include "unpack.inl"
#include "vote_writer.inl"
#include "vote.inl"
#include "vote_ternary.inl"
#include "counters.inl"
// clang-format on

#define SIGNVOTE_FOR_EACH_DTYPE(op) {op<kFloat32>, op<kFloat64>, op<kFloat16>, op<kBFloat16>}
#define SIGNVOTE_KERNELS(name)             \
  {name,                                   \
   SIGNVOTE_FOR_EACH_DTYPE(pack_signs),    \
   SIGNVOTE_FOR_EACH_DTYPE(pack_momentum), \
   SIGNVOTE_FOR_EACH_DTYPE(has_nonfinite), \
   majority_vote,                          \
   add_counts,                             \
   add_counts_ternary,                     \
   decide_counts,                          \
   decide_counts_ternary,                  \
   SIGNVOTE_FOR_EACH_DTYPE(unpack_signs),  \
   SIGNVOTE_FOR_EACH_DTYPE(pack_ternary),  \
   majority_vote_ternary,                  \
   SIGNVOTE_FOR_EACH_DTYPE(unpack_ternary)}
