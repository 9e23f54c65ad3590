// The vocabulary of simd_portable.h for AVX-512 F, BW, DQ and VL, and F16C.
#ifndef SIGNVOTE_CPU_SIMD_AVX512_H
#define SIGNVOTE_CPU_SIMD_AVX512_H

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "../kernels.h"

namespace signvote {
namespace {

template <class U>
struct Lanes {
  static constexpr size_t kCount = 64 / sizeof(U);
  __m512i value;
};

template <class U>
struct MaskOf;
template <>
struct MaskOf<uint16_t> {
  using Type = __mmask32;
};
template <>
struct MaskOf<uint32_t> {
  using Type = __mmask16;
};
template <>
struct MaskOf<uint64_t> {
  using Type = __mmask8;
};

template <class U>
struct Mask {
  typename MaskOf<U>::Type value;
};

template <class U>
inline Lanes<U> broadcast(U value) {
  if constexpr (sizeof(U) == 2) {
    return {_mm512_set1_epi16(static_cast<short>(value))};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm512_set1_epi32(static_cast<int>(value))};
  } else {
    return {_mm512_set1_epi64(static_cast<long long>(value))};
  }
}

template <class U>
inline Lanes<U> load(const U* from) {
  __m512i value = _mm512_loadu_si512(from);
  // GCC would load what is used twice twice, and loads are what a kernel is short of.
  asm("" : "+v"(value));
  return {value};
}
template <class U>
inline void store(U* to, Lanes<U> a) {
  _mm512_storeu_si512(to, a.value);
}

template <class U>
inline Lanes<U> operator&(Lanes<U> a, Lanes<U> b) {
  return {_mm512_and_si512(a.value, b.value)};
}
template <class U>
inline Lanes<U> operator|(Lanes<U> a, Lanes<U> b) {
  return {_mm512_or_si512(a.value, b.value)};
}
template <class U>
inline Lanes<U> operator^(Lanes<U> a, Lanes<U> b) {
  return {_mm512_xor_si512(a.value, b.value)};
}
template <class U>
inline Lanes<U> operator+(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm512_add_epi16(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm512_add_epi32(a.value, b.value)};
  } else {
    return {_mm512_add_epi64(a.value, b.value)};
  }
}
inline Lanes<uint64_t> operator*(Lanes<uint64_t> a, Lanes<uint64_t> b) {
  return {_mm512_mullo_epi64(a.value, b.value)};
}
template <int kShift>
inline Lanes<uint64_t> shift_right(Lanes<uint64_t> a) {
  return {_mm512_srli_epi64(a.value, kShift)};
}

template <class U>
inline Mask<U> greater(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm512_cmpgt_epi16_mask(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm512_cmpgt_epi32_mask(a.value, b.value)};
  } else {
    return {_mm512_cmpgt_epi64_mask(a.value, b.value)};
  }
}

template <class U>
inline Lanes<U> min(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm512_min_epi16(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm512_min_epi32(a.value, b.value)};
  } else {
    return {_mm512_min_epi64(a.value, b.value)};
  }
}
template <class U>
inline Lanes<U> max(Lanes<U> a, Lanes<U> b) {
  if constexpr (sizeof(U) == 2) {
    return {_mm512_max_epi16(a.value, b.value)};
  } else if constexpr (sizeof(U) == 4) {
    return {_mm512_max_epi32(a.value, b.value)};
  } else {
    return {_mm512_max_epi64(a.value, b.value)};
  }
}

template <class U>
inline bool any(Mask<U> mask) {
  return mask.value != 0;
}

template <class U>
inline Lanes<U> where(Mask<U> mask, Lanes<U> a) {
  if constexpr (sizeof(U) == 4) {
    return {_mm512_maskz_mov_epi32(mask.value, a.value)};
  } else {
    return {_mm512_maskz_mov_epi64(mask.value, a.value)};
  }
}

