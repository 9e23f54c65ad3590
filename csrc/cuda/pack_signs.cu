#include "tile.h"

namespace signvote {
namespace cuda {
namespace {

constexpr int kMinBlocks = 3;

template <class U, int kField>
__device__ Signs signs_of_tile(const U* x, size_t numel, U infinity) {
  constexpr int kBatch = sizeof(U) == 8 ? 8 : 32;
  Signs signs;
#pragma unroll 1
  for (int first = 0; first < kWarpSize; first += kBatch) {
    find_signs(load_elements<U, kField, kBatch>(x, numel, first), first, infinity, signs);
  }
  return signs;
}

template <class U>
__global__ void __launch_bounds__(kWarpSize* kWarps, kMinBlocks)
    pack_signs_kernel(Work work, const U* x, U infinity, Undecided zeros, uint32_t* words, PackCounts* counts) {
  constexpr int kField = 16 / sizeof(U);
  LaneCounts found;
  for_each_piece<kPiece>(work, [&](const Run& piece) {
    const U* tile = x + piece.coordinate;
    const auto numel = static_cast<size_t>(piece.numel);
    if (numel == kPiece && is_aligned<U, kField>(tile)) {
      write_word<kField>(signs_of_tile<U, kField>(tile, numel, infinity), work, piece, zeros, words, found);
    } else {
      write_word<1>(signs_of_tile<U, 1>(tile, numel, infinity), work, piece, zeros, words, found);
    }
  });
  found.add_to(counts);
}

template <class U>
cudaError_t pack(DType dtype, const void* x, const Work& work, Undecided zeros, uint32_t* words, PackCounts* counts,
                 cudaStream_t stream) {
  return launch<kPiece>(pack_signs_kernel<U>, stream, work, static_cast<const U*>(x), static_cast<U>(kInfinity[dtype]),
                        zeros, words, counts);
}

}  // namespace

cudaError_t find_code() {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, pack_signs_kernel<uint32_t>);
}

cudaError_t pack_signs(DType dtype, const void* x, const Work& work, Undecided zeros, uint32_t* words,
                       PackCounts* counts, cudaStream_t stream) {
  const cudaError_t error = clear(counts, stream);
  if (error != cudaSuccess) return error;
  const auto pack_dtype = dtype == kFloat32 ? pack<uint32_t> : dtype == kFloat64 ? pack<uint64_t> : pack<uint16_t>;
  return pack_dtype(dtype, x, work, zeros, words, counts, stream);
}

}  // namespace cuda
}  // namespace signvote
