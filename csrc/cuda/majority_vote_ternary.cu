#include "counters.h"

namespace signvote {
namespace cuda {
namespace {

constexpr int kGroupRows = kGroup / 2;

// The lane's words of a row of a piece; where there is no such row or word, 0.
template <bool kIsVector>
__device__ LaneWords load_words(const uint32_t* row, bool is_row, const Run& piece) {
  if constexpr (kIsVector) {
    return is_row ? *reinterpret_cast<const LaneWords*>(row + counted_word<kIsVector>(0)) : LaneWords{};
  } else {
    LaneWords words;
#pragma unroll
    for (int k = 0; k < kLaneWords; ++k) {
      const int word = counted_word<kIsVector>(k);
      words.parts[k] = is_row && 32 * word < piece.numel ? row[word] : 0;
    }
    return words;
  }
}

// The vote on a piece. Of a row two words are counted: `sign`, where it is active, and that with all ones where it is
// not. So + counts 2, an abstention 1, - nothing, and the count of num_rows votes is num_rows + n_plus - n_minus.
// Returns how many coordinates are zero.
template <int kPlanes, bool kIsVector>
__device__ uint64_t vote_piece(const Run& piece, const uint32_t* signs, const uint32_t* actives, size_t num_rows,
                               size_t stride, size_t quorum, uint32_t* sign, uint32_t* active) {
  uint32_t planes[kLaneWords][kPlanes] = {};
#pragma unroll 1
  for (size_t row = 0; row < num_rows; row += kGroupRows) {
    LaneWords of_signs[kGroupRows], of_actives[kGroupRows];
    uint32_t is_row[kGroupRows];  // all ones, or nothing
#pragma unroll
    for (int i = 0; i < kGroupRows; ++i, signs += stride, actives += stride) {
      const bool is_there = row + i < num_rows;
      is_row[i] = is_there ? ~uint32_t{0} : 0;
      of_signs[i] = load_words<kIsVector>(signs, is_there, piece);
      of_actives[i] = load_words<kIsVector>(actives, is_there, piece);
    }
#pragma unroll
    for (int k = 0; k < kLaneWords; ++k) {
      uint32_t bits[kGroup];
#pragma unroll
      for (int i = 0; i < kGroupRows; ++i) {
        bits[2 * i] = of_signs[i].parts[k] & of_actives[i].parts[k];
        bits[2 * i + 1] = (of_signs[i].parts[k] | ~of_actives[i].parts[k]) & is_row[i];
      }
      add_group(planes[k], bits);
    }
  }
  uint64_t zeros = 0;
  LaneWords positive, decided;
#pragma unroll
  for (int k = 0; k < kLaneWords; ++k) {
    const int word = counted_word<kIsVector>(k), left = static_cast<int>(piece.numel) - 32 * word;
    const uint32_t mask = present_in_word(left);
    const uint32_t negative = ~at_least(num_rows - quorum + 1, planes[k]) & mask;
    positive.parts[k] = at_least(num_rows + quorum, planes[k]) & mask;
    decided.parts[k] = positive.parts[k] | negative;
    zeros += __popc(mask ^ decided.parts[k]);
    if (!kIsVector && left > 0) {
      sign[word] = positive.parts[k];
      active[word] = decided.parts[k];
    }
  }
  if constexpr (kIsVector) {
    *reinterpret_cast<LaneWords*>(sign + counted_word<kIsVector>(0)) = positive;
    *reinterpret_cast<LaneWords*>(active + counted_word<kIsVector>(0)) = decided;
  }
  return zeros;
}

template <int kPlanes>
__global__ void __launch_bounds__(kWarpSize* kWarps, kMinBlocks<kPlanes>)
    majority_vote_ternary_kernel(Work work, const uint32_t* signs, const uint32_t* actives, size_t num_rows,
                                 size_t stride, size_t quorum, uint32_t* sign, uint32_t* active, uint64_t* zeros) {
  uint64_t found = 0;
  for_each_piece<kVotePiece>(work, [&](const Run& piece) {
    const uint32_t *from_signs = signs + piece.word, *from_actives = actives + piece.word;
    uint32_t *to_sign = sign + piece.word, *to_active = active + piece.word;
    if (is_of_vectors(piece, stride, from_signs, from_actives, to_sign, to_active)) {
      found += vote_piece<kPlanes, true>(piece, from_signs, from_actives, num_rows, stride, quorum, to_sign, to_active);
    } else {
      found +=
          vote_piece<kPlanes, false>(piece, from_signs, from_actives, num_rows, stride, quorum, to_sign, to_active);
    }
  });
  if (zeros != nullptr) add_over_block(found, zeros);
}

}  // namespace

cudaError_t majority_vote_ternary(const uint32_t* signs, const uint32_t* actives, size_t num_rows, size_t stride,
                                  const Work& work, uint64_t quorum, uint32_t* sign, uint32_t* active, uint64_t* zeros,
                                  cudaStream_t stream) {
  const cudaError_t error = clear(zeros, stream);
  if (error != cudaSuccess) return error;
  // No vote reaches a quorum of more than the number of rows. A count is less than num_rows plus this.
  const size_t reachable = quorum < num_rows + 1 ? static_cast<size_t>(quorum) : num_rows + 1;
  const auto kernel = num_rows < 8     ? majority_vote_ternary_kernel<4>
                      : num_rows < 128 ? majority_vote_ternary_kernel<8>
                                       : majority_vote_ternary_kernel<17>;
  return launch<kVotePiece>(kernel, stream, work, signs, actives, num_rows, stride, reachable, sign, active, zeros);
}

}  // namespace cuda
}  // namespace signvote
