// pack_signs and has_nonfinite, and what momentum shares with them: the signs of a block, the zeros of a group.

namespace signvote {
namespace {

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
  for (; kHasGroups && numel >= kGroup; numel -= kGroup, x += kGroup, words += kWords, coins += kGroupBlocks) {
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

}  // namespace
}  // namespace signvote
