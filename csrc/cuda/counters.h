// Vertical counters: bit j of the counts of 32 coordinates is one word, a plane, and carry-save adders add words to
// it, eight at a time. Each lane of a warp counts four words of a piece: one vector, or every 32nd word from the lane's
// first on, so that a warp's accesses lie side by side either way.
#ifndef SIGNVOTE_CUDA_COUNTERS_H
#define SIGNVOTE_CUDA_COUNTERS_H

#include "tile.h"

namespace signvote {
namespace cuda {
namespace {

// Of a multiprocessor: as many as take its registers without spills.
template <int kPlanes>
constexpr int kMinBlocks = kPlanes > 8 ? 1 : 2;

constexpr int kGroup = 8, kLaneWords = static_cast<int>(kVotePiece / 32) / kWarpSize;

using LaneWords = Vector<uint32_t, kLaneWords>;

__device__ inline uint32_t majority3(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | ((a | b) & c); }

// Adds b and c to a, and returns what is carried.
__device__ inline uint32_t add(uint32_t& a, uint32_t b, uint32_t c) {
  const uint32_t carry = majority3(a, b, c);
  a ^= b ^ c;
  return carry;
}

template <int kPlanes>
__device__ void add_group(uint32_t (&planes)[kPlanes], const uint32_t (&bits)[kGroup]) {
  uint32_t twos[4], fours[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) twos[i] = add(planes[0], bits[2 * i], bits[2 * i + 1]);
#pragma unroll
  for (int i = 0; i < 2; ++i) fours[i] = add(planes[1], twos[2 * i], twos[2 * i + 1]);
  uint32_t carry = add(planes[2], fours[0], fours[1]);
#pragma unroll
  for (int j = 3; j < kPlanes; ++j) carry = add(planes[j], carry, 0);
}

// Where a count is no less than `limit` < 2^kPlanes.
template <int kPlanes>
__device__ uint32_t at_least(size_t limit, const uint32_t (&planes)[kPlanes]) {
  uint32_t bits = ~uint32_t{0};
#pragma unroll
  for (int j = 0; j < kPlanes; ++j) {
    const uint32_t inverted = static_cast<uint32_t>(limit >> j & 1) - 1;  // all ones where the limit's bit is 0
    bits = majority3(planes[j], bits, inverted);
  }
  return bits;
}

// Which word of a piece is the k-th of the lane's.
template <bool kIsVector>
__device__ int counted_word(int k) {
  return kIsVector ? kLaneWords * lane() + k : kWarpSize * k + lane();
}

// Whether the lanes' words of a piece are vectors in all rows that begin there, or lie `stride` words apart from them.
template <class... Words>
__device__ bool is_of_vectors(const Run& piece, size_t stride, Words*... rows) {
  return piece.numel == kVotePiece && stride % kLaneWords == 0 && (is_aligned<uint32_t, kLaneWords>(rows) && ...);
}

// Bits for those coordinates of a word of which `left` remain from its first one on.
__device__ inline uint32_t present_in_word(int left) {
  return left >= 32 ? ~uint32_t{0} : left > 0 ? (uint32_t{1} << left) - 1 : 0;
}

}  // namespace
}  // namespace cuda
}  // namespace signvote

#endif