template <class U, class MaskAt>
inline uint64_t mask_of_64(const MaskAt& mask_at) {
  uint64_t bits = 0;
#pragma GCC unroll 8
  for (size_t i = 0; i < 64; i += Lanes<U>::kCount) {
    bits |= static_cast<uint64_t>(mask_at(i).value) << i;
  }
  return bits;
}

template <class U, class MaskAt>
inline void store_mask_of_64(uint32_t* words, const MaskAt& mask_at) {
  // From the mask registers right to memory: on the way through other registers it takes half as long again.
#pragma GCC unroll 8
  for (size_t i = 0; i < 64; i += Lanes<U>::kCount) {
    const auto mask = mask_at(i).value;
    using Bits __attribute__((may_alias)) = typename MaskOf<U>::Type;
    *reinterpret_cast<Bits*>(reinterpret_cast<char*>(words) + i / 8) = mask;
  }
}

// `bits` stay in a mask register: shifted in one of the others and moved for each store, 16-bit floats in the caches
// take 1.25 to 1.45 times as long, by Zen 4.
template <class U>
inline void select_64(uint64_t bits, U set, U clear, U* out) {
  __mmask64 mask = _cvtu64_mask64(bits);
  if constexpr (sizeof(U) == 2) {
    // Half a register at a time: by Zen 4 0.94 to 1.01 times as fast at 1 and 4 MB, 1.07 to 1.15 at 13, 1.0 to 1.1
    // beyond.
    const __m256i ones = _mm256_set1_epi16(static_cast<short>(set)),
                  zeros = _mm256_set1_epi16(static_cast<short>(clear));
#pragma GCC unroll 4
    for (size_t i = 0; i < 64; i += 16, mask = _kshiftri_mask64(mask, 16)) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm256_mask_blend_epi16(static_cast<__mmask16>(mask), zeros, ones));
    }
  } else {
    const __m512i ones = broadcast(set).value, zeros = broadcast(clear).value;
#pragma GCC unroll 8
    for (size_t i = 0; i < 64; i += Lanes<U>::kCount, mask = _kshiftri_mask64(mask, Lanes<U>::kCount)) {
      if constexpr (sizeof(U) == 4) {
        store(out + i, Lanes<U>{_mm512_mask_blend_epi32(static_cast<__mmask16>(mask), zeros, ones)});
      } else {
        store(out + i, Lanes<U>{_mm512_mask_blend_epi64(static_cast<__mmask8>(mask), zeros, ones)});
      }
    }
  }
}

template <class U>
inline void select_64(uint64_t active, uint64_t bits, U set, U clear, U* out) {
  __mmask64 mask = _cvtu64_mask64(active & bits), nonzero = _cvtu64_mask64(active);
  if constexpr (sizeof(U) == 2) {
    const __m256i ones = _mm256_set1_epi16(static_cast<short>(set)),
                  zeros = _mm256_set1_epi16(static_cast<short>(clear));
#pragma GCC unroll 4
    for (size_t i = 0; i < 64; i += 16) {
      const __m256i negative = _mm256_maskz_mov_epi16(static_cast<__mmask16>(nonzero), zeros);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                          _mm256_mask_mov_epi16(negative, static_cast<__mmask16>(mask), ones));
      mask = _kshiftri_mask64(mask, 16);
      nonzero = _kshiftri_mask64(nonzero, 16);
    }
  } else {
    const __m512i ones = broadcast(set).value, zeros = broadcast(clear).value;
#pragma GCC unroll 8
    for (size_t i = 0; i < 64; i += Lanes<U>::kCount) {
      if constexpr (sizeof(U) == 4) {
        const __m512i negative = _mm512_maskz_mov_epi32(static_cast<__mmask16>(nonzero), zeros);
        store(out + i, Lanes<U>{_mm512_mask_mov_epi32(negative, static_cast<__mmask16>(mask), ones)});
      } else {
        const __m512i negative = _mm512_maskz_mov_epi64(static_cast<__mmask8>(nonzero), zeros);
        store(out + i, Lanes<U>{_mm512_mask_mov_epi64(negative, static_cast<__mmask8>(mask), ones)});
      }
      mask = _kshiftri_mask64(mask, Lanes<U>::kCount);
      nonzero = _kshiftri_mask64(nonzero, Lanes<U>::kCount);
    }
  }
}

