#include "tile.h"

namespace signvote {
namespace cuda {
namespace {

template <class U, int kField>
__device__ void unpack_tile(const uint32_t* words, U positive, U* out, size_t numel) {
  using Register = RegisterOf<U>;
  constexpr int kPer = Format<U>::kPerRegister;
  const int word = word_of_lane<kField>();
  const uint32_t negative = ~transpose<kField>(32 * static_cast<size_t>(word) < numel ? words[word] : 0);
  Elements<U, kWarpSize> elements;
#pragma unroll
  for (int k = 0; k < elements.kRegisters; ++k) {
    Register flips = 0;
#pragma unroll
    for (int part = 0; part < kPer; ++part) {
      flips |= static_cast<Register>(negative >> (k * kPer + part) & 1) << (Format<U>::kBits * (part + 1) - 1);
    }
    elements.registers[k] = in_each<U>(positive) ^ flips;
  }
  store_elements<U, kField>(elements, out, numel, 0);
}

template <class U>
__global__ void __launch_bounds__(kWarpSize* kWarps)
    unpack_signs_kernel(Work work, const uint32_t* words, U positive, U* out) {
  constexpr int kField = 16 / sizeof(U);
  for_each_piece<kPiece>(work, [&](const Run& piece) {
    const uint32_t* from = words + piece.word;
    U* to = out + piece.coordinate;
    const auto numel = static_cast<size_t>(piece.numel);
    if (numel == kPiece && is_aligned<U, kField>(to)) {
      unpack_tile<U, kField>(from, positive, to, numel);
    } else {
      unpack_tile<U, 1>(from, positive, to, numel);
    }
  });
}

template <class U>
cudaError_t unpack(const uint32_t* words, const Work& work, uint64_t positive, void* out, cudaStream_t stream) {
  return launch<kPiece>(unpack_signs_kernel<U>, stream, work, words, static_cast<U>(positive), static_cast<U*>(out));
}

}  // namespace

cudaError_t unpack_signs(DType dtype, const uint32_t* words, const Work& work, uint64_t positive, void* out,
                         cudaStream_t stream) {
  const auto unpack_dtype = dtype == kFloat32   ? unpack<uint32_t>
                            : dtype == kFloat64 ? unpack<uint64_t>
                                                : unpack<uint16_t>;
  return unpack_dtype(words, work, positive, out, stream);
}

}  // namespace cuda
}  // namespace signvote
