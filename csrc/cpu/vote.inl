// majority_vote.
//
// Vertical counters: bit j of the count of 64 coordinates at once is one word, and carry-save adders add rows of words
// to it. The count of an odd number of rows starts at 2^k - 1 - num_rows / 2 instead of 0, with the smallest k that
// makes this no less than 0: then a majority is bit k of the count.
//
// The last of an even number of rows stays out of the count. The rows tie where the others have a majority of one and
// the last row is against it, that is where bits 0 to k - 1 of the count all differ from bit k, and bit k from the last
// row. Elsewhere the majority of the others stands.

namespace signvote {
namespace {

constexpr int count_bits_below_majority(size_t num_rows) {
  int k = 0;
  while ((size_t{1} << k) - 1 < num_rows / 2) ++k;
  return k;
}
constexpr size_t first_count(size_t num_rows) {
  return (size_t{1} << count_bits_below_majority(num_rows)) - 1 - num_rows / 2;
}

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

constexpr size_t kTile = 2048 / kWords;  // registers to a tile
constexpr size_t kLine = 16;             // 32-bit words to a line of the cache
constexpr int kMaxPlanes = 17;           // as many as 65535 rows need, and one that stays empty

// Bit j of a number, for all coordinates.
inline Words bit_of(size_t number, int j) { return broadcast<uint64_t>((number >> j & 1) != 0 ? ~uint64_t{0} : 0); }

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

// The counters of a tile. Rows come in groups of 2^kBits, and what a group carries to bit kBits waits until a second
// carry comes, so that both go through one adder; so do the carries of that adder at the bit above, and so on. A bit of
// the number of groups says whether a carry is waiting. A plane is written when it is first added to; until then its
// bits are those of the count at the start.
struct Counters {
  Words planes[kMaxPlanes][kTile], waiting[kMaxPlanes][kTile];
};

// How many planes are written after so many groups, at least one.
inline int num_written(size_t num_groups, int group_bits) {
  int planes = group_bits;
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
  size_t word, count, numel;
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
  static constexpr int kBits = 4;

  RowGroup(const Tile& tile, const uint32_t* const* rows, size_t num_rows, size_t number) : tile_(tile) {
    static const uint32_t kNoRow[kTile * kWords] = {};
    for (size_t i = 0; i < kRows; ++i) {
      const size_t row = kRows * number + i, next = row + kRows;
      row_[i] = row < odd_rows(num_rows) ? tile.begin(rows[row]) : kNoRow;
      next_[i] = next < num_rows ? tile.begin(rows[next]) : tile.after(rows[i]);
    }
  }

  // Adds the rows at register t to the lowest bits of their count, and returns what is carried on.
  Words add_to(Words* low, size_t t) const {
    if (t * kWords % kLine == 0) {
      for (size_t i = 0; i < kRows; ++i) prefetch(next_[i] + t * kWords);
    }
    return add_rows<kBits>(low, [&](size_t i) { return tile_.load(row_[i], t); }, 0);
  }

  // Of a row that is not counted.
  Words load(const uint32_t* row, size_t t) const { return tile_.load(tile_.begin(row), t); }

 private:
  static constexpr size_t kRows = 1 << kBits;
  const Tile& tile_;
  const uint32_t *row_[kRows], *next_[kRows];
};

// Adds group `number`, through as many more adders as there are carries waiting in a row.
template <class Tile, class Group>
inline void add_group(Counters& counters, size_t first, const Tile& tile, const Group& group, size_t number) {
  constexpr int kBits = Group::kBits;
  const int written = num_written(number, kBits);
  int top = kBits;
  for (; (number >> (top - kBits) & 1) != 0; ++top) {
    if (top < written) continue;
    for (size_t t = 0; t < tile.num; ++t) counters.planes[top][t] = bit_of(first, top);
  }
  for (size_t t = 0; t < tile.num; ++t) {
    Words low[kBits];
    for (int j = 0; j < kBits; ++j) low[j] = number > 0 ? counters.planes[j][t] : bit_of(first, j);
    Words carry = group.add_to(low, t);
    for (int j = 0; j < kBits; ++j) counters.planes[j][t] = low[j];
    for (int j = kBits; j < top; ++j) {
      const Words plane = counters.planes[j][t], other = counters.waiting[j][t];
      counters.planes[j][t] = xor3(plane, other, carry);
      carry = majority3(plane, other, carry);
    }
    counters.waiting[top][t] = carry;
  }
}

// The number of the last group.
template <class Group>
size_t last_group(size_t num_rows) {
  return (num_rows - 1) >> Group::kBits;
}

// Bits 0 to `top` of the count at register t after the last group, which is group `number` > 0.
template <class Group>
inline void add_last_group(const Counters& counters, size_t first, const Group& last, size_t number, int top, size_t t,
                           Words* bits) {
  constexpr int kBits = Group::kBits;
  const int written = num_written(number, kBits);
  for (int j = 0; j < kBits; ++j) bits[j] = counters.planes[j][t];
  Words carry = last.add_to(bits, t);
  for (int j = kBits; j <= top; ++j) {
    const Words plane = j < written ? counters.planes[j][t] : bit_of(first, j);
    if ((number >> (j - kBits) & 1) != 0) {
      const Words other = counters.waiting[j][t];
      bits[j] = xor3(plane, other, carry);
      carry = majority3(plane, other, carry);
    } else {
      bits[j] = plane ^ carry;
      carry = plane & carry;
    }
  }
}

// The decision at register t, with the last group.
template <class Tile>
inline Decision decide_with(const Counters& counters, const RowGroup<Tile>& last, const uint32_t* const* rows,
                            size_t num_rows, size_t t) {
  const size_t num_odd = odd_rows(num_rows);
  const int num_low = count_bits_below_majority(num_odd);
  Words bits[kMaxPlanes];
  add_last_group(counters, first_count(num_odd), last, last_group<RowGroup<Tile>>(num_odd), num_low, t, bits);
  const Words majority = bits[num_low];
  if (num_rows % 2 == 0) return with_last_row(bits, num_low, majority, last.load(rows[num_odd], t));
  return {majority, broadcast<uint64_t>(0)};
}

// Adds all groups but the last, and returns that. make_group(number) is group `number`; the count starts at `first`.
template <class Tile, class MakeGroup>
inline auto add_groups(Counters& counters, size_t first, const Tile& tile, size_t num_rows,
                       const MakeGroup& make_group) {
  const size_t last = last_group<decltype(make_group(0))>(num_rows);
  for (size_t number = 0; number < last; ++number) add_group(counters, first, tile, make_group(number), number);
  return make_group(last);
}

// do_tile(tile) for the tiles of `numel` coordinates, the last of which may be a LastWords.
template <class DoTile>
inline void for_each_tile(size_t numel, const DoTile& do_tile) {
  size_t word = 0;
  while (numel >= 32 * kWords) {
    const size_t left = numel / (32 * kWords);
    const FullTile tile{word, left < kTile ? left : kTile};
    do_tile(tile);
    numel -= 32 * kWords * tile.num;
    word += kWords * tile.num;
  }
  if (numel > 0) do_tile(LastWords{word, (numel + 31) / 32, numel});
}

// The decisions decide(t) of a tile.
template <class Writer, class Decide>
inline void write_tile(Writer& writer, const FullTile& tile, const Decide& decide) {
  writer.write(tile.word, tile.num, decide);
}
template <class Writer, class Decide>
inline void write_tile(Writer& writer, const LastWords& tile, const Decide& decide) {
  writer.write_part(tile.word, tile.count, valid_bits(tile.numel), decide(0));
}

SIGNVOTE_FLATTEN uint64_t vote_many(const uint32_t* const* rows, size_t num_rows, size_t numel, Undecided ties,
                                    uint64_t coins, uint32_t* out) {
  const size_t num_odd = odd_rows(num_rows);
  VoteWriter writer(num_rows, ties, coins, out);
  Counters counters;
  for_each_tile(numel, [&](auto tile) {
    using Group = RowGroup<decltype(tile)>;
    const auto make_group = [&](size_t number) { return Group(tile, rows, num_rows, number); };
    const Group last = add_groups(counters, first_count(num_odd), tile, num_odd, make_group);
    write_tile(writer, tile, [&](size_t t) { return decide_with(counters, last, rows, num_rows, t); });
  });
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

}  // namespace
}  // namespace signvote
