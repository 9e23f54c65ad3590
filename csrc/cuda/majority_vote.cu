// Vertical counters: bit j of the counts of 32 coordinates is one word, a plane, and carry-save adders add rows of
// words to it, eight rows at a time. Each lane of a warp counts four words of a piece.
#include "tile.h"

namespace signvote {
namespace cuda {
namespace {

// Of a multiprocessor: as many as take its registers without spills.
template <int kPlanes>
constexpr int kMinBlocks = kPlanes > 8 ? 1 : 2;

constexpr int kGroupRows = 8, kLaneWords = static_cast<int>(kVotePiece / 32) / kWarpSize;

__device__ inline uint32_t majority3(uint32_t a, uint32_t b, uint32_t c) { return (a & b) | ((a | b) & c); }

// Adds b and c to a, and returns what is carried.
__device__ inline uint32_t add(uint32_t& a, uint32_t b, uint32_t c) {
  const uint32_t carry = majority3(a, b, c);
  a ^= b ^ c;
  return carry;
}

template <int kPlanes>
__device__ void add_group(uint32_t (&planes)[kPlanes], const uint32_t (&bits)[kGroupRows]) {
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

// The vote on a piece, four words for each lane: one vector if kIsVector, otherwise every 32nd word from the lane's
// first on, so that a warp's accesses lie side by side either way. Returns how many coordinates were tied.
template <int kPlanes, bool kIsVector>
__device__ uint64_t vote_piece(const Work& work, const Run& piece, const uint32_t* rows, size_t num_rows, size_t stride,
                               Undecided ties, uint32_t* out) {
  using Words = Vector<uint32_t, kLaneWords>;
  const auto word_of = [](int k) { return kIsVector ? kLaneWords * lane() + k : kWarpSize * k + lane(); };
  uint32_t planes[kLaneWords][kPlanes] = {};
#pragma unroll 1
  for (size_t row = 0; row < num_rows; row += kGroupRows) {
    Words group[kGroupRows];
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i, rows += stride) {
      if constexpr (kIsVector) {
        group[i] = row + i < num_rows ? *reinterpret_cast<const Words*>(rows + word_of(0)) : Words{};
      } else {
#pragma unroll
        for (int k = 0; k < kLaneWords; ++k) {
          group[i].parts[k] = row + i < num_rows && 32 * word_of(k) < piece.numel ? rows[word_of(k)] : 0;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kLaneWords; ++k) {
      uint32_t bits[kGroupRows];
#pragma unroll
      for (int i = 0; i < kGroupRows; ++i) bits[i] = group[i].parts[k];
      add_group(planes[k], bits);
    }
  }
  uint64_t tied = 0;
  Words voted;
#pragma unroll
  for (int k = 0; k < kLaneWords; ++k) {
    const int left = static_cast<int>(piece.numel) - 32 * word_of(k);
    const uint32_t mask = left >= 32 ? ~uint32_t{0} : left > 0 ? (uint32_t{1} << left) - 1 : 0;
    voted.parts[k] = at_least(num_rows / 2 + 1, planes[k]) & mask;
    if (num_rows % 2 == 0) {
      const uint32_t tie = (at_least(num_rows / 2, planes[k]) & mask) ^ voted.parts[k];
      if (tie != 0) {
        tied += __popc(tie);
        voted.parts[k] |= tie & undecided_word(ties, work, piece, word_of(k));
      }
    }
    if (!kIsVector && left > 0) out[word_of(k)] = voted.parts[k];
  }
  if constexpr (kIsVector) *reinterpret_cast<Words*>(out + word_of(0)) = voted;
  return tied;
}

template <int kPlanes>
__global__ void __launch_bounds__(kWarpSize* kWarps, kMinBlocks<kPlanes>)
    majority_vote_kernel(Work work, const uint32_t* rows, size_t num_rows, size_t stride, Undecided ties, uint32_t* out,
                         uint64_t* tied) {
  uint64_t found = 0;
  for_each_piece<kVotePiece>(work, [&](const Run& piece) {
    const uint32_t* from = rows + piece.word;
    uint32_t* to = out + piece.word;
    if (piece.numel == kVotePiece && stride % kLaneWords == 0 && is_aligned<uint32_t, kLaneWords>(from) &&
        is_aligned<uint32_t, kLaneWords>(to)) {
      found += vote_piece<kPlanes, true>(work, piece, from, num_rows, stride, ties, to);
    } else {
      found += vote_piece<kPlanes, false>(work, piece, from, num_rows, stride, ties, to);
    }
  });
  if (tied != nullptr) add_over_block(found, tied);
}

}  // namespace

cudaError_t majority_vote(const uint32_t* rows, size_t num_rows, size_t stride, const Work& work, Undecided ties,
                          uint32_t* out, uint64_t* tied, cudaStream_t stream) {
  const cudaError_t error = clear(tied, stream);
  if (error != cudaSuccess) return error;
  const auto kernel = num_rows < 16    ? majority_vote_kernel<4>
                      : num_rows < 256 ? majority_vote_kernel<8>
                                       : majority_vote_kernel<16>;
  return launch<kVotePiece>(kernel, stream, work, rows, num_rows, stride, ties, out, tied);
}

}  // namespace cuda
}  // namespace signvote
