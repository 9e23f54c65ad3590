// The CUDA kernels: launches of the ops of ../kernels.h, with the same meanings and the same bits, on device memory. A
// launch neither waits nor allocates nor checks: the binding has checked. It works on the current device, after what is
// on the stream already, and returns the error of the launch.
#ifndef SIGNVOTE_CUDA_KERNELS_H
#define SIGNVOTE_CUDA_KERNELS_H

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"
#include "../run.h"

namespace signvote {
namespace cuda {

// A warp works on a piece at a time. A piece of a run has no more than so many coordinates.
constexpr size_t kPiece = 1024;      // packing and unpacking
constexpr size_t kVotePiece = 4096;  // voting

// What a launch works on: pieces of runs, which lie in device memory, or all of an array.
struct Work {
  const Run* pieces;  // or null
  size_t size;        // how many pieces, or how many coordinates of the array
  uint64_t seed;      // of the coins of pieces
  uint64_t coins;     // of the array, as ../kernels.h hands them to a kernel
};
inline Work on_pieces(const Run* pieces, size_t num_pieces, uint64_t seed) { return {pieces, num_pieces, seed, 0}; }
inline Work on_array(size_t numel, uint64_t coins) { return {nullptr, numel, 0, coins}; }

// An error where there is no code for the current device, or none that its driver takes.
cudaError_t find_code();

// Where `words` is null they are only counted. Where `counts` is not null it is set; it lies in device memory, as
// `tied` and `zeros` do.
cudaError_t pack_signs(DType dtype, const void* x, const Work& work, Undecided zeros, uint32_t* words,
                       PackCounts* counts, cudaStream_t stream);

cudaError_t pack_momentum(DType dtype, const void* gradient, void* momentum, const Work& work,
                          const MomentumCoefficients& coefficients, Undecided zeros, uint32_t* words,
                          PackCounts* counts, cudaStream_t stream);

// Row i begins `stride` words after row i - 1.
cudaError_t majority_vote(const uint32_t* rows, size_t num_rows, size_t stride, const Work& work, Undecided ties,
                          uint32_t* out, uint64_t* tied, cudaStream_t stream);

cudaError_t unpack_signs(DType dtype, const uint32_t* words, const Work& work, uint64_t positive, void* out,
                         cudaStream_t stream);

cudaError_t pack_ternary(DType dtype, const void* x, const Work& work, uint64_t limit, uint32_t* sign, uint32_t* active,
                         PackCounts* counts, cudaStream_t stream);

// Row i of each plane begins `stride` words after its row i - 1.
cudaError_t majority_vote_ternary(const uint32_t* signs, const uint32_t* actives, size_t num_rows, size_t stride,
                                  const Work& work, uint64_t quorum, uint32_t* sign, uint32_t* active, uint64_t* zeros,
                                  cudaStream_t stream);

cudaError_t unpack_ternary(DType dtype, const uint32_t* sign, const uint32_t* active, const Work& work,
                           uint64_t positive, void* out, cudaStream_t stream);

}  // namespace cuda
}  // namespace signvote

#endif
