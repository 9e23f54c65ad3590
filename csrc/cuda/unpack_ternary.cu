#include "tile.h"

namespace signvote {
namespace cuda {
namespace {

template <class U, int kField>
__device__ void unpack_tile(const uint32_t* sign, const uint32_t* active, U positive, U* out, size_t numel) {
  using Register = RegisterOf<U>;
  constexpr int kPer = Format<U>::kPerRegister;
  const int word = word_of_lane<kField>();
  const bool is_there = 32 * static_cast<size_t>(word) < numel;
  const uint32_t negative = ~transpose<kField>(is_there ? sign[word] : 0);
  const uint32_t not_zero = transpose<kField>(is_there ? active[word] : 0);
  Elements<U, kWarpSize> elements;
#pragma unroll
  for (int k = 0; k < elements.kRegisters; ++k) {
    // In the lowest bit of each element.
    Register flips = 0, kept = 0;
#pragma unroll
    for (int part = 0; part < kPer; ++part) {
      flips |= static_cast<Register>(negative >> (k * kPer + part) & 1) << (Format<U>::kBits * part);
      kept |= static_cast<Register>(not_zero >> (k * kPer + part) & 1) << (Format<U>::kBits * part);
    }
    elements.registers[k] = (in_each<U>(positive) ^ flips << (Format<U>::kBits - 1)) & kept * static_cast<U>(~U{0});
  }
  store_elements<U, kField>(elements, out, numel, 0);
}

template <class U>
__global__ void __launch_bounds__(kWarpSize* kWarps)
    unpack_ternary_kernel(Work work, const uint32_t* sign, const uint32_t* active, U positive, U* out) {
  constexpr int kField = 16 / sizeof(U);
  for_each_piece<kPiece>(work, [&](const Run& piece) {
    const uint32_t *from_sign = sign + piece.word, *from_active = active + piece.word;
    U* to = out + piece.coordinate;
    const auto numel = static_cast<size_t>(piece.numel);
    if (numel == kPiece && is_aligned<U, kField>(to)) {
      unpack_tile<U, kField>(from_sign, from_active, positive, to, numel);
    } else {
      unpack_tile<U, 1>(from_sign, from_active, positive, to, numel);
    }
  });
}

template <class U>
cudaError_t unpack(const uint32_t* sign, const uint32_t* active, const Work& work, uint64_t positive, void* out,
                   cudaStream_t stream) {
  return launch<kPiece>(unpack_ternary_kernel<U>, stream, work, sign, active, static_cast<U>(positive),
                        static_cast<U*>(out));
}

}  // namespace

cudaError_t unpack_ternary(DType dtype, const uint32_t* sign, const uint32_t* active, const Work& work,
                           uint64_t positive, void* out, cudaStream_t stream) {
  const auto unpack_dtype = dtype == kFloat32   ? unpack<uint32_t>
                            : dtype == kFloat64 ? unpack<uint64_t>
                                                : unpack<uint16_t>;
  return unpack_dtype(sign, active, work, positive, out, stream);
}

}  // namespace cuda
}  // namespace signvote
