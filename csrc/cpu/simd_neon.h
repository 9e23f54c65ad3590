// The vocabulary of simd_portable.h for NEON, as every aarch64 CPU has it.
#ifndef SIGNVOTE_CPU_SIMD_NEON_H
#define SIGNVOTE_CPU_SIMD_NEON_H

#include <arm_neon.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace signvote {
namespace {

template <class U>
struct VectorOf;
template <>
struct VectorOf<uint16_t> {
  using Type = uint16x8_t;
};
template <>
struct VectorOf<uint32_t> {
  using Type = uint32x4_t;
};
template <>
struct VectorOf<uint64_t> {
  using Type = uint64x2_t;
};

template <class U>
struct Lanes {
  static constexpr size_t kCount = 16 / sizeof(U);
  typename VectorOf<U>::Type value;
};

// All bits of a lane are 1 where it is true.
template <class U>
struct Mask {
  typename VectorOf<U>::Type value;
};

inline Lanes<uint16_t> broadcast_lanes(uint16_t value) { return {vdupq_n_u16(value)}; }
inline Lanes<uint32_t> broadcast_lanes(uint32_t value) { return {vdupq_n_u32(value)}; }
inline Lanes<uint64_t> broadcast_lanes(uint64_t value) { return {vdupq_n_u64(value)}; }
template <class U>
inline Lanes<U> broadcast(U value) {
  return broadcast_lanes(value);
}

inline Lanes<uint16_t> load(const uint16_t* from) { return {vld1q_u16(from)}; }
inline Lanes<uint32_t> load(const uint32_t* from) { return {vld1q_u32(from)}; }
inline Lanes<uint64_t> load(const uint64_t* from) { return {vld1q_u64(from)}; }
inline void store(uint16_t* to, Lanes<uint16_t> a) { vst1q_u16(to, a.value); }
inline void store(uint32_t* to, Lanes<uint32_t> a) { vst1q_u32(to, a.value); }
inline void store(uint64_t* to, Lanes<uint64_t> a) { vst1q_u64(to, a.value); }

// Compilers define these operators on NEON's types; there is no instruction for the product of 64-bit lanes.
template <class U>
inline Lanes<U> operator&(Lanes<U> a, Lanes<U> b) {
  return {a.value & b.value};
}
template <class U>
inline Lanes<U> operator|(Lanes<U> a, Lanes<U> b) {
  return {a.value | b.value};
}
template <class U>
inline Lanes<U> operator^(Lanes<U> a, Lanes<U> b) {
  return {a.value ^ b.value};
}
template <class U>
inline Lanes<U> operator+(Lanes<U> a, Lanes<U> b) {
  return {a.value + b.value};
}
inline Lanes<uint64_t> operator*(Lanes<uint64_t> a, Lanes<uint64_t> b) { return {a.value * b.value}; }
template <int kShift>
inline Lanes<uint64_t> shift_right(Lanes<uint64_t> a) {
  return {vshrq_n_u64(a.value, kShift)};
}

inline Mask<uint16_t> greater(Lanes<uint16_t> a, Lanes<uint16_t> b) {
  return {vcgtq_s16(vreinterpretq_s16_u16(a.value), vreinterpretq_s16_u16(b.value))};
}
inline Mask<uint32_t> greater(Lanes<uint32_t> a, Lanes<uint32_t> b) {
  return {vcgtq_s32(vreinterpretq_s32_u32(a.value), vreinterpretq_s32_u32(b.value))};
}
inline Mask<uint64_t> greater(Lanes<uint64_t> a, Lanes<uint64_t> b) {
  return {vcgtq_s64(vreinterpretq_s64_u64(a.value), vreinterpretq_s64_u64(b.value))};
}

// There is no instruction for 64-bit lanes.
inline Lanes<uint16_t> min(Lanes<uint16_t> a, Lanes<uint16_t> b) {
  return {vreinterpretq_u16_s16(vminq_s16(vreinterpretq_s16_u16(a.value), vreinterpretq_s16_u16(b.value)))};
}
inline Lanes<uint32_t> min(Lanes<uint32_t> a, Lanes<uint32_t> b) {
  return {vreinterpretq_u32_s32(vminq_s32(vreinterpretq_s32_u32(a.value), vreinterpretq_s32_u32(b.value)))};
}
inline Lanes<uint64_t> min(Lanes<uint64_t> a, Lanes<uint64_t> b) {
  return {vbslq_u64(greater(a, b).value, b.value, a.value)};
}
inline Lanes<uint16_t> max(Lanes<uint16_t> a, Lanes<uint16_t> b) {
  return {vreinterpretq_u16_s16(vmaxq_s16(vreinterpretq_s16_u16(a.value), vreinterpretq_s16_u16(b.value)))};
}
inline Lanes<uint32_t> max(Lanes<uint32_t> a, Lanes<uint32_t> b) {
  return {vreinterpretq_u32_s32(vmaxq_s32(vreinterpretq_s32_u32(a.value), vreinterpretq_s32_u32(b.value)))};
}
inline Lanes<uint64_t> max(Lanes<uint64_t> a, Lanes<uint64_t> b) {
  return {vbslq_u64(greater(a, b).value, a.value, b.value)};
}

inline bool any(Mask<uint16_t> mask) { return vmaxvq_u16(mask.value) != 0; }
inline bool any(Mask<uint32_t> mask) { return vmaxvq_u32(mask.value) != 0; }
inline bool any(Mask<uint64_t> mask) { return vmaxvq_u32(vreinterpretq_u32_u64(mask.value)) != 0; }

template <class U>
inline Lanes<U> where(Mask<U> mask, Lanes<U> a) {
  return {mask.value & a.value};
}

// The masks of 16 lanes, a byte each.
template <class Test>
inline uint8x16_t bytes_of_16(const Test& test, size_t i, uint16_t) {
  return vuzp1q_u8(vreinterpretq_u8_u16(test(i)), vreinterpretq_u8_u16(test(i + 8)));
}
template <class Test>
inline uint8x16_t bytes_of_16(const Test& test, size_t i, uint32_t) {
  const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(test(i)), vreinterpretq_u16_u32(test(i + 4)));
  const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(test(i + 8)), vreinterpretq_u16_u32(test(i + 12)));
  return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}
