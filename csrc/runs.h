// The ops over runs: what the hook does to a bucket, one kernel call per run. Plain C++; the binding has checked.
#ifndef SIGNVOTE_RUNS_H
#define SIGNVOTE_RUNS_H

#include <stddef.h>
#include <stdint.h>

#include <vector>

#include "kernels.h"

namespace signvote {

// A piece of one parameter in a bucket. The coins of a coordinate follow from its place in the model, not from its
// place in a bucket, so that a bucket laid out anew changes no bit.
struct Run {
  int64_t place;       // the parameter's index in the model
  int64_t first;       // the first coordinate, counted within the parameter; a multiple of 64
  int64_t numel;       // how many coordinates
  int64_t coordinate;  // where the first one lies in the bucket, and in the bucket's momentum
  int64_t word;        // where its word lies in the message
};

struct Runs {
  const Run* data;
  size_t size;

  const Run* begin() const { return data; }
  const Run* end() const { return data + size; }
};

inline uint64_t coins_of(const Run& run, uint64_t seed) {
  return mix(mix(seed + static_cast<uint64_t>(run.place))) + static_cast<uint64_t>(run.first) / 64;
}

inline PackCounts pack_runs(const Kernels& kernels, DType dtype, const char* bucket, size_t itemsize, const Runs& runs,
                            Undecided zeros, uint64_t seed, uint32_t* words) {
  PackCounts sum{0, 0};
  for (const Run& run : runs) {
    const PackCounts counts = kernels.pack_signs[dtype](bucket + run.coordinate * itemsize, run.numel, zeros,
                                                        coins_of(run, seed), words + run.word);
    sum.zeros += counts.zeros;
    sum.nonfinite += counts.nonfinite;
  }
  return sum;
}

inline PackCounts pack_runs_momentum(const Kernels& kernels, DType dtype, const char* bucket, size_t itemsize,
                                     char* momentum, size_t momentum_itemsize, const MomentumCoefficients& coefficients,
                                     const Runs& runs, Undecided zeros, uint64_t seed, uint32_t* words) {
  PackCounts sum{0, 0};
  for (const Run& run : runs) {
    const PackCounts counts =
        kernels.pack_momentum[dtype](bucket + run.coordinate * itemsize, momentum + run.coordinate * momentum_itemsize,
                                     run.numel, coefficients, zeros, coins_of(run, seed), words + run.word);
    sum.zeros += counts.zeros;
    sum.nonfinite += counts.nonfinite;
  }
  return sum;
}

inline uint64_t vote_runs(const Kernels& kernels, const std::vector<const uint32_t*>& rows, const Runs& runs,
                          Undecided ties, uint64_t seed, uint32_t* out) {
  std::vector<const uint32_t*> shifted(rows.size());
  uint64_t tied = 0;
  for (const Run& run : runs) {
    for (size_t row = 0; row < rows.size(); ++row) shifted[row] = rows[row] + run.word;
    tied += kernels.majority_vote(shifted.data(), shifted.size(), run.numel, ties, coins_of(run, seed), out + run.word);
  }
  return tied;
}

inline void unpack_runs(const Kernels& kernels, DType dtype, const uint32_t* words, const Runs& runs, uint64_t positive,
                        char* bucket, size_t itemsize) {
  for (const Run& run : runs) {
    kernels.unpack_signs[dtype](words + run.word, run.numel, positive, bucket + run.coordinate * itemsize);
  }
}

}  // namespace signvote

#endif
