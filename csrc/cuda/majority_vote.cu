#include "counters.h"

namespace signvote {
namespace cuda {
namespace {

// The vote on a piece. Returns how many coordinates were tied.
template <int kPlanes, bool kIsVector>
__device__ uint64_t vote_piece(const Work& work, const Run& piece, const uint32_t* rows, size_t num_rows, size_t stride,
                               Undecided ties, uint32_t* out) {
  const auto word_of = [](int k) { return counted_word<kIsVector>(k); };
  uint32_t planes[kLaneWords][kPlanes] = {};
#pragma unroll 1
  for (size_t row = 0; row < num_rows; row += kGroup) {
    LaneWords group[kGroup];
#pragma unroll
    for (int i = 0; i < kGroup; ++i, rows += stride) {
      if constexpr (kIsVector) {
        group[i] = row + i < num_rows ? *reinterpret_cast<const LaneWords*>(rows + word_of(0)) : LaneWords{};
      } else {
#pragma unroll
        for (int k = 0; k < kLaneWords; ++k) {
          group[i].parts[k] = row + i < num_rows && 32 * word_of(k) < piece.numel ? rows[word_of(k)] : 0;
        }
      }
    }
#pragma unroll
    for (int k = 0; k < kLaneWords; ++k) {
      uint32_t bits[kGroup];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) bits[i] = group[i].parts[k];
      add_group(planes[k], bits);
    }
  }
  uint64_t tied = 0;
  LaneWords voted;
#pragma unroll
  for (int k = 0; k < kLaneWords; ++k) {
    const int word = word_of(k);
    const int left = static_cast<int>(piece.numel) - 32 * word;
    const uint32_t mask = present_in_word(left);
    voted.parts[k] = at_least(num_rows / 2 + 1, planes[k]) & mask;
    if (num_rows % 2 == 0) {
      const uint32_t tie = (at_least(num_rows / 2, planes[k]) & mask) ^ voted.parts[k];
      if (tie != 0) {
        tied += __popc(tie);
        voted.parts[k] |= tie & undecided_word(ties, work, piece, word);
      }
    }
    if (!kIsVector && left > 0) out[word] = voted.parts[k];
  }
  if constexpr (kIsVector) *reinterpret_cast<LaneWords*>(out + word_of(0)) = voted;
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
    if (is_of_vectors(piece, stride, from, to)) {
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
