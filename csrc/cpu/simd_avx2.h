// The vocabulary of simd_portable.h for AVX2 and F16C.
#ifndef SIGNVOTE_CPU_SIMD_AVX2_H
#define SIGNVOTE_CPU_SIMD_AVX2_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "../kernels.h"

namespace signvote {
namespace {

template <class U>
struct Lanes {
  static constexpr size_t kCount = 32 / sizeof(U);
  __m256i value;
};

// All bits of a lane are 1 where it is true.
template <class U>
struct Mask {
  __m256i value;
};

template <class U>
inline Lanes<U> broadcast(U value) {
  if constexpr (sizeof(U) == 2) {
    return {_mm256_set1_epi16(static_cast<short>(value))};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm256_set1_epi32(static_cast<int>(value))};
  } else {
    return {_mm256_set1_epi64x(static_cast<long long>(value))};
  }
}

template <class U>
inline Lanes<U> load(const U* from) {
  __m256i value = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  asm("" : "+x"(value));  // or GCC would load what is used twice twice
  return {value};
}
template <class U>
inline void store(U* to, Lanes<U> a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.value);
}

template <class U>
inline Lanes<U> operator&(Lanes<U> a, Lanes<U> b) {
  return {_mm256_and_si256(a.value, b.value)};
}
template <class U>
inline Lanes<U> operator|(Lanes<U> a, Lanes<U> b) {
  return {_mm256_or_si256(a.value, b.value)};
}
template <class U>
inline Lanes<U> operator^(Lanes<U> a, Lanes<U> b) {
  return {_mm256_xor_si256(a.value, b.value)};
}
template <class U>
inline Lanes<U> operator+(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm256_add_epi16(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm256_add_epi32(a.value, b.value)};
  } else {
    return {_mm256_add_epi64(a.value, b.value)};
  }
}
// low × low + 2^32 (high × low + low × high). The product of 32-bit lanes leaves high × low where it is needed.
inline Lanes<uint64_t> operator*(Lanes<uint64_t> a, Lanes<uint64_t> b) {
  const __m256i high_low = _mm256_mullo_epi32(a.value, _mm256_slli_epi64(b.value, 32));
  const __m256i low_high = _mm256_slli_epi64(_mm256_mul_epu32(a.value, _mm256_srli_epi64(b.value, 32)), 32);
  return {_mm256_add_epi64(_mm256_mul_epu32(a.value, b.value), _mm256_add_epi64(high_low, low_high))};
}
template <int kShift>
inline Lanes<uint64_t> shift_right(Lanes<uint64_t> a) {
  return {_mm256_srli_epi64(a.value, kShift)};
}

template <class U>
inline Mask<U> greater(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm256_cmpgt_epi16(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm256_cmpgt_epi32(a.value, b.value)};
  } else {
    return {_mm256_cmpgt_epi64(a.value, b.value)};
  }
}

// There is no instruction for 64-bit lanes.
template <class U>
inline Lanes<U> min(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm256_min_epi16(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm256_min_epi32(a.value, b.value)};
  } else {
    return {_mm256_blendv_epi8(a.value, b.value, greater(a, b).value)};
  }
}
template <class U>
inline Lanes<U> max(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm256_max_epi16(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm256_max_epi32(a.value, b.value)};
  } else {
    return {_mm256_blendv_epi8(b.value, a.value, greater(a, b).value)};
  }
}

template <class U>
inline bool any(Mask<U> mask) {
  return _mm256_movemask_epi8(mask.value) != 0;
}

template <class U>
inline Lanes<U> where(Mask<U> mask, Lanes<U> a) {
  return {_mm256_and_si256(mask.value, a.value)};
}

