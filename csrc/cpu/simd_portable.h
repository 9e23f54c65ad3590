// The SIMD vocabulary in plain C++, one lane to a register: what each name means is said here, and simd_<isa>.h gives
// the same names for that instruction set. kernels.inl and what it includes are written in these names only.
//
// Everything is in an anonymous namespace, and only C headers are included: an inline function that the linker could
// share between files would bring the instructions of one file into the others.
#ifndef SIGNVOTE_CPU_SIMD_PORTABLE_H
#define SIGNVOTE_CPU_SIMD_PORTABLE_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace signvote {
namespace {

// A register of unsigned integers: uint16_t, uint32_t or uint64_t.
template <class U>
struct Lanes {
  static constexpr size_t kCount = 1;
  U value;
};

// A truth value for each lane of a Lanes<U>.
template <class U>
struct Mask {
  bool value;
};

template <class U>
struct SignedOf;
template <>
struct SignedOf<uint16_t> {
  using Type = int16_t;
};
template <>
struct SignedOf<uint32_t> {
  using Type = int32_t;
};
template <>
struct SignedOf<uint64_t> {
  using Type = int64_t;
};

template <class U>
inline Lanes<U> broadcast(U value) {
  return {value};
}

// From and to any address that is aligned for U.
template <class U>
inline Lanes<U> load(const U* from) {
  U value;
  memcpy(&value, from, sizeof value);
  return {value};
}
template <class U>
inline void store(U* to, Lanes<U> a) {
  memcpy(to, &a.value, sizeof a.value);
}

// Lane by lane; sums and products are modulo 2^width. * and >> are for uint64_t only.
template <class U>
inline Lanes<U> operator&(Lanes<U> a, Lanes<U> b) {
  return {static_cast<U>(a.value & b.value)};
}
template <class U>
inline Lanes<U> operator|(Lanes<U> a, Lanes<U> b) {
  return {static_cast<U>(a.value | b.value)};
}
template <class U>
inline Lanes<U> operator^(Lanes<U> a, Lanes<U> b) {
  return {static_cast<U>(a.value ^ b.value)};
}
template <class U>
inline Lanes<U> operator+(Lanes<U> a, Lanes<U> b) {
  return {static_cast<U>(a.value + b.value)};
}
inline Lanes<uint64_t> operator*(Lanes<uint64_t> a, Lanes<uint64_t> b) { return {a.value * b.value}; }
template <int kShift>
inline Lanes<uint64_t> shift_right(Lanes<uint64_t> a) {
  return {a.value >> kShift};
}

// a > b as signed integers.
template <class U>
inline Mask<U> greater(Lanes<U> a, Lanes<U> b) {
  using Signed = typename SignedOf<U>::Type;
  return {static_cast<Signed>(a.value) > static_cast<Signed>(b.value)};
}

// As signed integers.
template <class U>
inline Lanes<U> min(Lanes<U> a, Lanes<U> b) {
  return greater(a, b).value ? b : a;
}
template <class U>
inline Lanes<U> max(Lanes<U> a, Lanes<U> b) {
  return greater(a, b).value ? a : b;
}

// Whether it is true for any lane.
template <class U>
inline bool any(Mask<U> mask) {
  return mask.value;
}

// a where the mask is true, 0 elsewhere.
template <class U>
inline Lanes<U> where(Mask<U> mask, Lanes<U> a) {
  return {mask.value ? a.value : U{0}};
}

// The masks of 64 lanes in a row, one bit each. mask_at(i) is the Mask<U> that begins with lane i, and is called once
// for each, in order.
template <class U, class MaskAt>
inline uint64_t mask_of_64(const MaskAt& mask_at) {
  // In two steps, because compilers make SIMD code of the first: a byte of 0 or 1 each, then eight bytes to eight bits
  // by a product that brings byte j of its factor to bit 56 + j.
  uint8_t flags[64];
  for (size_t i = 0; i < 64; ++i) flags[i] = mask_at(i).value;
  uint64_t bits = 0;
  for (size_t i = 0; i < 64; i += 8) {
    uint64_t bytes = 0;
    for (size_t j = 0; j < 8; ++j) bytes |= static_cast<uint64_t>(flags[i + j]) << (8 * j);
    bits |= (bytes * 0x0102040810204080u >> 56) << i;
  }
  return bits;
}

// The same to two words, of which the first holds the low bits.
template <class U, class MaskAt>
inline void store_mask_of_64(uint32_t* words, const MaskAt& mask_at) {
  const uint64_t bits = mask_of_64<U>(mask_at);
  words[0] = static_cast<uint32_t>(bits);
  words[1] = static_cast<uint32_t>(bits >> 32);
}

// out[i] = bit i of `bits` ? set : clear, for 64 elements.
template <class U>
inline void select_64(uint64_t bits, U set, U clear, U* out) {
  for (size_t i = 0; i < 64; i += 8) {
    static const U kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const U eight = static_cast<U>(bits >> i & 255);
    for (size_t j = 0; j < 8; ++j) out[i + j] = (eight & kBit[j]) != 0 ? set : clear;
  }
}

// The same where `active` is 1; 0 where it is 0.
template <class U>
inline void select_64(uint64_t active, uint64_t bits, U set, U clear, U* out) {
  for (size_t i = 0; i < 64; i += 8) {
    static const U kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
    const U eight = static_cast<U>(bits >> i & 255), eight_active = static_cast<U>(active >> i & 255);
    for (size_t j = 0; j < 8; ++j) {
      const U value = (eight & kBit[j]) != 0 ? set : clear;
      out[i + j] = (eight_active & kBit[j]) != 0 ? value : U{0};
    }
  }
}

inline size_t popcount(uint64_t x) {
  x -= x >> 1 & 0x5555555555555555u;
  x = (x & 0x3333333333333333u) + (x >> 2 & 0x3333333333333333u);
  x = (x + (x >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
  return static_cast<size_t>(x * 0x0101010101010101u >> 56);
}

// Real numbers, float or double, as many as Lanes of the same width. Products and sums are rounded one by one.
template <class Real>
struct Reals {
  Real value;
};

inline Reals<float> broadcast_real(float value) { return {value}; }
inline Reals<double> broadcast_real(double value) { return {value}; }

template <class Real>
inline Reals<Real> operator*(Reals<Real> a, Reals<Real> b) {
  return {a.value * b.value};
}
template <class Real>
inline Reals<Real> operator+(Reals<Real> a, Reals<Real> b) {
  return {a.value + b.value};
}

inline Lanes<uint32_t> as_bits(Reals<float> a) {
  Lanes<uint32_t> bits;
  memcpy(&bits.value, &a.value, sizeof bits.value);
  return bits;
}
inline Lanes<uint64_t> as_bits(Reals<double> a) {
  Lanes<uint64_t> bits;
  memcpy(&bits.value, &a.value, sizeof bits.value);
  return bits;
}
inline Reals<float> as_reals(Lanes<uint32_t> bits) {
  Reals<float> a;
  memcpy(&a.value, &bits.value, sizeof a.value);
  return a;
}
inline Reals<double> as_reals(Lanes<uint64_t> bits) {
  Reals<double> a;
  memcpy(&a.value, &bits.value, sizeof a.value);
  return a;
}

// The finite float16 or bfloat16 numbers at x as float, as many as Reals<float> holds.
inline Reals<float> load_float16(const uint16_t* x) {
  // With the exponent's bias of float16 the pattern stands for a number that is 2^112 times too small.
  const uint32_t magnitude = static_cast<uint32_t>(*x & 0x7FFF) << 13, sign = static_cast<uint32_t>(*x & 0x8000) << 16;
  const Lanes<uint32_t> widened = as_bits(Reals<float>{as_reals(Lanes<uint32_t>{magnitude}).value * 0x1p112f});
  return as_reals(Lanes<uint32_t>{widened.value | sign});
}
inline Reals<float> load_bfloat16(const uint16_t* x) {
  return as_reals(Lanes<uint32_t>{static_cast<uint32_t>(*x) << 16});
}

// Words of sign bits, as lanes of 64.
using Words = Lanes<uint64_t>;

// 2 * Words::kCount words, or the first `count` of them, 0 < count: the rest is neither read nor written, and is 0.
inline Words load_words(const uint32_t* from) { return {from[0] | static_cast<uint64_t>(from[1]) << 32}; }
inline Words load_words(const uint32_t* from, size_t count) {
  return {from[0] | (count > 1 ? static_cast<uint64_t>(from[1]) << 32 : 0)};
}
inline void store_words(uint32_t* to, Words a) {
  to[0] = static_cast<uint32_t>(a.value);
  to[1] = static_cast<uint32_t>(a.value >> 32);
}
inline void store_words(uint32_t* to, Words a, size_t count) {
  to[0] = static_cast<uint32_t>(a.value);
  if (count > 1) to[1] = static_cast<uint32_t>(a.value >> 32);
}

inline void prefetch(const uint32_t*) {}

// Lane i is i.
inline Words lane_index() { return {0}; }

// Bit by bit: the sum of three bits and its carry.
inline Words xor3(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words majority3(Words a, Words b, Words c) { return (a & b) | ((a ^ b) & c); }

// Bit by bit: `set` where `bits` is 1, elsewhere `clear`.
inline Words select(Words bits, Words set, Words clear) { return clear ^ (bits & (set ^ clear)); }

// The number of bits that are 1, over all lanes.
inline uint64_t popcount(Words a) { return popcount(a.value); }

}  // namespace
}  // namespace signvote

#endif
