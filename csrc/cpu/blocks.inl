// The dtypes as bits, blocks of words, and the bits of what is undecided.
//
// The unit of work is a block: 64 coordinates, two words, one word of coins; packing takes as many blocks at a time as
// fill a register with words, a group.

namespace signvote {
namespace {

constexpr size_t kBlock = 64;
constexpr size_t kWords = 2 * Words::kCount;    // 32-bit words to a register
constexpr size_t kGroupBlocks = Words::kCount;  // blocks whose words, or coins, fill a register
constexpr size_t kGroup = kGroupBlocks * kBlock;
// With one lane to a register it is the compiler that makes SIMD code: of the loops over a block, not of a group's.
constexpr bool kHasGroups = kGroupBlocks > 1;

template <DType kDType>
struct Format;
template <>
struct Format<kFloat32> {
  using Bits = uint32_t;
  static constexpr Bits kInfinity = 0x7F800000, kSmallestNormal = 0x00800000;
  static constexpr DType kMomentum = kFloat32;
};
template <>
struct Format<kFloat64> {
  using Bits = uint64_t;
  static constexpr Bits kInfinity = 0x7FF0000000000000, kSmallestNormal = 0x0010000000000000;
  static constexpr DType kMomentum = kFloat64;
};
template <>
struct Format<kFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7C00;
  static constexpr DType kMomentum = kFloat32;
};
template <>
struct Format<kBFloat16> {
  using Bits = uint16_t;
  static constexpr Bits kInfinity = 0x7F80;
  static constexpr DType kMomentum = kFloat32;
};

template <DType kDType>
using BitsOf = typename Format<kDType>::Bits;

template <class U>
constexpr U kSignBit = static_cast<U>(U{1} << (8 * sizeof(U) - 1));
template <class U>
constexpr U kMagnitude = static_cast<U>(~kSignBit<U>);

inline uint64_t load_block(const uint32_t* words, size_t numel) {
  return words[0] | (numel > 32 ? static_cast<uint64_t>(words[1]) << 32 : 0);
}

inline void store_block(uint32_t* words, uint64_t bits, size_t numel) {
  words[0] = static_cast<uint32_t>(bits);
  if (numel > 32) words[1] = static_cast<uint32_t>(bits >> 32);
}

// The first `numel` bits, numel < 64.
inline uint64_t low_bits(size_t numel) { return (uint64_t{1} << numel) - 1; }

inline uint64_t undecided_bits(Undecided rule, uint64_t coins) {
  return rule == kCoin ? mix(coins) : rule == kPositive ? ~uint64_t{0} : 0;
}

// The coins of as many blocks in a row as a register has lanes. `sum` holds their numbers after the first sum of mix().
inline Words coin_lanes(Words sum) {
  Words x = (sum ^ shift_right<30>(sum)) * broadcast<uint64_t>(0xBF58476D1CE4E5B9);
  x = (x ^ shift_right<27>(x)) * broadcast<uint64_t>(0x94D049BB133111EB);
  return x ^ shift_right<31>(x);
}
inline Words coin_sum(uint64_t coins) { return broadcast<uint64_t>(coins + 0x9E3779B97F4A7C15u) + lane_index(); }

inline Words undecided_lanes(Undecided rule, uint64_t coins) {
  return rule == kCoin ? coin_lanes(coin_sum(coins)) : broadcast<uint64_t>(undecided_bits(rule, 0));
}

// Bit i is predicate(x[i]), for the 64 elements at x.
template <class U, class Predicate>
inline uint64_t bits_where(const U* x, const Predicate& predicate) {
  return mask_of_64<U>([&](size_t i) { return predicate(load(x + i)); });
}

// A block of its own for the last numel < 64 coordinates, filled up with a number that is neither zero nor non-finite.
template <class U>
struct Tail {
  U block[kBlock];

  Tail(const U* x, size_t numel) {
    memcpy(block, x, numel * sizeof(U));
    for (size_t i = numel; i < kBlock; ++i) block[i] = 1;
  }
};

// The bits of a register that the last `numel` coordinates fill.
inline Words valid_bits(size_t numel) {
  uint32_t words[kWords];
  for (size_t i = 0; i < kWords; ++i) {
    words[i] = numel >= 32 * (i + 1) ? ~uint32_t{0} : numel > 32 * i ? (uint32_t{1} << numel % 32) - 1 : 0;
  }
  return load_words(words);
}

}  // namespace
}  // namespace signvote