// Masks of 32 lanes, beginning with register i, to a byte each. Packing works within halves of a register, so that the
// lanes have to be put back in order.
template <class Test>
inline __m256i bytes_of_32(const Test& test, size_t i, uint16_t) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi16(test(i), test(i + 1)), _MM_SHUFFLE(3, 1, 2, 0));
}
template <class Test>
inline __m256i bytes_of_32(const Test& test, size_t i, uint32_t) {
  const __m256i low = _mm256_packs_epi32(test(i), test(i + 1)), high = _mm256_packs_epi32(test(i + 2), test(i + 3));
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
template <class Test>
inline __m256i bytes_of_32(const Test& test, size_t i, uint64_t) {
  const auto eight = [&](size_t j) { return _mm256_packs_epi32(test(i + j), test(i + j + 1)); };
  const __m256i low = _mm256_packs_epi32(eight(0), eight(2)), high = _mm256_packs_epi32(eight(4), eight(6));
  const __m256i quarters = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), _MM_SHUFFLE(3, 1, 2, 0));
  const __m128i order = _mm_setr_epi8(0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
  return _mm256_shuffle_epi8(quarters, _mm256_broadcastsi128_si256(order));
}

template <class U, class MaskAt>
inline uint64_t mask_of_64(const MaskAt& mask_at) {
  const auto test = [&](size_t i) { return mask_at(i * Lanes<U>::kCount).value; };
  const auto low = static_cast<uint32_t>(_mm256_movemask_epi8(bytes_of_32(test, 0, U{})));
  const auto high = static_cast<uint32_t>(_mm256_movemask_epi8(bytes_of_32(test, 32 / Lanes<U>::kCount, U{})));
  return low | static_cast<uint64_t>(high) << 32;
}

template <class U, class MaskAt>
inline void store_mask_of_64(uint32_t* words, const MaskAt& mask_at) {
  const uint64_t bits = mask_of_64<U>(mask_at);
  memcpy(words, &bits, sizeof bits);
}

template <class U>
inline void select_64(uint64_t bits, U set, U clear, U* out) {
  const __m256i ones = broadcast(set).value, zeros = broadcast(clear).value;
  if constexpr (sizeof(U) == 2) {
    const __m256i weights = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                              static_cast<short>(0x8000));
    for (size_t i = 0; i < 4; ++i) {
      const __m256i all = _mm256_set1_epi16(static_cast<short>(bits >> (16 * i)));
      const __m256i mask = _mm256_cmpeq_epi16(_mm256_and_si256(all, weights), weights);
      store(out + 16 * i, Lanes<U>{_mm256_blendv_epi8(zeros, ones, mask)});
    }
  } else if constexpr (sizeof(U) == 4) {
    // The bit of each lane is moved to where blendv looks: the sign.
    const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
    for (size_t i = 0; i < 8; ++i) {
      const __m256i mask = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(bits >> (8 * i))), shifts);
      const __m256 blend =
          _mm256_blendv_ps(_mm256_castsi256_ps(zeros), _mm256_castsi256_ps(ones), _mm256_castsi256_ps(mask));
      store(out + 8 * i, Lanes<U>{_mm256_castps_si256(blend)});
    }
  } else {
    const __m256i shifts = _mm256_setr_epi64x(63, 62, 61, 60);
    for (size_t i = 0; i < 16; ++i) {
      const __m256i mask = _mm256_sllv_epi64(_mm256_set1_epi64x(static_cast<long long>(bits >> (4 * i))), shifts);
      const __m256d blend =
          _mm256_blendv_pd(_mm256_castsi256_pd(zeros), _mm256_castsi256_pd(ones), _mm256_castsi256_pd(mask));
      store(out + 4 * i, Lanes<U>{_mm256_castpd_si256(blend)});
    }
  }
}

// All bits of a lane are 1 where the bit of `bits` is: lane j of part i is bit i * Lanes<U>::kCount + j.
template <class U>
inline __m256i lanes_of(uint64_t bits, size_t i) {
  if constexpr (sizeof(U) == 2) {
    const __m256i weights = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384,
                                              static_cast<short>(0x8000));
    const __m256i all = _mm256_set1_epi16(static_cast<short>(bits >> (16 * i)));
    return _mm256_cmpeq_epi16(_mm256_and_si256(all, weights), weights);
  } else if constexpr (sizeof(U) == 4) {
    const __m256i weights = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i all = _mm256_set1_epi32(static_cast<int>(bits >> (8 * i)));
    return _mm256_cmpeq_epi32(_mm256_and_si256(all, weights), weights);
  } else {
    const __m256i weights = _mm256_setr_epi64x(1, 2, 4, 8);
    const __m256i all = _mm256_set1_epi64x(static_cast<long long>(bits >> (4 * i)));
    return _mm256_cmpeq_epi64(_mm256_and_si256(all, weights), weights);
  }
}

