// majority_vote_ternary.
//
// A ballot is two rows of bits: a vote for + is two 1s, one for - two 0s, and one that abstains a 1 and a 0. So M
// ballots count M + n_plus - n_minus. The adder of a ballot's rows and bit 0 of the count, the parity, is cheap: it
// carries the sign of an active ballot, otherwise the parity, which then flips. The carries are M rows of weight 2, and
// are counted as majority_vote counts its rows.

namespace signvote {
namespace {

// Adds a ballot to the parity and returns the carry.
inline Words add_ballot(Words* parity, Words sign, Words active) {
  const Words carry = select(active, sign, *parity);
  *parity = xor3(*parity, active, broadcast<uint64_t>(~uint64_t{0}));
  return carry;
}

// A count as decide_ternary compares it: 0 <= M + n_plus - n_minus <= 2 * M.
struct Quorum {
  uint64_t negative_below, positive_from;

  Quorum(size_t num_rows, uint64_t quorum) {
    const uint64_t lead = quorum <= num_rows ? quorum : num_rows + 1;
    negative_below = num_rows + 1 - lead;
    positive_from = num_rows + lead;
  }

  // Of counts that are bits 0 to `top`, of weight 2 and more, and a parity.
  Ternary decide(Words parity, const Words* bits, int top) const {
    return decide_ternary(negative_below, positive_from, static_cast<size_t>(top) + 2,
                          [&](size_t j) { return j == 0 ? parity : bits[j - 1]; });
  }
};

// The highest bit of a count of so many rows.
constexpr int highest_bit(size_t num_rows) {
  int top = 0;
  while (num_rows >> top > 1) ++top;
  return top;
}

// As many ballots as are read at a time in a group.
template <int kRows>
SIGNVOTE_FLATTEN uint64_t vote_ternary_few(const uint32_t* const* signs, const uint32_t* const* actives, size_t numel,
                                           uint64_t quorum_size, uint32_t* sign, uint32_t* active) {
  constexpr int kTop = highest_bit(kRows);
  const Quorum quorum(kRows, quorum_size);
  const uint32_t *sign_row[kRows], *active_row[kRows];
  for (int i = 0; i < kRows; ++i) {
    sign_row[i] = signs[i];
    active_row[i] = actives[i];
  }
  const auto decide = [&](const auto& load_row) {
    Words parity = broadcast<uint64_t>(0), carries[kRows], bits[kTop + 1];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) carries[i] = add_ballot(&parity, load_row(sign_row[i]), load_row(active_row[i]));
    bits[kTop] = count_bits<kTop, 0>(carries, bits);
    return quorum.decide(parity, bits, kTop);
  };
  TernaryWriter writer(sign, active);
  for_each_tile(numel, [&](auto tile) {
    write_tile(writer, tile,
               [&](size_t t) { return decide([&](const uint32_t* row) { return tile.load(tile.begin(row), t); }); });
  });
  return writer.num_zeros();
}

// As RowGroup, of ballots. A group is filled up with ballots that abstain, which change no lead.
template <class Tile>
class BallotGroup {
 public:
  static constexpr int kBits = 3;
  static constexpr size_t kRows = 1 << kBits;

  // `parity` has a register for each of the tile's, which is set by group 0.
  BallotGroup(const Tile& tile, const uint32_t* const* signs, const uint32_t* const* actives, size_t num_rows,
              size_t number, Words* parity)
      : tile_(tile), is_first_(number == 0), parity_(parity) {
    static const uint32_t kNoRow[kTile * kWords] = {};
    for (size_t i = 0; i < kRows; ++i) {
      const size_t row = kRows * number + i, next = row + kRows;
      sign_[i] = row < num_rows ? tile.begin(signs[row]) : kNoRow;
      active_[i] = row < num_rows ? tile.begin(actives[row]) : kNoRow;
      next_sign_[i] = next < num_rows ? tile.begin(signs[next]) : tile.after(signs[i]);
      next_active_[i] = next < num_rows ? tile.begin(actives[next]) : tile.after(actives[i]);
    }
  }

  // Adds the ballots at register t to the parity and to the bits above it, and returns what is carried on.
  Words add_to(Words* low, size_t t) const {
    if (t * kWords % kLine == 0) {
      for (size_t i = 0; i < kRows; ++i) prefetch(next_sign_[i] + t * kWords);
      for (size_t i = 0; i < kRows; ++i) prefetch(next_active_[i] + t * kWords);
    }
    Words parity = is_first_ ? broadcast<uint64_t>(0) : parity_[t];
    const auto load_carry = [&](size_t i) {
      return add_ballot(&parity, tile_.load(sign_[i], t), tile_.load(active_[i], t));
    };
    const Words carry = add_rows<kBits>(low, load_carry, 0);
    parity_[t] = parity;
    return carry;
  }

 private:
  const Tile& tile_;
  bool is_first_;
  Words* parity_;
  const uint32_t *sign_[kRows], *active_[kRows], *next_sign_[kRows], *next_active_[kRows];
};

SIGNVOTE_FLATTEN uint64_t vote_ternary_many(const uint32_t* const* signs, const uint32_t* const* actives,
                                            size_t num_rows, size_t numel, uint64_t quorum_size, uint32_t* sign,
                                            uint32_t* active) {
  constexpr size_t kRows = BallotGroup<FullTile>::kRows;
  const size_t num_filled = (num_rows + kRows - 1) / kRows * kRows;
  const int top = highest_bit(num_filled);
  const Quorum quorum(num_filled, quorum_size);
  TernaryWriter writer(sign, active);
  Counters counters;
  Words parity[kTile];
  for_each_tile(numel, [&](auto tile) {
    using Group = BallotGroup<decltype(tile)>;
    const auto make_group = [&](size_t number) { return Group(tile, signs, actives, num_rows, number, parity); };
    const Group last = add_groups(counters, 0, tile, num_rows, make_group);
    write_tile(writer, tile, [&](size_t t) {
      Words bits[kMaxPlanes];
      add_last_group(counters, 0, last, last_group<Group>(num_rows), top, t, bits);
      return quorum.decide(parity[t], bits, top);
    });
  });
  return writer.num_zeros();
}

uint64_t majority_vote_ternary(const uint32_t* const* signs, const uint32_t* const* actives, size_t num_rows,
                               size_t numel, uint64_t quorum, uint32_t* sign, uint32_t* active) {
  using VoteFew = uint64_t (*)(const uint32_t* const*, const uint32_t* const*, size_t, uint64_t, uint32_t*, uint32_t*);
  static constexpr VoteFew kVoteFew[] = {vote_ternary_few<1>, vote_ternary_few<2>, vote_ternary_few<3>,
                                         vote_ternary_few<4>, vote_ternary_few<5>, vote_ternary_few<6>,
                                         vote_ternary_few<7>, vote_ternary_few<8>};
  constexpr size_t kFew = sizeof kVoteFew / sizeof *kVoteFew;
  if (num_rows <= kFew) return kVoteFew[num_rows - 1](signs, actives, numel, quorum, sign, active);
  return vote_ternary_many(signs, actives, num_rows, numel, quorum, sign, active);
}

}  // namespace
}  // namespace signvote
