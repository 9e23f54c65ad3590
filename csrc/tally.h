// The ops of VoteTally, split over threads. Plain C++; the binding has checked.
#ifndef SIGNVOTE_TALLY_H
#define SIGNVOTE_TALLY_H

#include <stddef.h>
#include <stdint.h>

#include "cpu/parallel.h"
#include "kernels.h"
#include "runs.h"

namespace signvote {

constexpr size_t kMaxCounterPlanes = 32;

// Counters, one per coordinate: row j holds bit j of them.
struct CounterPlanes {
  uint32_t* data;
  size_t num_planes, width;  // at most kMaxCounterPlanes planes of `width` words

  // The planes from `word` on.
  void begin_at(size_t word, uint32_t** planes) const {
    for (size_t plane = 0; plane < num_planes; ++plane) planes[plane] = data + plane * width + word;
  }
};

// add_piece(planes, word, numel) adds to the counters of `numel` coordinates from `word` on.
template <class AddPiece>
void add_pieces(const CounterPlanes& counters, size_t bits_per_coordinate, size_t max_threads,
                const AddPiece& add_piece) {
  const Run whole = whole_run(32 * counters.width);
  const Runs runs{&whole, 1};
  parallel(split(numel_of(runs), bits_per_coordinate, max_threads), [&](Ranges& ranges, size_t) {
    for_each_piece(runs, ranges, [&](const Run& piece) {
      uint32_t* planes[kMaxCounterPlanes];
      const size_t word = static_cast<size_t>(piece.word);
      counters.begin_at(word, planes);
      add_piece(planes, word, static_cast<size_t>(piece.numel));
    });
  });
}

// Adds up what addend_at(plane, word) points to, or null for a plane of zeros.
template <class AddendAt>
void add_to_counters(const Kernels& kernels, const CounterPlanes& counters, size_t bits_per_coordinate,
                     size_t max_threads, const AddendAt& addend_at) {
  add_pieces(counters, bits_per_coordinate, max_threads, [&](uint32_t* const* planes, size_t word, size_t numel) {
    const uint32_t* addends[kMaxCounterPlanes];
    for (size_t plane = 0; plane < counters.num_planes; ++plane) addends[plane] = addend_at(plane, word);
    kernels.add_counts(planes, counters.num_planes, addends, numel);
  });
}

// `weight` votes for the signs in `words`.
inline void tally_add(const Kernels& kernels, const CounterPlanes& counters, const uint32_t* words, uint64_t weight,
                      size_t max_threads) {
  add_to_counters(kernels, counters, 2 * counters.num_planes + 1, max_threads,
                  [&](size_t plane, size_t word) { return (weight >> plane & 1) != 0 ? words + word : nullptr; });
}

// `weight` votes for the signs of the coordinates that are active in `votes`.
inline void tally_add_ternary(const Kernels& kernels, const CounterPlanes& counters,
                              const Planes<const uint32_t>& votes, uint64_t weight, size_t max_threads) {
  add_pieces(
      counters, 2 * counters.num_planes + 2, max_threads, [&](uint32_t* const* planes, size_t word, size_t numel) {
        kernels.add_counts_ternary(planes, counters.num_planes, votes.sign + word, votes.active + word, weight, numel);
      });
}

// The counts of others, which have no more planes.
inline void tally_merge(const Kernels& kernels, const CounterPlanes& counters, const CounterPlanes& others,
                        size_t max_threads) {
  add_to_counters(kernels, counters, 2 * counters.num_planes + others.num_planes, max_threads,
                  [&](size_t plane, size_t word) {
                    return plane < others.num_planes ? others.data + plane * others.width + word : nullptr;
                  });
}

inline uint64_t tally_decide(const Kernels& kernels, const CounterPlanes& counters, uint64_t num_votes,
                             const Runs& runs, Undecided ties, CoinsOf coins_of, uint64_t seed, uint32_t* out,
                             size_t max_threads) {
  std::atomic<uint64_t> tied{0};
  parallel(split(numel_of(runs), counters.num_planes + 1, max_threads), [&](Ranges& ranges, size_t) {
    uint64_t own = 0;
    for_each_piece(runs, ranges, [&](const Run& piece) {
      uint32_t* planes[kMaxCounterPlanes];
      counters.begin_at(static_cast<size_t>(piece.word), planes);
      own += kernels.decide_counts(planes, counters.num_planes, num_votes, static_cast<size_t>(piece.numel), ties,
                                   coins_of(piece, seed), out + piece.word);
    });
    tied.fetch_add(own, std::memory_order_relaxed);
  });
  return tied;
}

// Ternary: 0 where the votes for + and those for - differ by less than `quorum`, 1 <= quorum. Returns how many are 0.
inline uint64_t tally_decide_ternary(const Kernels& kernels, const CounterPlanes& counters, uint64_t num_votes,
                                     uint64_t quorum, const Runs& runs, const Planes<uint32_t>& out,
                                     size_t max_threads) {
  const bool can_reach = quorum <= num_votes;  // otherwise the limits may not fit into the counters
  const uint64_t largest_minority = can_reach ? (num_votes - quorum) / 2 : 0;
  std::atomic<uint64_t> zeros{0};
  parallel(split(numel_of(runs), counters.num_planes + 2, max_threads), [&](Ranges& ranges, size_t) {
    uint64_t own = 0;
    for_each_piece(runs, ranges, [&](const Run& piece) {
      const size_t numel = static_cast<size_t>(piece.numel);
      uint32_t *const sign = out.sign + piece.word, *const active = out.active + piece.word;
      if (!can_reach) {
        std::fill_n(sign, (numel + 31) / 32, 0);
        std::fill_n(active, (numel + 31) / 32, 0);
        own += numel;
        return;
      }
      uint32_t* planes[kMaxCounterPlanes];
      counters.begin_at(static_cast<size_t>(piece.word), planes);
      own += kernels.decide_counts_ternary(planes, counters.num_planes, largest_minority + 1,
                                           num_votes - largest_minority, numel, sign, active);
    });
    zeros.fetch_add(own, std::memory_order_relaxed);
  });
  return zeros;
}

// The counts themselves, which are for looking at: no kernel.
inline void tally_counts(const CounterPlanes& counters, size_t numel, int32_t* out) {
  for (size_t i = 0; i < numel; ++i) {
    uint32_t count = 0;
    for (size_t plane = 0; plane < counters.num_planes; ++plane) {
      count |= (counters.data[plane * counters.width + i / 32] >> i % 32 & 1) << plane;
    }
    out[i] = static_cast<int32_t>(count);
  }
}

}  // namespace signvote

#endif
