// The CUDA kernels as the one implementation of csrc/kernels.h that driver.cpp finds.
#include <stdio.h>
#include <stdlib.h>

#include "../../../csrc/cpu/dispatch.h"
#include "../../../csrc/cuda/kernels.h"

namespace signvote {
namespace {

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  fprintf(stderr, "%s\n", cudaGetErrorString(error));
  exit(1);
}

template <DType kDType>
PackCounts pack_signs(const void* x, size_t numel, Undecided zeros, uint64_t coins, uint32_t* words) {
  PackCounts counts{1, 1};
  check(cuda::pack_signs(kDType, x, cuda::on_array(numel, coins), zeros, words, &counts, nullptr));
  return counts;
}

template <DType kDType>
PackCounts pack_momentum(const void* gradient, void* momentum, size_t numel, const MomentumCoefficients& coefficients,
                         Undecided zeros, uint64_t coins, uint32_t* words) {
  PackCounts counts{1, 1};
  check(cuda::pack_momentum(kDType, gradient, momentum, cuda::on_array(numel, coins), coefficients, zeros, words,
                            &counts, nullptr));
  return counts;
}

template <DType kDType>
bool has_nonfinite(const void* x, size_t numel) {
  return pack_signs<kDType>(x, numel, kCoin, 0, nullptr).nonfinite != 0;
}

uint64_t majority_vote(const uint32_t* const* rows, size_t num_rows, size_t numel, Undecided ties, uint64_t coins,
                       uint32_t* out) {
  uint64_t tied = 1;
  const size_t stride = num_rows > 1 ? static_cast<size_t>(rows[1] - rows[0]) : 0;
  check(cuda::majority_vote(rows[0], num_rows, stride, cuda::on_array(numel, coins), ties, out, &tied, nullptr));
  return tied;
}

template <DType kDType>
void unpack_signs(const uint32_t* words, size_t numel, uint64_t positive, void* out) {
  check(cuda::unpack_signs(kDType, words, cuda::on_array(numel, 0), positive, out, nullptr));
}

template <DType kDType>
PackCounts pack_ternary(const void* x, size_t numel, uint64_t limit, uint32_t* sign, uint32_t* active) {
  PackCounts counts{1, 1};
  check(cuda::pack_ternary(kDType, x, cuda::on_array(numel, 0), limit, sign, active, &counts, nullptr));
  return counts;
}

uint64_t majority_vote_ternary(const uint32_t* const* signs, const uint32_t* const* actives, size_t num_rows,
                               size_t numel, uint64_t quorum, uint32_t* sign, uint32_t* active) {
  uint64_t zeros = 1;
  const size_t stride = num_rows > 1 ? static_cast<size_t>(signs[1] - signs[0]) : 0;
  check(cuda::majority_vote_ternary(signs[0], actives[0], num_rows, stride, cuda::on_array(numel, 0), quorum, sign,
                                    active, &zeros, nullptr));
  return zeros;
}

template <DType kDType>
void unpack_ternary(const uint32_t* sign, const uint32_t* active, size_t numel, uint64_t positive, void* out) {
  check(cuda::unpack_ternary(kDType, sign, active, cuda::on_array(numel, 0), positive, out, nullptr));
}

#define FOR_EACH_DTYPE(op) {op<kFloat32>, op<kFloat64>, op<kFloat16>, op<kBFloat16>}
constexpr Kernels kKernels = {"cuda",
                              FOR_EACH_DTYPE(pack_signs),
                              FOR_EACH_DTYPE(pack_momentum),
                              FOR_EACH_DTYPE(has_nonfinite),
                              majority_vote,
                              nullptr,
                              nullptr,
                              nullptr,
                              nullptr,
                              FOR_EACH_DTYPE(unpack_signs),
                              FOR_EACH_DTYPE(pack_ternary),
                              majority_vote_ternary,
                              FOR_EACH_DTYPE(unpack_ternary)};

}  // namespace

const Kernels* const* implementations(size_t* count) {
  static const Kernels* const kList[] = {&kKernels};
  *count = 1;
  return kList;
}

}  // namespace signvote
