// The ops over runs, split over threads: what the hook does to a bucket. An op on one array is that on one run. Plain
// C++; the binding has checked.
#ifndef SIGNVOTE_RUNS_H
#define SIGNVOTE_RUNS_H

#include <stddef.h>
#include <stdint.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "cpu/parallel.h"
#include "kernels.h"
#include "run.h"

namespace signvote {

// A range of runs is one of their coordinates one after the other, each run filled up to a multiple of 64: so a cut
// leaves pieces that begin at multiples of 64.
inline size_t filled_up(const Run& run) { return (static_cast<size_t>(run.numel) + 63) / 64 * 64; }

inline size_t numel_of(const Runs& runs) {
  size_t numel = 0;
  for (const Run& run : runs) numel += filled_up(run);
  return numel;
}

// do_piece(piece) for the piece of each run that lies in one of the ranges.
template <class DoPiece>
void for_each_piece(const Runs& runs, Ranges& ranges, const DoPiece& do_piece) {
  const Run* run = runs.begin();
  size_t run_begin = 0;
  Range range;
  while (ranges.next(&range)) {
    for (; run != runs.end() && run_begin < range.end; ++run) {
      const size_t run_end = run_begin + filled_up(*run);
      if (run_end > range.begin) {
        const size_t skipped = std::max(run_begin, range.begin) - run_begin;
        const size_t numel = std::min(static_cast<size_t>(run->numel), range.end - run_begin) - skipped;
        do_piece(piece_of(*run, skipped, numel));
      }
      if (run_end > range.end) break;
      run_begin = run_end;
    }
  }
}

// Counts of all threads.
class SharedCounts {
 public:
  void add(const PackCounts& counts) {
    zeros_.fetch_add(counts.zeros, std::memory_order_relaxed);
    nonfinite_.fetch_add(counts.nonfinite, std::memory_order_relaxed);
  }
  PackCounts sum() const { return {zeros_.load(), nonfinite_.load()}; }