template <class U>
inline void select_64(uint64_t active, uint64_t bits, U set, U clear, U* out) {
  const __m256i ones = broadcast(set).value, zeros = broadcast(clear).value;
  for (size_t i = 0; i < 64 / Lanes<U>::kCount; ++i) {
    const __m256i value = _mm256_blendv_epi8(zeros, ones, lanes_of<U>(bits, i));
    store(out + i * Lanes<U>::kCount, Lanes<U>{_mm256_and_si256(value, lanes_of<U>(active, i))});
  }
}

inline size_t popcount(uint64_t x) { return static_cast<size_t>(_mm_popcnt_u64(x)); }

template <class Real>
struct Reals;
template <>
struct Reals<float> {
  __m256 value;
};
template <>
struct Reals<double> {
  __m256d value;
};

inline Reals<float> broadcast_real(float value) { return {_mm256_set1_ps(value)}; }
inline Reals<double> broadcast_real(double value) { return {_mm256_set1_pd(value)}; }

inline Reals<float> operator*(Reals<float> a, Reals<float> b) { return {_mm256_mul_ps(a.value, b.value)}; }
inline Reals<double> operator*(Reals<double> a, Reals<double> b) { return {_mm256_mul_pd(a.value, b.value)}; }
inline Reals<float> operator+(Reals<float> a, Reals<float> b) { return {_mm256_add_ps(a.value, b.value)}; }
inline Reals<double> operator+(Reals<double> a, Reals<double> b) { return {_mm256_add_pd(a.value, b.value)}; }

inline Lanes<uint32_t> as_bits(Reals<float> a) { return {_mm256_castps_si256(a.value)}; }
inline Lanes<uint64_t> as_bits(Reals<double> a) { return {_mm256_castpd_si256(a.value)}; }
inline Reals<float> as_reals(Lanes<uint32_t> bits) { return {_mm256_castsi256_ps(bits.value)}; }
inline Reals<double> as_reals(Lanes<uint64_t> bits) { return {_mm256_castsi256_pd(bits.value)}; }

inline Reals<float> load_float16(const uint16_t* x) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)))};
}
inline Reals<float> load_bfloat16(const uint16_t* x) {
  const __m256i widened = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(widened, 16))};
}

using Words = Lanes<uint64_t>;

inline __m256i first_words(size_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

inline Words load_words(const uint32_t* from) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))}; }
inline Words load_words(const uint32_t* from, size_t count) {
  return {_mm256_maskload_epi32(reinterpret_cast<const int*>(from), first_words(count))};
}
inline void store_words(uint32_t* to, Words a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), a.value); }
inline void store_words(uint32_t* to, Words a, size_t count) {
  _mm256_maskstore_epi32(reinterpret_cast<int*>(to), first_words(count), a.value);
}

// Asks for what lies at an address, which need not be valid, for the second-level cache.
inline void prefetch(const uint32_t* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1); }

inline Words lane_index() { return {_mm256_setr_epi64x(0, 1, 2, 3)}; }

inline Words xor3(Words a, Words b, Words c) { return a ^ b ^ c; }
inline Words majority3(Words a, Words b, Words c) { return (a & b) | ((a ^ b) & c); }
inline Words select(Words bits, Words set, Words clear) { return clear ^ (bits & (set ^ clear)); }

inline uint64_t popcount(Words a) {
  uint64_t lanes[4], sum = 0;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), a.value);
  // GCC would take the lanes out of the register one by one, with instructions of which a vote is short.
  asm("" : "+m"(lanes));
  for (uint64_t lane : lanes) sum += popcount(lane);
  return sum;
}

}  // namespace
}  // namespace signvote

#endif