template <class Test>
inline uint8x16_t bytes_of_16(const Test& test, size_t i, uint64_t) {
  const auto four = [&](size_t j) {
    return vuzp1q_u32(vreinterpretq_u32_u64(test(i + j)), vreinterpretq_u32_u64(test(i + j + 2)));
  };
  const uint16x8_t low = vuzp1q_u16(vreinterpretq_u16_u32(four(0)), vreinterpretq_u16_u32(four(4)));
  const uint16x8_t high = vuzp1q_u16(vreinterpretq_u16_u32(four(8)), vreinterpretq_u16_u32(four(12)));
  return vuzp1q_u8(vreinterpretq_u8_u16(low), vreinterpretq_u8_u16(high));
}

template <class U, class MaskAt>
inline uint64_t mask_of_64(const MaskAt& mask_at) {
  // Byte j of eight keeps bit j; three rounds of adding neighbours join eight bytes to one.
  static const uint8_t kBit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bit = vld1q_u8(kBit);
  const auto test = [&](size_t i) { return mask_at(i).value; };
  const uint8x16_t a = vandq_u8(bytes_of_16(test, 0, U{}), bit), b = vandq_u8(bytes_of_16(test, 16, U{}), bit);
  const uint8x16_t c = vandq_u8(bytes_of_16(test, 32, U{}), bit), d = vandq_u8(bytes_of_16(test, 48, U{}), bit);
  const uint8x16_t pairs = vpaddq_u8(vpaddq_u8(a, b), vpaddq_u8(c, d));
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(pairs, pairs)), 0);
}

template <class U, class MaskAt>
inline void store_mask_of_64(uint32_t* words, const MaskAt& mask_at) {
  const uint64_t bits = mask_of_64<U>(mask_at);
  memcpy(words, &bits, sizeof bits);
}

inline void select_64(uint64_t bits, uint16_t set, uint16_t clear, uint16_t* out) {
  static const uint16_t kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t bit = vld1q_u16(kBit), ones = vdupq_n_u16(set), zeros = vdupq_n_u16(clear);
  for (size_t i = 0; i < 64; i += 8) {
    const uint16x8_t mask = vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits >> i)), bit);
    vst1q_u16(out + i, vbslq_u16(mask, ones, zeros));
  }
}
inline void select_64(uint64_t bits, uint32_t set, uint32_t clear, uint32_t* out) {
  static const uint32_t kBit[4] = {1, 2, 4, 8};
  const uint32x4_t bit = vld1q_u32(kBit), ones = vdupq_n_u32(set), zeros = vdupq_n_u32(clear);
  for (size_t i = 0; i < 64; i += 4) {
    const uint32x4_t mask = vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits >> i)), bit);
    vst1q_u32(out + i, vbslq_u32(mask, ones, zeros));
  }
}
inline void select_64(uint64_t bits, uint64_t set, uint64_t clear, uint64_t* out) {
  static const uint64_t kBit[2] = {1, 2};
  const uint64x2_t bit = vld1q_u64(kBit), ones = vdupq_n_u64(set), zeros = vdupq_n_u64(clear);
  for (size_t i = 0; i < 64; i += 2) {
    const uint64x2_t mask = vtstq_u64(vdupq_n_u64(bits >> i), bit);
    vst1q_u64(out + i, vbslq_u64(mask, ones, zeros));
  }
}

