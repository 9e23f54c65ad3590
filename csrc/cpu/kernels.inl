// Every CPU kernel, once, in the vocabulary of simd_portable.h. kernels_<isa>.cpp includes one simd_<isa>.h, then this
// file, and defines its table; the linkage rules of simd_portable.h hold here too.
//
// Numbers are told apart by integer comparisons of their bits, which no floating-point environment changes and which
// make one template of all dtypes. The unit of work is a block: 64 coordinates, two words, one word of coins; packing
// takes as many blocks at a time as fill a register with words, a group.
#include <fenv.h>
#include <string.h>

// Of a kernel: everything it calls is inlined, which GCC's own limits would stop in the midst of an inner loop. Not
// under the address sanitizer, whose code makes that take a minute to compile.
#if defined(__GNUC__) && !defined(__SANITIZE_ADDRESS__)
#define SIGNVOTE_FLATTEN __attribute__((flatten))
#else
#define SIGNVOTE_FLATTEN
#endif

namespace signvote {
namespace {

constexpr size_t kBlock = 64;
constexpr size_t kWords = 2 * Words::kCount;    // 32-bit words to a register
constexpr size_t kGroupBlocks = Words::kCount;  // blocks whose words, or coins, fill a register

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

// ---------------------------------------------------------------------------------------------------------------------
// Blocks of words

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

// ---------------------------------------------------------------------------------------------------------------------
// pack_signs, has_nonfinite

template <DType kDType>
inline uint64_t find_nonfinite(const BitsOf<kDType>* x) {
  using U = BitsOf<kDType>;
  const Lanes<U> magnitude = broadcast<U>(kMagnitude<U>), largest = broadcast<U>(Format<kDType>::kInfinity - 1);
  return bits_where(x, [=](Lanes<U> u) { return greater(u & magnitude, largest); });
}

struct Signs {
  uint64_t positive, zero, nonfinite;
};

template <DType kDType>
inline Signs find_signs(const BitsOf<kDType>* x) {
  using U = BitsOf<kDType>;
  constexpr U kInfinity = Format<kDType>::kInfinity;
  const Lanes<U> zero = broadcast<U>(0), magnitude = broadcast<U>(kMagnitude<U>);
  // Zero and non-finite numbers are those whose magnitude - 1 is, unsigned, above that of the largest finite number.
  // Adding the sign bit to both sides makes it a signed comparison; magnitude - 1 + sign bit = magnitude + kMagnitude.
  const Lanes<U> limit = broadcast<U>(static_cast<U>((kInfinity - 2) ^ kSignBit<U>));
  Signs signs{0, 0, 0};
  signs.positive = bits_where(x, [=](Lanes<U> u) { return greater(u, zero); });
  const uint64_t special = bits_where(x, [=](Lanes<U> u) { return greater((u & magnitude) + magnitude, limit); });
  if (special != 0) {
    signs.nonfinite = find_nonfinite<kDType>(x);
    signs.zero = special ^ signs.nonfinite;
    if (signs.nonfinite != 0) {
      const Lanes<U> infinity = broadcast<U>(kInfinity);
      signs.positive &= ~bits_where(x, [=](Lanes<U> u) { return greater(u, infinity); });
    }
  }
  return signs;
}

// The bits of a block, and its counts added to `counts`.
inline uint64_t decide_block(const Signs& signs, Undecided zeros, uint64_t coins, PackCounts& counts) {
  uint64_t bits = signs.positive;
  if ((signs.zero | signs.nonfinite) != 0) {
    bits |= signs.zero & undecided_bits(zeros, coins);
    counts.zeros += popcount(signs.zero);
    counts.nonfinite += popcount(signs.nonfinite);
  }
  return bits;
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

constexpr size_t kGroup = kGroupBlocks * kBlock;

// What tells whether there is a zero, or a number that is not finite, among many.
template <DType kDType>
struct Magnitudes {
  using U = BitsOf<kDType>;
  Lanes<U> least = broadcast<U>(kMagnitude<U>), greatest = broadcast<U>(0);

  void add(Lanes<U> u) {
    const Lanes<U> magnitude = u & broadcast<U>(kMagnitude<U>);
    least = min(least, magnitude);
    greatest = max(greatest, magnitude);
  }
  bool any_zero() const { return any(greater(broadcast<U>(1), least)); }
  bool any_nonfinite() const { return any(greater(greatest, broadcast<U>(Format<kDType>::kInfinity - 1))); }
};

// A bit for each zero of the block at x.
template <DType kDType>
inline uint64_t find_zeros(const BitsOf<kDType>* x) {
  using U = BitsOf<kDType>;
  const Lanes<U> magnitude = broadcast<U>(kMagnitude<U>), one = broadcast<U>(1);
  return bits_where(x, [=](Lanes<U> u) { return greater(one, u & magnitude); });
}

// The zeros of a group. They are looked for at once where the group before had some: a second way through the group
// would throw the CPU off reading ahead.
struct Zeros {
  bool are_expected = false;
  uint64_t blocks[kGroupBlocks];
};

// Completes the words of the group at x, where so far a bit is 1 for x > 0 as integers.
template <DType kDType>
inline void finish_group(const BitsOf<kDType>* x, const Magnitudes<kDType>& magnitudes, Undecided rule, uint64_t coins,
                         uint32_t* words, Zeros& zeros, PackCounts& counts) {
  if (magnitudes.any_nonfinite()) {
    for (size_t block = 0; block < kGroupBlocks; ++block) {
      const Signs signs = find_signs<kDType>(x + block * kBlock);
      store_block(words + 2 * block, decide_block(signs, rule, coins + block, counts), kBlock);
    }
  } else if (magnitudes.any_zero()) {
    for (size_t block = 0; block < kGroupBlocks; ++block) {
      if (!zeros.are_expected) zeros.blocks[block] = find_zeros<kDType>(x + block * kBlock);
      counts.zeros += popcount(zeros.blocks[block]);
    }
    store_words(words, load_words(words) | (load(zeros.blocks) & undecided_lanes(rule, coins)));
    zeros.are_expected = true;
  } else {
    zeros.are_expected = false;
  }
}

template <DType kDType>
inline void pack_group(const BitsOf<kDType>* x, Undecided rule, uint64_t coins, uint32_t* words, Zeros& zeros,
                       PackCounts& counts) {
  using U = BitsOf<kDType>;
  Magnitudes<kDType> magnitudes;
  for (size_t block = 0; block < kGroupBlocks; ++block) {
    store_mask_of_64<U>(words + 2 * block, [&](size_t i) {
      const Lanes<U> u = load(x + block * kBlock + i);
      magnitudes.add(u);
      return greater(u, broadcast<U>(0));
    });
    if (zeros.are_expected) zeros.blocks[block] = find_zeros<kDType>(x + block * kBlock);
  }
  finish_group<kDType>(x, magnitudes, rule, coins, words, zeros, counts);
}

template <DType kDType>
SIGNVOTE_FLATTEN PackCounts pack_signs(const void* data, size_t numel, Undecided zeros, uint64_t coins,
                                       uint32_t* words) {
  using U = BitsOf<kDType>;
  const U* x = static_cast<const U*>(data);
  PackCounts counts{0, 0};
  Zeros found;
  for (; numel >= kGroup; numel -= kGroup, x += kGroup, words += kWords, coins += kGroupBlocks) {
    pack_group<kDType>(x, zeros, coins, words, found, counts);
  }
  for (; numel >= kBlock; numel -= kBlock, x += kBlock, words += 2, ++coins) {
    store_block(words, decide_block(find_signs<kDType>(x), zeros, coins, counts), kBlock);
  }
  if (numel > 0) {
    const Tail<U> tail(x, numel);
    const uint64_t bits = decide_block(find_signs<kDType>(tail.block), zeros, coins, counts);
    store_block(words, bits & low_bits(numel), numel);
  }
  return counts;
}

template <DType kDType>
SIGNVOTE_FLATTEN bool has_nonfinite(const void* data, size_t numel) {
  using U = BitsOf<kDType>;
  const U* x = static_cast<const U*>(data);
  for (; numel >= kBlock; numel -= kBlock, x += kBlock) {
    if (find_nonfinite<kDType>(x) != 0) return true;
  }
  return numel > 0 && find_nonfinite<kDType>(Tail<U>(x, numel).block) != 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// pack_momentum

template <DType kDType>
inline auto load_reals(const BitsOf<kDType>* x) {
  if constexpr (kDType == kFloat16) {
    return load_float16(x);
  } else if constexpr (kDType == kBFloat16) {
    return load_bfloat16(x);
  } else {
    return as_reals(load(x));
  }
}

inline float as_coefficient(uint32_t, double value) { return static_cast<float>(value); }
inline double as_coefficient(uint64_t, double value) { return value; }

// The rule of momentum: V is the width of momentum's dtype. With one coefficient for both, as in Signum, what is sent
// is what is kept.
template <DType kDType, bool kSendsKept>
struct MomentumRule {
  static constexpr DType kMomentum = Format<kDType>::kMomentum;
  using U = BitsOf<kDType>;
  using V = BitsOf<kMomentum>;
  using Coefficient = decltype(broadcast_real(as_coefficient(V{}, 0.0)));

  Coefficient send_momentum, send_gradient, keep_momentum, keep_gradient;

  explicit MomentumRule(const MomentumCoefficients& c)
      : send_momentum(broadcast_real(as_coefficient(V{}, c.send_momentum))),
        send_gradient(broadcast_real(as_coefficient(V{}, c.send_gradient))),
        keep_momentum(broadcast_real(as_coefficient(V{}, c.keep_momentum))),
        keep_gradient(broadcast_real(as_coefficient(V{}, c.keep_gradient))) {}

  static Lanes<V> without_subnormals(Lanes<V> a) {
    const Lanes<V> magnitude = broadcast<V>(kMagnitude<V>);
    const Lanes<V> below = broadcast<V>(Format<kMomentum>::kSmallestNormal - 1);
    return where(greater(a & magnitude, below), a);
  }

  // As many coordinates as a register holds: m is replaced, and what to send goes to v as well. The gradient is finite.
  Lanes<V> update_lanes(const U* gradient, V* m, V* v) const {
    const auto g_i = load_reals<kDType>(gradient);
    const auto m_i = as_reals(load(m));
    const Lanes<V> kept = without_subnormals(as_bits(keep_momentum * m_i + keep_gradient * g_i));
    store(m, kept);
    if constexpr (kSendsKept) return kept;
    const Lanes<V> sent = without_subnormals(as_bits(send_momentum * m_i + send_gradient * g_i));
    store(v, sent);
    return sent;
  }

  // A group. The rare case of a gradient that is not finite is left to signs(), block by block.
  void pack_group(const U* gradient, V* m, Undecided rule, uint64_t coins, uint32_t* words, Zeros& zeros,
                  PackCounts& counts) const {
    if (is_finite(gradient)) {
      V sent[kSendsKept ? 1 : kGroup];
      V* const v = kSendsKept ? m : sent;
      Magnitudes<kMomentum> magnitudes;
      for (size_t block = 0; block < kGroupBlocks; ++block) {
        store_mask_of_64<V>(words + 2 * block, [&](size_t i) {
          const size_t at = block * kBlock + i;
          const Lanes<V> lanes = update_lanes(gradient + at, m + at, v + at);
          magnitudes.add(lanes);
          return greater(lanes, broadcast<V>(0));
        });
        if (zeros.are_expected) zeros.blocks[block] = find_zeros<kMomentum>(v + block * kBlock);
      }
      finish_group<kMomentum>(v, magnitudes, rule, coins, words, zeros, counts);
    } else {
      for (size_t block = 0; block < kGroupBlocks; ++block) {
        const Signs found = signs(gradient + block * kBlock, m + block * kBlock);
        store_block(words + 2 * block, decide_block(found, rule, coins + block, counts), kBlock);
      }
    }
  }

  static bool is_finite(const U* gradient) {
    Lanes<U> greatest = broadcast<U>(0);
    for (size_t i = 0; i < kGroup; i += Lanes<U>::kCount) {
      greatest = max(greatest, load(gradient + i) & broadcast<U>(kMagnitude<U>));
    }
    return !any(greater(greatest, broadcast<U>(Format<kDType>::kInfinity - 1)));
  }

  // A block: m is replaced, and what to send goes to v. The gradient is finite.
  void update(const U* gradient, V* m, V* v) const {
    for (size_t i = 0; i < kBlock; i += Lanes<V>::kCount) {
      const Lanes<V> sent = update_lanes(gradient + i, m + i, v + i);
      if constexpr (kSendsKept) store(v + i, sent);
    }
  }

  // For a non-finite coordinate the gradient counts as 0 in v, and m stays as it was.
  Signs signs(const U* gradient, V* m) const {
    V v[kBlock];
    const uint64_t nonfinite = find_nonfinite<kDType>(gradient);
    if (nonfinite == 0) {
      update(gradient, m, v);
    } else {
      U finite[kBlock];
      V kept[kBlock];
      memcpy(finite, gradient, sizeof finite);
      memcpy(kept, m, sizeof kept);
      for (size_t i = 0; i < kBlock; ++i) finite[i] = (nonfinite >> i & 1) != 0 ? U{0} : finite[i];
      update(finite, m, v);
      for (size_t i = 0; i < kBlock; ++i) m[i] = (nonfinite >> i & 1) != 0 ? kept[i] : m[i];
    }
    Signs signs = find_signs<kMomentum>(v);
    signs.nonfinite |= nonfinite;
    return signs;
  }
};

template <DType kDType, bool kSendsKept>
SIGNVOTE_FLATTEN PackCounts pack_with(const MomentumRule<kDType, kSendsKept>& rule, const BitsOf<kDType>* gradient,
                                      typename MomentumRule<kDType, kSendsKept>::V* m, size_t numel, Undecided zeros,
                                      uint64_t coins, uint32_t* words) {
  PackCounts counts{0, 0};
  Zeros found;
  for (; numel >= kGroup; numel -= kGroup, gradient += kGroup, m += kGroup, words += kWords, coins += kGroupBlocks) {
    rule.pack_group(gradient, m, zeros, coins, words, found, counts);
  }
  for (; numel >= kBlock; numel -= kBlock, gradient += kBlock, m += kBlock, words += 2, ++coins) {
    store_block(words, decide_block(rule.signs(gradient, m), zeros, coins, counts), kBlock);
  }
  if (numel > 0) {
    const Tail gradient_tail(gradient, numel);
    Tail m_tail(m, numel);
    Signs signs = rule.signs(gradient_tail.block, m_tail.block);
    memcpy(m, m_tail.block, numel * sizeof *m);
    signs.positive &= low_bits(numel);
    signs.zero &= low_bits(numel);
    signs.nonfinite &= low_bits(numel);
    store_block(words, decide_block(signs, zeros, coins, counts), numel);
  }
  return counts;
}

template <DType kDType>
PackCounts pack_momentum(const void* gradient_data, void* momentum_data, size_t numel,
                         const MomentumCoefficients& coefficients, Undecided zeros, uint64_t coins, uint32_t* words) {
  // This is arithmetic, and the caller's thread may flush subnormal numbers or round otherwise.
  fenv_t environment;
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  const auto* gradient = static_cast<const BitsOf<kDType>*>(gradient_data);
  auto* m = static_cast<BitsOf<Format<kDType>::kMomentum>*>(momentum_data);
  const bool sends_kept = coefficients.send_momentum == coefficients.keep_momentum &&
                          coefficients.send_gradient == coefficients.keep_gradient;
  const PackCounts counts =
      sends_kept ? pack_with(MomentumRule<kDType, true>(coefficients), gradient, m, numel, zeros, coins, words)
                 : pack_with(MomentumRule<kDType, false>(coefficients), gradient, m, numel, zeros, coins, words);
  fesetenv(&environment);
  return counts;
}

// ---------------------------------------------------------------------------------------------------------------------
// unpack_signs

template <DType kDType>
SIGNVOTE_FLATTEN void unpack_signs(const uint32_t* words, size_t numel, uint64_t positive_bits, void* data) {
  using U = BitsOf<kDType>;
  const U positive = static_cast<U>(positive_bits), negative = static_cast<U>(positive ^ kSignBit<U>);
  U* out = static_cast<U*>(data);
  for (; numel >= kBlock; numel -= kBlock, words += 2, out += kBlock) {
    select_64(load_block(words, kBlock), positive, negative, out);
  }
  if (numel > 0) {
    U block[kBlock];
    select_64(load_block(words, numel), positive, negative, block);
    memcpy(out, block, numel * sizeof(U));
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// majority_vote
//
// Vertical counters: bit j of the count of 64 coordinates at once is one word, and carry-save adders add rows of words
// to it. The count of an odd number of rows starts at 2^k - 1 - num_rows / 2 instead of 0, with the smallest k that
// makes this no less than 0: then a majority is bit k of the count.
//
// The last of an even number of rows stays out of the count. The rows tie where the others have a majority of one and
// the last row is against it, that is where bits 0 to k - 1 of the count all differ from bit k, and bit k from the last
// row. Elsewhere the majority of the others stands.

constexpr int count_bits_below_majority(size_t num_rows) {
  int k = 0;
  while ((size_t{1} << k) - 1 < num_rows / 2) ++k;
  return k;
}
constexpr size_t first_count(size_t num_rows) {
  return (size_t{1} << count_bits_below_majority(num_rows)) - 1 - num_rows / 2;
}

// Where a tie is, the majority means nothing.
struct Decision {
  Words majority, tie;
};

constexpr size_t odd_rows(size_t num_rows) { return num_rows - (num_rows + 1) % 2; }

// `low` are bits 0 to num_low - 1 of the count that has the majority in the bit above them.
inline Decision with_last_row(const Words* low, int num_low, Words majority, Words last) {
  Words tie = majority ^ last;
  for (int j = 0; j < num_low; ++j) tie = tie & (low[j] ^ majority);
  return {majority, tie};
}

// Adds kNum bits of weight 1 and kHigher bits of weight 2, 4, and so on; the count starts at kFirst and has its
// majority in bit kLevels, which is returned. The bits below it go to `low`.
template <int kLevels, size_t kFirst, int kHigher = 0, int kNum>
inline Words count_bits(const Words (&bits)[kNum], Words* low, const Words* higher = nullptr) {
  if constexpr (kLevels == 0) {
    // The count never exceeds this bit, so that at most one of its addends is 1.
    Words majority = bits[0];
#pragma GCC unroll 16
    for (int i = 1; i < kNum; ++i) majority = majority ^ bits[i];
    return majority;
  } else {
    constexpr bool kOne = kFirst % 2 != 0;
    constexpr int kFullAdders = (kNum - 1) / 2;
    constexpr bool kTwoLeft = kNum % 2 == 0;
    constexpr int kCarries = kFullAdders + (kTwoLeft || kOne ? 1 : 0);
    Words carries[kCarries + (kHigher > 0 ? 1 : 0)], sum = bits[0];
#pragma GCC unroll 16
    for (int i = 0; i < kFullAdders; ++i) {
      carries[i] = majority3(sum, bits[2 * i + 1], bits[2 * i + 2]);
      sum = xor3(sum, bits[2 * i + 1], bits[2 * i + 2]);
    }
    const Words ones = broadcast<uint64_t>(~uint64_t{0});
    if constexpr (kTwoLeft) {
      const Words last = bits[kNum - 1];
      carries[kFullAdders] = kOne ? sum | last : sum & last;
      sum = kOne ? xor3(sum, last, ones) : sum ^ last;
    } else if constexpr (kOne) {
      carries[kFullAdders] = sum;
      sum = sum ^ ones;
    }
    if constexpr (kHigher > 0) carries[kCarries] = higher[0];
    low[0] = sum;
    return count_bits<kLevels - 1, kFirst / 2, (kHigher > 0 ? kHigher - 1 : 0)>(carries, low + 1,
                                                                                kHigher > 0 ? higher + 1 : nullptr);
  }
}

// Adds the bits of rows first to first + 2^kLevel - 1 to planes[0] to planes[kLevel - 1], and returns the carries to
// planes[kLevel].
template <int kLevel, class LoadRow>
inline Words add_rows(Words* planes, const LoadRow& load_row, size_t first) {
  if constexpr (kLevel == 0) {
    return load_row(first);
  } else {
    const Words a = add_rows<kLevel - 1>(planes, load_row, first);
    const Words b = add_rows<kLevel - 1>(planes, load_row, first + (size_t{1} << (kLevel - 1)));
    const Words plane = planes[kLevel - 1];
    planes[kLevel - 1] = xor3(plane, a, b);
    return majority3(plane, a, b);
  }
}

constexpr size_t kTile = 2048 / kWords;  // registers to a tile
constexpr size_t kLine = 16;             // 32-bit words to a line of the cache
constexpr int kMaxPlanes = 17;           // as many as 65535 rows need, and one that stays empty

// Bit j of a number, for all coordinates.
inline Words bit_of(size_t number, int j) { return broadcast<uint64_t>((number >> j & 1) != 0 ? ~uint64_t{0} : 0); }

// Writes decisions and counts ties.
class VoteWriter {
 public:
  VoteWriter(uint64_t num_rows, Undecided ties, uint64_t coins, uint32_t* out)
      : out_(out), can_tie_(num_rows % 2 == 0), ties_(ties), coins_(coins) {}

  // Registers decide(0) to decide(num - 1), which begin at `word`.
  template <class Decide>
  void write(size_t word, size_t num, const Decide& decide) {
    if (!can_tie_) {
      for (size_t t = 0; t < num; ++t) store_words(out_ + word + t * kWords, decide(t).majority);
    } else if (ties_ == kCoin) {
      Words sum = coin_sum(coins_ + word / 2);
      const Words step = broadcast<uint64_t>(Words::kCount);
      write_ties(word, num, decide, [&] {
        const Words coins = coin_lanes(sum);
        sum = sum + step;
        return coins;
      });
    } else {
      const Words bits = broadcast<uint64_t>(undecided_bits(ties_, 0));
      write_ties(word, num, decide, [&] { return bits; });
    }
  }

  // The first `count` words of a register, of which only the bits in `valid` are coordinates.
  void write_part(size_t word, size_t count, Words valid, const Decision& decision) {
    const Words tie = decision.tie & valid;
    Words bits = decision.majority & valid;
    if (can_tie_) {
      bits = select(tie, undecided_lanes(ties_, coins_ + word / 2), bits);
      ones_ += popcount(tie);
    }
    store_words(out_ + word, bits, count);
  }

  uint64_t num_tied() const { return 4 * fours_ + 2 * popcount(planes_[1]) + popcount(planes_[0]) + ones_; }

 private:
  // undecided() is what the ties of the next register become. Ties are added up like rows, and stay in registers.
  template <class Decide, class NextUndecided>
  void write_ties(size_t word, size_t num, const Decide& decide, const NextUndecided& next_undecided) {
    uint32_t* const out = out_ + word;
    const auto write_one = [&](size_t t) {
      const Decision decision = decide(t);
      store_words(out + t * kWords, select(decision.tie, next_undecided(), decision.majority));
      return decision.tie;
    };
    Words planes[2] = {planes_[0], planes_[1]};
    uint64_t fours = 0;
    size_t t = 0;
    for (; num - t >= 4; t += 4) fours += popcount(add_rows<2>(planes, write_one, t));
    for (; t < num; ++t) ones_ += popcount(write_one(t));
    fours_ += fours;
    planes_[0] = planes[0];
    planes_[1] = planes[1];
  }

  uint32_t* out_;
  bool can_tie_;
  Undecided ties_;
  uint64_t coins_;
  Words planes_[2] = {broadcast<uint64_t>(0), broadcast<uint64_t>(0)};
  uint64_t fours_ = 0, ones_ = 0;
};

// The bits of a register that the last `numel` coordinates fill.
inline Words valid_bits(size_t numel) {
  uint32_t words[kWords];
  for (size_t i = 0; i < kWords; ++i) {
    words[i] = numel >= 32 * (i + 1) ? ~uint32_t{0} : numel > 32 * i ? (uint32_t{1} << numel % 32) - 1 : 0;
  }
  return load_words(words);
}

constexpr int kWays = 8;    // lines that a set of the first-level cache holds
constexpr int kCrowd = 10;  // rows up to which it costs less to read such lines twice than to read the rows in halves

// How many rows begin in the same line of a page as the first one. Rows of a length that is a multiple of a page and
// rows that are large allocations of their own all do, and then their lines have to share a set at every step.
inline int at_same_place(const uint32_t* const* rows, int num_rows) {
  const auto line = [](const uint32_t* row) { return reinterpret_cast<uintptr_t>(row) / 64 % 64; };
  int same = 0;
  for (int i = 0; i < num_rows; ++i) same += line(rows[i]) == line(rows[0]);
  return same;
}

// The decision on kRows rows, of which load_row(i) is one. With kBegin = 8 the first eight are counted already: bits 0
// to 3 of their count are in `counted`.
template <int kRows, int kBegin = 0, class LoadRow>
inline Decision decide_rows(const LoadRow& load_row, const Words* counted = nullptr) {
  constexpr int kOdd = odd_rows(kRows), kLevels = count_bits_below_majority(kOdd);
  constexpr size_t kFirst = kBegin > 0 ? 0 : first_count(kOdd);
  constexpr int kCounted = kBegin > 0 ? 1 : 0, kHigher = kBegin > 0 ? 3 : 0;
  Words bits[kOdd - kBegin + kCounted], low[kLevels + 1] = {};
#pragma GCC unroll 16
  for (int i = kBegin; i < kOdd; ++i) bits[i - kBegin] = load_row(i);
  if constexpr (kBegin > 0) bits[kOdd - kBegin] = counted[0];
  const Words majority = count_bits<kLevels, kFirst, kHigher>(bits, low, counted + kCounted);
  if constexpr (kOdd < kRows) {
    return with_last_row(low, kLevels, majority, load_row(kOdd));
  } else {
    return {majority, broadcast<uint64_t>(0)};
  }
}

// `num` registers of more than eight rows: of each tile eight rows first, and then the others.
template <int kRows>
inline void vote_in_halves(const uint32_t* const (&row)[kRows], size_t num, VoteWriter& writer) {
  if constexpr (kRows > kCrowd) {
    constexpr size_t kFirst = first_count(odd_rows(kRows));
    Words counted[kTile][4];
    for (size_t begin = 0; begin < num; begin += kTile) {
      const size_t size = num - begin < kTile ? num - begin : kTile;
      const auto load_rows = [&](size_t t) {
        return [&row, word = (begin + t) * kWords](size_t i) { return load_words(row[i] + word); };
      };
      for (size_t t = 0; t < size; ++t) {
        for (int j = 0; j < 3; ++j) counted[t][j] = bit_of(kFirst, j);
        counted[t][3] = add_rows<3>(counted[t], load_rows(t), 0);
      }
      writer.write(begin * kWords, size, [&](size_t t) { return decide_rows<kRows, 8>(load_rows(t), counted[t]); });
    }
  }
}

// As many rows as fit in registers.
template <int kRows>
SIGNVOTE_FLATTEN uint64_t vote_few(const uint32_t* const* rows, size_t numel, Undecided ties, uint64_t coins,
                                   uint32_t* out) {
  VoteWriter writer(kRows, ties, coins, out);
  const uint32_t* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = rows[i];
  const size_t num = numel / (32 * kWords);
  if (kRows > kCrowd && at_same_place(row, kRows) > kWays) {
    vote_in_halves(row, num, writer);
  } else {
    writer.write(0, num, [&](size_t t) {
      return decide_rows<kRows>([&row, word = t * kWords](size_t i) { return load_words(row[i] + word); });
    });
  }
  const size_t word = num * kWords;
  numel -= 32 * word;
  if (numel > 0) {
    const size_t count = (numel + 31) / 32;
    const auto load_row = [&](size_t i) { return load_words(row[i] + word, count); };
    writer.write_part(word, count, valid_bits(numel), decide_rows<kRows>(load_row));
  }
  return writer.num_tied();
}

// The counters of a tile. Rows come in groups of 16, and what a group carries to bit 4 waits until a second carry
// comes, so that both go through one adder; so do the carries of that adder at bit 5, and so on. A bit of the number of
// groups says whether a carry is waiting. A plane is written when it is first added to; until then its bits are those
// of the count at the start.
constexpr int kGroupBits = 4;
constexpr size_t kGroupRows = 1 << kGroupBits;

struct Counters {
  Words planes[kMaxPlanes][kTile], waiting[kMaxPlanes][kTile];
};

// How many planes are written after so many groups, at least one.
inline int num_written(size_t num_groups) {
  int planes = kGroupBits;
  while (num_groups > 1) {
    num_groups /= 2;
    ++planes;
  }
  return planes;
}

// A tile of rows, in full registers from a word on, or in one register of the `count` words that are left.
struct FullTile {
  size_t word, num;
  const uint32_t* begin(const uint32_t* row) const { return row + word; }
  const uint32_t* after(const uint32_t* row) const { return row + word + num * kWords; }
  Words load(const uint32_t* from, size_t t) const { return load_words(from + t * kWords); }
};
struct LastWords {
  size_t word, count;
  static constexpr size_t num = 1;
  const uint32_t* begin(const uint32_t* row) const { return row + word; }
  const uint32_t* after(const uint32_t* row) const { return row; }
  Words load(const uint32_t* from, size_t) const { return load_words(from, count); }
};

// The rows of a group that are counted, at a tile; beyond the last of them there are zeros. And the rows that come
// next: a row is left after a tile, so that the CPU does not see in time where it reads on, and has to be told.
template <class Tile>
class RowGroup {
 public:
  RowGroup(const Tile& tile, const uint32_t* const* rows, size_t num_rows, size_t number) : tile_(tile) {
    static const uint32_t kNoRow[kTile * kWords] = {};
    for (size_t i = 0; i < kGroupRows; ++i) {
      const size_t row = kGroupRows * number + i, next = row + kGroupRows;
      row_[i] = row < odd_rows(num_rows) ? tile.begin(rows[row]) : kNoRow;
      next_[i] = next < num_rows ? tile.begin(rows[next]) : tile.after(rows[i]);
    }
  }

  // Adds the rows at register t to the lowest bits of their count, and returns what is carried on.
  Words add_to(Words* low, size_t t) const {
    if (t * kWords % kLine == 0) {
      for (size_t i = 0; i < kGroupRows; ++i) prefetch(next_[i] + t * kWords);
    }
    return add_rows<kGroupBits>(low, [&](size_t i) { return tile_.load(row_[i], t); }, 0);
  }

  // Of a row that is not counted.
  Words load(const uint32_t* row, size_t t) const { return tile_.load(tile_.begin(row), t); }

 private:
  const Tile& tile_;
  const uint32_t *row_[kGroupRows], *next_[kGroupRows];
};

// Adds group `number`, through as many more adders as there are carries waiting in a row.
template <class Tile>
inline void add_group(Counters& counters, size_t first, const Tile& tile, const RowGroup<Tile>& group, size_t number) {
  const int written = num_written(number);
  int top = kGroupBits;
  for (; (number >> (top - kGroupBits) & 1) != 0; ++top) {
    if (top < written) continue;
    for (size_t t = 0; t < tile.num; ++t) counters.planes[top][t] = bit_of(first, top);
  }
  for (size_t t = 0; t < tile.num; ++t) {
    Words low[kGroupBits];
    for (int j = 0; j < kGroupBits; ++j) low[j] = number > 0 ? counters.planes[j][t] : bit_of(first, j);
    Words carry = group.add_to(low, t);
    for (int j = 0; j < kGroupBits; ++j) counters.planes[j][t] = low[j];
    for (int j = kGroupBits; j < top; ++j) {
      const Words plane = counters.planes[j][t], other = counters.waiting[j][t];
      counters.planes[j][t] = xor3(plane, other, carry);
      carry = majority3(plane, other, carry);
    }
    counters.waiting[top][t] = carry;
  }
}

// The decision at register t, with the last group.
template <class Tile>
inline Decision decide_with(const Counters& counters, const RowGroup<Tile>& last, const uint32_t* const* rows,
                            size_t num_rows, size_t t) {
  const size_t num_odd = odd_rows(num_rows), first = first_count(num_odd), number = (num_odd - 1) / kGroupRows;
  const int num_low = count_bits_below_majority(num_odd), written = num_written(number);
  Words low[kMaxPlanes];
  for (int j = 0; j < kGroupBits; ++j) low[j] = counters.planes[j][t];
  Words carry = last.add_to(low, t);
  for (int j = kGroupBits; j <= num_low; ++j) {
    const Words plane = j < written ? counters.planes[j][t] : bit_of(first, j);
    if ((number >> (j - kGroupBits) & 1) != 0) {
      const Words other = counters.waiting[j][t];
      low[j] = xor3(plane, other, carry);
      carry = majority3(plane, other, carry);
    } else {
      low[j] = plane ^ carry;
      carry = plane & carry;
    }
  }
  const Words majority = low[num_low];
  if (num_rows % 2 == 0) return with_last_row(low, num_low, majority, last.load(rows[num_odd], t));
  return {majority, broadcast<uint64_t>(0)};
}

// Adds all groups but the last, and returns that.
template <class Tile>
inline RowGroup<Tile> add_groups(Counters& counters, const Tile& tile, const uint32_t* const* rows, size_t num_rows) {
  const size_t first = first_count(odd_rows(num_rows)), last = (odd_rows(num_rows) - 1) / kGroupRows;
  for (size_t number = 0; number < last; ++number) {
    add_group(counters, first, tile, RowGroup<Tile>(tile, rows, num_rows, number), number);
  }
  return RowGroup<Tile>(tile, rows, num_rows, last);
}

SIGNVOTE_FLATTEN uint64_t vote_many(const uint32_t* const* rows, size_t num_rows, size_t numel, Undecided ties,
                                    uint64_t coins, uint32_t* out) {
  VoteWriter writer(num_rows, ties, coins, out);
  Counters counters;
  size_t word = 0;
  while (numel >= 32 * kWords) {
    const size_t left = numel / (32 * kWords);
    const FullTile tile{word, left < kTile ? left : kTile};
    const RowGroup<FullTile> last = add_groups(counters, tile, rows, num_rows);
    writer.write(word, tile.num, [&](size_t t) { return decide_with(counters, last, rows, num_rows, t); });
    numel -= 32 * kWords * tile.num;
    word += kWords * tile.num;
  }
  if (numel > 0) {
    const LastWords tile{word, (numel + 31) / 32};
    const RowGroup<LastWords> last = add_groups(counters, tile, rows, num_rows);
    writer.write_part(word, tile.count, valid_bits(numel), decide_with(counters, last, rows, num_rows, 0));
  }
  return writer.num_tied();
}

uint64_t majority_vote(const uint32_t* const* rows, size_t num_rows, size_t numel, Undecided ties, uint64_t coins,
                       uint32_t* out) {
  using VoteFew = uint64_t (*)(const uint32_t* const*, size_t, Undecided, uint64_t, uint32_t*);
  static constexpr VoteFew kVoteFew[] = {
      vote_few<1>, vote_few<2>,  vote_few<3>,  vote_few<4>,  vote_few<5>,  vote_few<6>,  vote_few<7>,  vote_few<8>,
      vote_few<9>, vote_few<10>, vote_few<11>, vote_few<12>, vote_few<13>, vote_few<14>, vote_few<15>, vote_few<16>};
  constexpr size_t kFew = sizeof kVoteFew / sizeof *kVoteFew;
  if (num_rows <= kFew) return kVoteFew[num_rows - 1](rows, numel, ties, coins, out);
  return vote_many(rows, num_rows, numel, ties, coins, out);
}

// ---------------------------------------------------------------------------------------------------------------------
// Counters that outlive a call

// do_words(load, store, valid) for each register of `numel` coordinates.
template <class DoWords>
inline void for_each_register(size_t numel, const DoWords& do_words) {
  const size_t full = numel / (32 * kWords) * kWords;
  const Words all = broadcast<uint64_t>(~uint64_t{0});
  for (size_t word = 0; word < full; word += kWords) {
    do_words([=](const uint32_t* row) { return load_words(row + word); },
             [=](uint32_t* row, Words bits) { store_words(row + word, bits); }, all);
  }
  numel -= 32 * full;
  if (numel > 0) {
    const size_t count = (numel + 31) / 32;
    do_words([=](const uint32_t* row) { return load_words(row + full, count); },
             [=](uint32_t* row, Words bits) { store_words(row + full, bits, count); }, valid_bits(numel));
  }
}

SIGNVOTE_FLATTEN void add_counts(uint32_t* const* planes, size_t num_planes, const uint32_t* const* addends,
                                 size_t numel) {
  for_each_register(numel, [=](const auto& load_row, const auto& store_row, Words) {
    const Words zero = broadcast<uint64_t>(0);
    Words carry = zero;
    for (size_t j = 0; j < num_planes; ++j) {
      const Words plane = load_row(planes[j]), addend = addends[j] != nullptr ? load_row(addends[j]) : zero;
      store_row(planes[j], xor3(plane, addend, carry));
      carry = majority3(plane, addend, carry);
    }
  });
}

// Where a count is no less than `limit` < 2^num_planes.
template <class LoadRow>
inline Words at_least(uint64_t limit, const uint32_t* const* planes, size_t num_planes, const LoadRow& load_row) {
  Words bits = broadcast<uint64_t>(~uint64_t{0});
  for (size_t j = 0; j < num_planes; ++j) {
    const Words plane = load_row(planes[j]);
    bits = (limit >> j & 1) != 0 ? plane & bits : plane | bits;
  }
  return bits;
}

SIGNVOTE_FLATTEN uint64_t decide_counts(const uint32_t* const* planes, size_t num_planes, uint64_t num_votes,
                                        size_t numel, Undecided ties, uint64_t coins, uint32_t* out) {
  const uint64_t half = num_votes / 2;
  const auto decide_register = [=](const auto& load_row) {
    const Words majority = at_least(half + 1, planes, num_planes, load_row);
    return Decision{majority, majority ^ at_least(half, planes, num_planes, load_row)};
  };
  VoteWriter writer(num_votes, ties, coins, out);
  const size_t num = numel / (32 * kWords), word = num * kWords;
  writer.write(0, num, [&](size_t t) {
    return decide_register([=](const uint32_t* row) { return load_words(row + t * kWords); });
  });
  numel -= 32 * word;
  if (numel > 0) {
    const size_t count = (numel + 31) / 32;
    const auto load_row = [=](const uint32_t* row) { return load_words(row + word, count); };
    writer.write_part(word, count, valid_bits(numel), decide_register(load_row));
  }
  return writer.num_tied();
}

SIGNVOTE_FLATTEN void decide_counts_ternary(const uint32_t* const* planes, size_t num_planes, uint64_t negative_below,
                                            uint64_t positive_from, size_t numel, uint32_t* sign, uint32_t* active) {
  for_each_register(numel, [=](const auto& load_row, const auto& store_row, Words valid) {
    const Words positive = at_least(positive_from, planes, num_planes, load_row) & valid;
    const Words negative = (at_least(negative_below, planes, num_planes, load_row) & valid) ^ valid;
    store_row(sign, positive);
    store_row(active, positive | negative);
  });
}

}  // namespace

#define SIGNVOTE_FOR_EACH_DTYPE(op) {op<kFloat32>, op<kFloat64>, op<kFloat16>, op<kBFloat16>}
#define SIGNVOTE_KERNELS(name)             \
  {name,                                   \
   SIGNVOTE_FOR_EACH_DTYPE(pack_signs),    \
   SIGNVOTE_FOR_EACH_DTYPE(pack_momentum), \
   SIGNVOTE_FOR_EACH_DTYPE(has_nonfinite), \
   majority_vote,                          \
   add_counts,                             \
   decide_counts,                          \
   decide_counts_ternary,                  \
   SIGNVOTE_FOR_EACH_DTYPE(unpack_signs)}

}  // namespace signvote
