#include "tile.h"

namespace signvote {
namespace cuda {
namespace {

constexpr int kMinBlocks = 3;

// A bit for each of a lane's coordinates.
struct Ternary {
  uint32_t negative = 0, above = 0, nan = 0, nonfinite = 0;
};

// Adds those of a batch of numbers of a format with this infinity: which of them have a magnitude above `limit`.
template <class U, int kCount>
__device__ void find_ternary(const Elements<U, kCount>& elements, int first, U limit, U infinity, Ternary& found) {
  using Register = RegisterOf<U>;
  constexpr U kMagnitude = static_cast<U>(~kSignBit<U>);
  // Added to a magnitude these set the sign bit of what is above the limit, and of what is at least infinity.
  const Register over_limit = in_each<U>(static_cast<U>(kMagnitude - limit));
  const Register over_finite = in_each<U>(static_cast<U>(kSignBit<U> - infinity));
  Elements<U, kCount> above;
  Register special = 0;
#pragma unroll
  for (int k = 0; k < elements.kRegisters; ++k) {
    const Register magnitudes = elements.registers[k] & kMagnitudes<U>;
    above.registers[k] = magnitudes + over_limit;
    special |= magnitudes + over_finite;
  }
  found.negative |= sign_bits(elements) << first;
  found.above |= sign_bits(above) << first;
  if ((special & kSigns<U>) != 0) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const U magnitude = static_cast<U>(elements[i] & kMagnitude);
      const uint32_t bit = uint32_t{1} << (first + i);
      if (magnitude >= infinity) found.nonfinite |= bit;
      if (magnitude > infinity) found.nan |= bit;
    }
  }
}

template <class U, int kField>
__device__ void pack_tile(const U* x, const Run& piece, U limit, U infinity, uint32_t* sign, uint32_t* active,
                          LaneCounts& counts) {
  constexpr int kBatch = sizeof(U) == 8 ? 8 : 32;
  const auto numel = static_cast<size_t>(piece.numel);
  Ternary found;
#pragma unroll 1
  for (int first = 0; first < kWarpSize; first += kBatch) {
    find_ternary(load_elements<U, kField, kBatch>(x, numel, first), first, limit, infinity, found);
  }
  counts.zeros += __popc(~found.above & present<kField>(numel));
  counts.nonfinite += __popc(found.nonfinite);
  const uint32_t not_zero = found.above & ~found.nan;
  const uint32_t sign_word = transpose<kField>(not_zero & ~found.negative), active_word = transpose<kField>(not_zero);
  const int word = word_of_lane<kField>();
  if (32 * static_cast<size_t>(word) < numel) {
    sign[word] = sign_word;
    active[word] = active_word;
  }
}

template <class U>
__global__ void __launch_bounds__(kWarpSize* kWarps, kMinBlocks)
    pack_ternary_kernel(Work work, const U* x, U limit, U infinity, uint32_t* sign, uint32_t* active,
                        PackCounts* counts) {
  constexpr int kField = 16 / sizeof(U);
  LaneCounts found;
  for_each_piece<kPiece>(work, [&](const Run& piece) {
    const U* tile = x + piece.coordinate;
    uint32_t *to_sign = sign + piece.word, *to_active = active + piece.word;
    if (piece.numel == kPiece && is_aligned<U, kField>(tile)) {
      pack_tile<U, kField>(tile, piece, limit, infinity, to_sign, to_active, found);
    } else {
      pack_tile<U, 1>(tile, piece, limit, infinity, to_sign, to_active, found);
    }
  });
  found.add_to(counts);
}

template <class U>
cudaError_t pack(DType dtype, const void* x, const Work& work, uint64_t limit, uint32_t* sign, uint32_t* active,
                 PackCounts* counts, cudaStream_t stream) {
  return launch<kPiece>(pack_ternary_kernel<U>, stream, work, static_cast<const U*>(x), static_cast<U>(limit),
                        static_cast<U>(kInfinity[dtype]), sign, active, counts);
}

}  // namespace

cudaError_t pack_ternary(DType dtype, const void* x, const Work& work, uint64_t limit, uint32_t* sign, uint32_t* active,
                         PackCounts* counts, cudaStream_t stream) {
  const cudaError_t error = clear(counts, stream);
  if (error != cudaSuccess) return error;
  const auto pack_dtype = dtype == kFloat32 ? pack<uint32_t> : dtype == kFloat64 ? pack<uint64_t> : pack<uint16_t>;
  return pack_dtype(dtype, x, work, limit, sign, active, counts, stream);
}

}  // namespace cuda
}  // namespace signvote
