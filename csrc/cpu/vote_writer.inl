// What a vote and a tally end with: decisions become words, ties take their coins and are counted.

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

}  // namespace
}  // namespace signvote