inline void select_64(uint64_t active, uint64_t bits, uint16_t set, uint16_t clear, uint16_t* out) {
  static const uint16_t kBit[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint16x8_t bit = vld1q_u16(kBit), ones = vdupq_n_u16(set), zeros = vdupq_n_u16(clear);
  for (size_t i = 0; i < 64; i += 8) {
    const uint16x8_t mask = vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(bits >> i)), bit);
    const uint16x8_t nonzero = vtstq_u16(vdupq_n_u16(static_cast<uint16_t>(active >> i)), bit);
    vst1q_u16(out + i, vandq_u16(vbslq_u16(mask, ones, zeros), nonzero));
  }
}
inline void select_64(uint64_t active, uint64_t bits, uint32_t set, uint32_t clear, uint32_t* out) {
  static const uint32_t kBit[4] = {1, 2, 4, 8};
  const uint32x4_t bit = vld1q_u32(kBit), ones = vdupq_n_u32(set), zeros = vdupq_n_u32(clear);
  for (size_t i = 0; i < 64; i += 4) {
    const uint32x4_t mask = vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(bits >> i)), bit);
    const uint32x4_t nonzero = vtstq_u32(vdupq_n_u32(static_cast<uint32_t>(active >> i)), bit);
    vst1q_u32(out + i, vandq_u32(vbslq_u32(mask, ones, zeros), nonzero));
  }
}
inline void select_64(uint64_t active, uint64_t bits, uint64_t set, uint64_t clear, uint64_t* out) {
  static const uint64_t kBit[2] = {1, 2};
  const uint64x2_t bit = vld1q_u64(kBit), ones = vdupq_n_u64(set), zeros = vdupq_n_u64(clear);
  for (size_t i = 0; i < 64; i += 2) {
    const uint64x2_t mask = vtstq_u64(vdupq_n_u64(bits >> i), bit);
    const uint64x2_t nonzero = vtstq_u64(vdupq_n_u64(active >> i), bit);
    vst1q_u64(out + i, vandq_u64(vbslq_u64(mask, ones, zeros), nonzero));
  }
}

inline size_t popcount(uint64_t x) { return vaddv_u8(vcnt_u8(vcreate_u8(x))); }

template <class Real>
struct Reals;
template <>
struct Reals<float> {
  float32x4_t value;
};
template <>
struct Reals<double> {
  float64x2_t value;
};

inline Reals<float> broadcast_real(float value) { return {vdupq_n_f32(value)}; }
inline Reals<double> broadcast_real(double value) { return {vdupq_n_f64(value)}; }

inline Reals<float> operator*(Reals<float> a, Reals<float> b) { return {vmulq_f32(a.value, b.value)}; }
inline Reals<double> operator*(Reals<double> a, Reals<double> b) { return {vmulq_f64(a.value, b.value)}; }
inline Reals<float> operator+(Reals<float> a, Reals<float> b) { return {vaddq_f32(a.value, b.value)}; }
inline Reals<double> operator+(Reals<double> a, Reals<double> b) { return {vaddq_f64(a.value, b.value)}; }

inline Lanes<uint32_t> as_bits(Reals<float> a) { return {vreinterpretq_u32_f32(a.value)}; }
inline Lanes<uint64_t> as_bits(Reals<double> a) { return {vreinterpretq_u64_f64(a.value)}; }
inline Reals<float> as_reals(Lanes<uint32_t> bits) { return {vreinterpretq_f32_u32(bits.value)}; }
inline Reals<double> as_reals(Lanes<uint64_t> bits) { return {vreinterpretq_f64_u64(bits.value)}; }

inline Reals<float> load_float16(const uint16_t* x) { return {vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(x)))}; }
inline Reals<float> load_bfloat16(const uint16_t* x) { return {vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(x), 16))}; }

using Words = Lanes<uint64_t>;

inline Words load_words(const uint32_t* from) { return {vreinterpretq_u64_u32(vld1q_u32(from))}; }
inline Words load_words(const uint32_t* from, size_t count) {
  uint32_t words[4] = {0, 0, 0, 0};
  memcpy(words, from, count * sizeof *from);
  return load_words(words);
}
inline void store_words(uint32_t* to, Words a) { vst1q_u32(to, vreinterpretq_u32_u64(a.value)); }
inline void store_words(uint32_t* to, Words a, size_t count) {
  uint32_t words[4];
  store_words(words, a);
  memcpy(to, words, count * sizeof *to);
}

inline void prefetch(const uint32_t* from) { __builtin_prefetch(from, 0, 2); }

inline Words lane_index() { return {vcombine_u64(vcreate_u64(0), vcreate_u64(1))}; }

inline Words xor3(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words majority3(Words a, Words b, Words c) { return {vbslq_u64(a.value ^ b.value, c.value, a.value)}; }
inline Words select(Words bits, Words set, Words clear) { return {vbslq_u64(bits.value, set.value, clear.value)}; }

inline uint64_t popcount(Words a) { return vaddvq_u8(vcntq_u8(vreinterpretq_u8_u64(a.value))); }

}  // namespace
}  // namespace signvote

#endif