inline size_t popcount(uint64_t x) { return static_cast<size_t>(_mm_popcnt_u64(x)); }

template <class Real>
struct Reals;
template <>
struct Reals<float> {
  __m512 value;
};
template <>
struct Reals<double> {
  __m512d value;
};

inline Reals<float> broadcast_real(float value) { return {_mm512_set1_ps(value)}; }
inline Reals<double> broadcast_real(double value) { return {_mm512_set1_pd(value)}; }

inline Reals<float> operator*(Reals<float> a, Reals<float> b) { return {_mm512_mul_ps(a.value, b.value)}; }
inline Reals<double> operator*(Reals<double> a, Reals<double> b) { return {_mm512_mul_pd(a.value, b.value)}; }
inline Reals<float> operator+(Reals<float> a, Reals<float> b) { return {_mm512_add_ps(a.value, b.value)}; }
inline Reals<double> operator+(Reals<double> a, Reals<double> b) { return {_mm512_add_pd(a.value, b.value)}; }

inline Lanes<uint32_t> as_bits(Reals<float> a) { return {_mm512_castps_si512(a.value)}; }
inline Lanes<uint64_t> as_bits(Reals<double> a) { return {_mm512_castpd_si512(a.value)}; }
inline Reals<float> as_reals(Lanes<uint32_t> bits) { return {_mm512_castsi512_ps(bits.value)}; }
inline Reals<double> as_reals(Lanes<uint64_t> bits) { return {_mm512_castsi512_pd(bits.value)}; }

inline Reals<float> load_float16(const uint16_t* x) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)))};
}
inline Reals<float> load_bfloat16(const uint16_t* x) {
  const __m512i widened = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(widened, 16))};
}

using Words = Lanes<uint64_t>;

inline Words load_words(const uint32_t* from) {
  __m512i value = _mm512_loadu_si512(from);
  // A row is used twice, for sum and carry, and GCC would load it twice: loads are what a vote is short of.
  asm("" : "+v"(value));
  return {value};
}
inline Words load_words(const uint32_t* from, size_t count) {
  return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), from)};
}
inline void store_words(uint32_t* to, Words a) { _mm512_storeu_si512(to, a.value); }
inline void store_words(uint32_t* to, Words a, size_t count) {
  _mm512_mask_storeu_epi32(to, static_cast<__mmask16>((1u << count) - 1), a.value);
}

// Asks for what lies at an address, which need not be valid, for the second-level cache.
inline void prefetch(const uint32_t* from) { _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T1); }

inline Words lane_index() { return {_mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7)}; }

inline Words xor3(Words a, Words b, Words c) { return {_mm512_ternarylogic_epi64(a.value, b.value, c.value, 0x96)}; }
inline Words majority3(Words a, Words b, Words c) {
  return {_mm512_ternarylogic_epi64(a.value, b.value, c.value, 0xE8)};
}
inline Words select(Words bits, Words set, Words clear) {
  return {_mm512_ternarylogic_epi64(bits.value, set.value, clear.value, 0xCA)};
}

inline uint64_t popcount(Words a) {
  uint64_t lanes[8], sum = 0;
  _mm512_storeu_si512(lanes, a.value);
  // GCC would take the lanes out of the register one by one, with instructions of which a vote is short.
  asm("" : "+m"(lanes));
  for (uint64_t lane : lanes) sum += popcount(lane);
  return sum;
}

}  // namespace
}  // namespace signvote

#endif
