#include "tile.h"

namespace signvote {
namespace cuda {
namespace {

constexpr int kMinBlocks = 2;

// Products and sums are rounded one by one: these are never made into one operation.
__device__ inline float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ inline float add(float a, float b) { return __fadd_rn(a, b); }
__device__ inline double add(double a, double b) { return __dadd_rn(a, b); }

__device__ inline float as_real(uint32_t bits) { return __uint_as_float(bits); }
__device__ inline double as_real(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }
__device__ inline uint32_t as_bits(float real) { return __float_as_uint(real); }
__device__ inline uint64_t as_bits(double real) { return static_cast<uint64_t>(__double_as_longlong(real)); }

// The gradient's format, and that of its momentum.
template <DType kDType>
struct Gradient {
  using U = uint16_t;
  using V = uint32_t;
  using Real = float;
  static constexpr V kMomentumInfinity = 0x7F800000, kSmallestNormal = 0x00800000;
};
template <>
struct Gradient<kFloat32> : Gradient<kFloat16> {
  using U = uint32_t;
};
template <>
struct Gradient<kFloat64> {
  using U = uint64_t;
  using V = uint64_t;
  using Real = double;
  static constexpr V kMomentumInfinity = 0x7FF0000000000000, kSmallestNormal = 0x0010000000000000;
};

// A finite number, as a real number of the momentum's format.
template <DType kDType>
__device__ auto to_real(typename Gradient<kDType>::U bits) {
  if constexpr (kDType == kFloat16) {
    // With the exponent's bias of float16 the pattern stands for a number that is 2^112 times too small.
    const float magnitude = multiply(as_real(static_cast<uint32_t>(bits & 0x7FFF) << 13), 0x1p112f);
    return as_real(as_bits(magnitude) | static_cast<uint32_t>(bits & 0x8000) << 16);
  } else if constexpr (kDType == kBFloat16) {
    return as_real(static_cast<uint32_t>(bits) << 16);
  } else {
    return as_real(bits);
  }
}

// In the momentum's format. The device rounds them: on the host a caller may have set another rounding mode.
template <class Real>
struct Coefficients {
  Real send_momentum, send_gradient, keep_momentum, keep_gradient;

  __device__ explicit Coefficients(const MomentumCoefficients& c)
      : send_momentum(static_cast<Real>(c.send_momentum)),
        send_gradient(static_cast<Real>(c.send_gradient)),
        keep_momentum(static_cast<Real>(c.keep_momentum)),
        keep_gradient(static_cast<Real>(c.keep_gradient)) {}
};

// The bits of a * x + b * y, or of +0 where that is smaller than the smallest normal number.
template <DType kDType, class Real>
__device__ typename Gradient<kDType>::V combine(Real a, Real x, Real b, Real y) {
  using V = typename Gradient<kDType>::V;
  const V bits = as_bits(add(multiply(a, x), multiply(b, y)));
  return (bits & kMagnitudes<V>) < Gradient<kDType>::kSmallestNormal ? V{0} : bits;
}

// Replaces the momentum of a tile, and returns the signs to send.
template <DType kDType, int kField>
__device__ Signs update(const typename Gradient<kDType>::U* gradient, typename Gradient<kDType>::V* momentum,
                        size_t numel, const Coefficients<typename Gradient<kDType>::Real>& c) {
  using U = typename Gradient<kDType>::U;
  using V = typename Gradient<kDType>::V;
  using Real = typename Gradient<kDType>::Real;
  constexpr U kMagnitude = static_cast<U>(~kSignBit<U>), kGradientInfinity = static_cast<U>(kInfinity[kDType]);
  constexpr int kBatch = 32 / sizeof(V);
  Signs signs;
#pragma unroll 1
  for (int first = 0; first < kWarpSize; first += kBatch) {
    const auto g = load_elements<U, kField, kBatch>(gradient, numel, first);
    auto m = load_elements<V, kField, kBatch>(momentum, numel, first), sent = m;
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const U bits = g[i];
      const bool is_finite = (bits & kMagnitude) < kGradientInfinity;
      // A gradient that is not finite counts as 0 in what is sent, and leaves the momentum as it was.
      const Real g_i = to_real<kDType>(is_finite ? bits : U{0}), m_i = as_real(m.registers[i]);
      sent.registers[i] = combine<kDType>(c.send_momentum, m_i, c.send_gradient, g_i);
      if (is_finite) {
        m.registers[i] = combine<kDType>(c.keep_momentum, m_i, c.keep_gradient, g_i);
      } else {
        signs.nonfinite |= uint32_t{1} << (first + i);
      }
    }
    store_elements<V, kField>(m, momentum, numel, first);
    find_signs(sent, first, Gradient<kDType>::kMomentumInfinity, signs);
  }
  return signs;
}

template <DType kDType>
__global__ void __launch_bounds__(kWarpSize* kWarps, kMinBlocks)
    pack_momentum_kernel(Work work, const typename Gradient<kDType>::U* gradient,
                         typename Gradient<kDType>::V* momentum, MomentumCoefficients given, Undecided zeros,
                         uint32_t* words, PackCounts* counts) {
  using U = typename Gradient<kDType>::U;
  using V = typename Gradient<kDType>::V;
  constexpr int kField = 16 / sizeof(V);
  const Coefficients<typename Gradient<kDType>::Real> coefficients(given);
  LaneCounts found;
  for_each_piece<kPiece>(work, [&](const Run& piece) {
    const U* g = gradient + piece.coordinate;
    V* m = momentum + piece.coordinate;
    const auto numel = static_cast<size_t>(piece.numel);
    if (numel == kPiece && is_aligned<U, kField>(g) && is_aligned<V, kField>(m)) {
      write_word<kField>(update<kDType, kField>(g, m, numel, coefficients), work, piece, zeros, words, found);
    } else {
      write_word<1>(update<kDType, 1>(g, m, numel, coefficients), work, piece, zeros, words, found);
    }
  });
  found.add_to(counts);
}

template <DType kDType>
cudaError_t pack(const void* gradient, void* momentum, const Work& work, const MomentumCoefficients& coefficients,
                 Undecided zeros, uint32_t* words, PackCounts* counts, cudaStream_t stream) {
  return launch<kPiece>(pack_momentum_kernel<kDType>, stream, work,
                        static_cast<const typename Gradient<kDType>::U*>(gradient),
                        static_cast<typename Gradient<kDType>::V*>(momentum), coefficients, zeros, words, counts);
}

}  // namespace

cudaError_t pack_momentum(DType dtype, const void* gradient, void* momentum, const Work& work,
                          const MomentumCoefficients& coefficients, Undecided zeros, uint32_t* words,
                          PackCounts* counts, cudaStream_t stream) {
  static constexpr decltype(&pack<kFloat32>) kPack[kNumDTypes] = {pack<kFloat32>, pack<kFloat64>, pack<kFloat16>,
                                                                  pack<kBFloat16>};
  const cudaError_t error = clear(counts, stream);
  if (error != cudaSuccess) return error;
  return kPack[dtype](gradient, momentum, work, coefficients, zeros, words, counts, stream);
}

}  // namespace cuda
}  // namespace signvote
