// pack_ternary.

namespace signvote {
namespace {

// How many coordinates are active, NaN, NaN or ±inf.
struct TernaryCounts {
  uint64_t active = 0, nan = 0, nonfinite = 0;
};

// Sign and active of the block at x, and those of its coordinates in `valid` counted.
template <DType kDType>
inline void pack_ternary_block(const BitsOf<kDType>* x, BitsOf<kDType> limit, uint64_t valid, uint64_t* sign,
                               uint64_t* active, TernaryCounts& counts) {
  using U = BitsOf<kDType>;
  const Lanes<U> magnitude = broadcast<U>(kMagnitude<U>), limits = broadcast<U>(limit);
  uint64_t numbers = valid;
  const uint64_t nonfinite = find_nonfinite<kDType>(x) & valid;
  if (nonfinite != 0) {
    const Lanes<U> infinity = broadcast<U>(Format<kDType>::kInfinity);
    const uint64_t nan = bits_where(x, [=](Lanes<U> u) { return greater(u & magnitude, infinity); }) & valid;
    numbers ^= nan;
    counts.nan += popcount(nan);
    counts.nonfinite += popcount(nonfinite);
  }
  *sign = bits_where(x, [=](Lanes<U> u) { return greater(u, limits); }) & numbers;
  *active = bits_where(x, [=](Lanes<U> u) { return greater(u & magnitude, limits); }) & numbers;
  counts.active += popcount(*active);
}

// Of the group at x, unless a coordinate is not finite: then it returns false. It counts nothing.
template <DType kDType>
inline bool pack_ternary_group(const BitsOf<kDType>* x, BitsOf<kDType> limit, uint32_t* sign, uint32_t* active) {
  using U = BitsOf<kDType>;
  const Lanes<U> magnitude = broadcast<U>(kMagnitude<U>), limits = broadcast<U>(limit);
  Lanes<U> greatest = broadcast<U>(0);
  for (size_t block = 0; block < kGroupBlocks; ++block) {
    const U* const begin = x + block * kBlock;
    store_mask_of_64<U>(sign + 2 * block, [&](size_t i) { return greater(load(begin + i), limits); });
    store_mask_of_64<U>(active + 2 * block, [&](size_t i) {
      const Lanes<U> u = load(begin + i) & magnitude;
      greatest = max(greatest, u);
      return greater(u, limits);
    });
  }
  return !any(greater(greatest, broadcast<U>(Format<kDType>::kInfinity - 1)));
}

template <DType kDType>
SIGNVOTE_FLATTEN PackCounts pack_ternary(const void* data, size_t numel, uint64_t limit_bits, uint32_t* sign,
                                         uint32_t* active) {
  using U = BitsOf<kDType>;
  constexpr size_t kGroups = 16;  // whose words are counted when they have all been stored
  const U* x = static_cast<const U*>(data);
  const U limit = static_cast<U>(limit_bits);
  const uint64_t all = numel;
  TernaryCounts counts;
  uint64_t signs, actives;
  while (kHasGroups && numel >= kGroup) {
    const size_t num = numel / kGroup < kGroups ? numel / kGroup : kGroups;
    for (size_t group = 0; group < num; ++group, x += kGroup, sign += kWords, active += kWords) {
      if (pack_ternary_group<kDType>(x, limit, sign, active)) continue;
      TernaryCounts special;
      for (size_t block = 0; block < kGroupBlocks; ++block) {
        pack_ternary_block<kDType>(x + block * kBlock, limit, ~uint64_t{0}, &signs, &actives, special);
        store_block(sign + 2 * block, signs, kBlock);
        store_block(active + 2 * block, actives, kBlock);
      }
      counts.nan += special.nan;
      counts.nonfinite += special.nonfinite;
    }
    for (size_t group = 1; group <= num; ++group) counts.active += popcount(load_words(active - group * kWords));
    numel -= num * kGroup;
  }
  for (; numel >= kBlock; numel -= kBlock, x += kBlock, sign += 2, active += 2) {
    pack_ternary_block<kDType>(x, limit, ~uint64_t{0}, &signs, &actives, counts);
    store_block(sign, signs, kBlock);
    store_block(active, actives, kBlock);
  }
  if (numel > 0) {
    pack_ternary_block<kDType>(Tail<U>(x, numel).block, limit, low_bits(numel), &signs, &actives, counts);
    store_block(sign, signs, numel);
    store_block(active, actives, numel);
  }
  return {all - counts.active - counts.nan, counts.nonfinite};
}

}  // namespace
}  // namespace signvote