 private:
  std::atomic<uint64_t> zeros_{0}, nonfinite_{0};
};

// pack_piece(piece) packs one and returns its counts.
template <class PackPiece>
PackCounts pack_pieces(const Runs& runs, const Split& split, const PackPiece& pack_piece) {
  SharedCounts sum;
  parallel(split, [&](Ranges& ranges, size_t) {
    PackCounts own{0, 0};
    for_each_piece(runs, ranges, [&](const Run& piece) {
      const PackCounts counts = pack_piece(piece);
      own.zeros += counts.zeros;
      own.nonfinite += counts.nonfinite;
    });
    sum.add(own);
  });
  return sum.sum();
}

inline PackCounts pack_runs(const Kernels& kernels, DType dtype, const char* bucket, size_t itemsize, const Runs& runs,
                            Undecided zeros, CoinsOf coins_of, uint64_t seed, uint32_t* words, size_t max_threads) {
  return pack_pieces(runs, split(numel_of(runs), 8 * itemsize + 1, max_threads), [&](const Run& piece) {
    return kernels.pack_signs[dtype](bucket + piece.coordinate * itemsize, piece.numel, zeros, coins_of(piece, seed),
                                     words + piece.word);
  });
}

inline PackCounts pack_runs_momentum(const Kernels& kernels, DType dtype, const char* bucket, size_t itemsize,
                                     char* momentum, size_t momentum_itemsize, const MomentumCoefficients& coefficients,
                                     const Runs& runs, Undecided zeros, CoinsOf coins_of, uint64_t seed,
                                     uint32_t* words, size_t max_threads) {
  const size_t bits = 8 * (itemsize + 2 * momentum_itemsize) + 1;
  return pack_pieces(runs, split(numel_of(runs), bits, max_threads), [&](const Run& piece) {
    return kernels.pack_momentum[dtype](bucket + piece.coordinate * itemsize,
                                        momentum + piece.coordinate * momentum_itemsize, piece.numel, coefficients,
                                        zeros, coins_of(piece, seed), words + piece.word);
  });
}

inline bool has_nonfinite(const Kernels& kernels, DType dtype, const char* x, size_t itemsize, const Runs& runs,
                          size_t max_threads) {
  std::atomic<bool> found{false};
  parallel(split(numel_of(runs), 8 * itemsize, max_threads), [&](Ranges& ranges, size_t) {
    for_each_piece(runs, ranges, [&](const Run& piece) {
      if (found.load(std::memory_order_relaxed)) return;
      if (kernels.has_nonfinite[dtype](x + piece.coordinate * itemsize, piece.numel)) {
        found.store(true, std::memory_order_relaxed);
      }
    });
  });
  return found;
}

inline uint64_t vote_runs(const Kernels& kernels, const std::vector<const uint32_t*>& rows, const Runs& runs,
                          Undecided ties, CoinsOf coins_of, uint64_t seed, uint32_t* out, size_t max_threads) {
  const Split split_runs = split(numel_of(runs), rows.size() + 1, max_threads);
  std::vector<const uint32_t*> shifted_rows(rows.size() * split_runs.num_threads);
  std::atomic<uint64_t> tied{0};
  parallel(split_runs, [&](Ranges& ranges, size_t thread) {
    const uint32_t** const shifted = shifted_rows.data() + thread * rows.size();
    uint64_t own = 0;
    for_each_piece(runs, ranges, [&](const Run& piece) {
      for (size_t row = 0; row < rows.size(); ++row) shifted[row] = rows[row] + piece.word;
      own += kernels.majority_vote(shifted, rows.size(), piece.numel, ties, coins_of(piece, seed), out + piece.word);
    });
    tied.fetch_add(own, std::memory_order_relaxed);
  });
  return tied;
}

inline void unpack_runs(const Kernels& kernels, DType dtype, const uint32_t* words, const Runs& runs, uint64_t positive,
                        char* bucket, size_t itemsize, size_t max_threads) {
  parallel(split(numel_of(runs), 8 * itemsize + 1, max_threads), [&](Ranges& ranges, size_t) {
    for_each_piece(runs, ranges, [&](const Run& piece) {
      kernels.unpack_signs[dtype](words + piece.word, piece.numel, positive, bucket + piece.coordinate * itemsize);
    });
  });
}

inline PackCounts pack_ternary_runs(const Kernels& kernels, DType dtype, const char* bucket, size_t itemsize,
                                    const Runs& runs, uint64_t limit, const Planes<uint32_t>& planes,
                                    size_t max_threads) {
  return pack_pieces(runs, split(numel_of(runs), 8 * itemsize + 2, max_threads), [&](const Run& piece) {
    return kernels.pack_ternary[dtype](bucket + piece.coordinate * itemsize, piece.numel, limit,
                                       planes.sign + piece.word, planes.active + piece.word);
  });
}

// Returns how many coordinates are 0.
inline uint64_t vote_ternary_runs(const Kernels& kernels, const std::vector<Planes<const uint32_t>>& rows,
                                  const Runs& runs, uint64_t quorum, const Planes<uint32_t>& out, size_t max_threads) {
  const size_t num_rows = rows.size();
  const Split split_runs = split(numel_of(runs), 2 * num_rows + 2, max_threads);
  std::vector<const uint32_t*> shifted_rows(2 * num_rows * split_runs.num_threads);
  std::atomic<uint64_t> zeros{0};
  parallel(split_runs, [&](Ranges& ranges, size_t thread) {
    const uint32_t **const signs = shifted_rows.data() + thread * 2 * num_rows, **const actives = signs + num_rows;
    uint64_t own = 0;
    for_each_piece(runs, ranges, [&](const Run& piece) {
      for (size_t row = 0; row < num_rows; ++row) {
        signs[row] = rows[row].sign + piece.word;
        actives[row] = rows[row].active + piece.word;
      }
      own += kernels.majority_vote_ternary(signs, actives, num_rows, piece.numel, quorum, out.sign + piece.word,
                                           out.active + piece.word);
    });
    zeros.fetch_add(own, std::memory_order_relaxed);
  });
  return zeros;
}

inline void unpack_ternary_runs(const Kernels& kernels, DType dtype, const Planes<const uint32_t>& planes,
                                const Runs& runs, uint64_t positive, char* bucket, size_t itemsize,
                                size_t max_threads) {
  parallel(split(numel_of(runs), 8 * itemsize + 2, max_threads), [&](Ranges& ranges, size_t) {
    for_each_piece(runs, ranges, [&](const Run& piece) {
      kernels.unpack_ternary[dtype](planes.sign + piece.word, planes.active + piece.word, piece.numel, positive,
                                    bucket + piece.coordinate * itemsize);
    });
  });
}

}  // namespace signvote

#endif
