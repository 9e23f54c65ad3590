// Counters that outlive a call: add_counts, add_counts_ternary, decide_counts, decide_counts_ternary.

namespace signvote {
namespace {

// do_words(load, store) for each register of `numel` coordinates.
template <class DoWords>
inline void for_each_register(size_t numel, const DoWords& do_words) {
  const size_t full = numel / (32 * kWords) * kWords;
  for (size_t word = 0; word < full; word += kWords) {
    do_words([=](const uint32_t* row) { return load_words(row + word); },
             [=](uint32_t* row, Words bits) { store_words(row + word, bits); });
  }
  numel -= 32 * full;
  if (numel > 0) {
    const size_t count = (numel + 31) / 32;
    do_words([=](const uint32_t* row) { return load_words(row + full, count); },
             [=](uint32_t* row, Words bits) { store_words(row + full, bits, count); });
  }
}

SIGNVOTE_FLATTEN void add_counts(uint32_t* const* planes, size_t num_planes, const uint32_t* const* addends,
                                 size_t numel) {
  for_each_register(numel, [=](const auto& load_row, const auto& store_row) {
    const Words zero = broadcast<uint64_t>(0);
    Words carry = zero;
    for (size_t j = 0; j < num_planes; ++j) {
      const Words plane = load_row(planes[j]), addend = addends[j] != nullptr ? load_row(addends[j]) : zero;
      store_row(planes[j], xor3(plane, addend, carry));
      carry = majority3(plane, addend, carry);
    }
  });
}

SIGNVOTE_FLATTEN void add_counts_ternary(uint32_t* const* planes, size_t num_planes, const uint32_t* sign,
                                         const uint32_t* active, uint64_t weight, size_t numel) {
  for_each_register(numel, [=](const auto& load_row, const auto& store_row) {
    const Words zero = broadcast<uint64_t>(0), is_active = load_row(active);
    const Words abstains = is_active ^ broadcast<uint64_t>(~uint64_t{0}), is_positive = load_row(sign) & is_active;
    Words carry = zero, twice = zero;
    for (size_t j = 0; j < num_planes; ++j) {
      const Words plane = load_row(planes[j]), once = (weight >> j & 1) != 0 ? abstains : zero;
      const Words addend = once | twice;
      twice = (weight >> j & 1) != 0 ? is_positive : zero;
      store_row(planes[j], xor3(plane, addend, carry));
      carry = majority3(plane, addend, carry);
    }
  });
}

SIGNVOTE_FLATTEN uint64_t decide_counts(const uint32_t* const* planes, size_t num_planes, uint64_t num_votes,
                                        size_t numel, Undecided ties, uint64_t coins, uint32_t* out) {
  const uint64_t half = num_votes / 2;
  const auto decide_register = [=](const auto& load_row) {
    const auto plane_at = [&](size_t j) { return load_row(planes[j]); };
    const Words majority = at_least(half + 1, num_planes, plane_at);
    return Decision{majority, majority ^ at_least(half, num_planes, plane_at)};
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

SIGNVOTE_FLATTEN uint64_t decide_counts_ternary(const uint32_t* const* planes, size_t num_planes,
                                                uint64_t negative_below, uint64_t positive_from, size_t numel,
                                                uint32_t* sign, uint32_t* active) {
  const auto decide_register = [=](const auto& load_row) {
    return decide_ternary(negative_below, positive_from, num_planes, [&](size_t j) { return load_row(planes[j]); });
  };
  TernaryWriter writer(sign, active);
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
  return writer.num_zeros();
}

}  // namespace
}  // namespace signvote
