// A run: what ops over buckets are made of, on the CPU and in CUDA kernels. C headers only.
#ifndef SIGNVOTE_RUN_H
#define SIGNVOTE_RUN_H

#include <stddef.h>
#include <stdint.h>

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

// The coins of a run, as a kernel is handed them.
using CoinsOf = uint64_t (*)(const Run& run, uint64_t seed);

// Of a parameter's place in the model.
SIGNVOTE_HOST_DEVICE inline uint64_t coins_by_place(const Run& run, uint64_t seed) {
  return mix(mix(seed + static_cast<uint64_t>(run.place))) + static_cast<uint64_t>(run.first) / 64;
}

// Of an array that has no place in a model.
inline uint64_t coins_of_array(const Run& run, uint64_t seed) {
  return mix(seed) + static_cast<uint64_t>(run.first) / 64;
}

// Where ternary words are: those of a run begin at its word in both planes.
template <class Word>
struct Planes {
  Word *sign, *active;
};

// All of an array.
inline Run whole_run(size_t numel) { return {0, 0, static_cast<int64_t>(numel), 0, 0}; }

// The piece of `numel` coordinates after `skipped`, which is a multiple of 64.
SIGNVOTE_HOST_DEVICE inline Run piece_of(const Run& run, size_t skipped, size_t numel) {
  const auto moved = [](int64_t begin, size_t by) { return static_cast<int64_t>(static_cast<uint64_t>(begin) + by); };
  return {run.place, moved(run.first, skipped), static_cast<int64_t>(numel), moved(run.coordinate, skipped),
          moved(run.word, skipped / 32)};
}

}  // namespace signvote

#endif
