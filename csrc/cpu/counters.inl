// Counters that outlive a call: add_counts, decide_counts, decide_counts_ternary.

namespace signvote {
namespace {

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
}  // namespace signvote
