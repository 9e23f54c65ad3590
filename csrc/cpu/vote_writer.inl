// What a vote and a tally end with: decisions become words, ties take their coins, ties and zeros are counted.

namespace signvote {
namespace {

// Where a tie is, the majority means nothing.
struct Decision {
  Words majority, tie;
};

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

// Counts bits. They are added up like rows, and stay in registers.
class BitCounter {
 public:
  // Of the registers next(0) to next(num - 1), which are asked for in order.
  template <class Next>
  void add(size_t num, const Next& next) {
    Words planes[2] = {planes_[0], planes_[1]};
    uint64_t fours = 0;
    size_t t = 0;
    for (; num - t >= 4; t += 4) fours += popcount(add_rows<2>(planes, next, t));
    for (; t < num; ++t) ones_ += popcount(next(t));
    fours_ += fours;
    planes_[0] = planes[0];
    planes_[1] = planes[1];
  }
  void add(Words bits) { ones_ += popcount(bits); }

  uint64_t sum() const { return 4 * fours_ + 2 * popcount(planes_[1]) + popcount(planes_[0]) + ones_; }

 private:
  Words planes_[2] = {broadcast<uint64_t>(0), broadcast<uint64_t>(0)};
  uint64_t fours_ = 0, ones_ = 0;
};

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
      tied_.add(tie);
    }
    store_words(out_ + word, bits, count);
  }

  uint64_t num_tied() const { return tied_.sum(); }

 private:
  // undecided() is what the ties of the next register become.
  template <class Decide, class NextUndecided>
  void write_ties(size_t word, size_t num, const Decide& decide, const NextUndecided& next_undecided) {
    uint32_t* const out = out_ + word;
    tied_.add(num, [&](size_t t) {
      const Decision decision = decide(t);
      store_words(out + t * kWords, select(decision.tie, next_undecided(), decision.majority));
      return decision.tie;
    });
  }

  uint32_t* out_;
  bool can_tie_;
  Undecided ties_;
  uint64_t coins_;
  BitCounter tied_;
};

// The planes of a register.
struct Ternary {
  Words sign, active;
};

// Where a count is no less than `limit` < 2^num_planes; plane_at(j) is bit j of all counts.
template <class PlaneAt>
inline Words at_least(uint64_t limit, size_t num_planes, const PlaneAt& plane_at) {
  Words bits = broadcast<uint64_t>(~uint64_t{0});
  for (size_t j = 0; j < num_planes; ++j) {
    const Words plane = plane_at(j);
    bits = (limit >> j & 1) != 0 ? plane & bits : plane | bits;
  }
  return bits;
}

// As decide_counts_ternary says it.
template <class PlaneAt>
inline Ternary decide_ternary(uint64_t negative_below, uint64_t positive_from, size_t num_planes,
                              const PlaneAt& plane_at) {
  const Words positive = at_least(positive_from, num_planes, plane_at);
  const Words negative = at_least(negative_below, num_planes, plane_at) ^ broadcast<uint64_t>(~uint64_t{0});
  return {positive, positive | negative};
}

// Writes ternary decisions and counts zeros.
class TernaryWriter {
 public:
  TernaryWriter(uint32_t* sign, uint32_t* active) : sign_(sign), active_(active) {}

  // Registers decide(0) to decide(num - 1), which begin at `word`.
  template <class Decide>
  void write(size_t word, size_t num, const Decide& decide) {
    uint32_t *const sign = sign_ + word, *const active = active_ + word;
    const Words ones = broadcast<uint64_t>(~uint64_t{0});
    zeros_.add(num, [&](size_t t) {
      const Ternary decision = decide(t);
      store_words(sign + t * kWords, decision.sign);
      store_words(active + t * kWords, decision.active);
      return decision.active ^ ones;
    });
  }

  // The first `count` words of a register, of which only the bits in `valid` are coordinates.
  void write_part(size_t word, size_t count, Words valid, const Ternary& decision) {
    const Words active = decision.active & valid;
    store_words(sign_ + word, decision.sign & valid, count);
    store_words(active_ + word, active, count);
    zeros_.add(active ^ valid);
  }

  uint64_t num_zeros() const { return zeros_.sum(); }

 private:
  uint32_t *sign_, *active_;
  BitCounter zeros_;
};

}  // namespace
}  // namespace signvote
