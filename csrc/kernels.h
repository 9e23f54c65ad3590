// The contract between the kernels and everything above them: the word format, the meaning of each op, and the table
// through which an implementation is called. A kernel never throws, allocates or checks: the binding has checked.
//
// Word format. Coordinate i is bit i % 32 of word i / 32, least significant bit first; 1 is positive, 0 is negative;
// the unused bits of the last word are 0. Words need no alignment beyond that of uint32_t, coordinates none beyond
// that of their dtype.
//
// Ternary words, for votes with abstention, are two planes: `active` is 1 where a coordinate is not 0, and `sign` is
// its sign there. What a kernel writes has sign 0 where it is not active; what it reads need not, and sign means
// nothing there.
//
// Coins. A coordinate without a sign and a vote without a majority take a coin: coin(seed, i) is bit i % 64 of
// mix(mix(seed) + i / 64). A kernel is handed `coins`, which is mix(seed) plus the index of the first block of 64
// coordinates it works on, so that a range that starts at a multiple of 64 can be worked on alone.
#ifndef SIGNVOTE_KERNELS_H
#define SIGNVOTE_KERNELS_H

#include <stddef.h>
#include <stdint.h>

// Of a function that the CUDA kernels call as well.
#ifdef __CUDACC__
#define SIGNVOTE_HOST_DEVICE __host__ __device__
#else
#define SIGNVOTE_HOST_DEVICE
#endif

namespace signvote {

enum DType : int { kFloat32, kFloat64, kFloat16, kBFloat16, kNumDTypes };

// The bit of a coordinate that is exactly zero, or of a vote that is tied.
enum Undecided : int { kNegative, kPositive, kCoin };

struct PackCounts {
  uint64_t zeros;      // coordinates that were undecided: ±0; with abstention, those that the threshold makes 0
  uint64_t nonfinite;  // NaN or ±inf
};

// Two-coefficient momentum: send sign(send_momentum * m + send_gradient * g), then
// keep m = keep_momentum * m + keep_gradient * g.
struct MomentumCoefficients {
  double send_momentum, send_gradient, keep_momentum, keep_gradient;
};

struct Kernels {
  const char* name;

  // One bit per coordinate of x: 1 if x > 0, 0 if x < 0 or NaN, `zeros` if x is ±0. Subnormal numbers have a sign,
  // whatever the floating-point environment says. Writes ceil(numel / 32) words.
  PackCounts (*pack_signs[kNumDTypes])(const void* x, size_t numel, Undecided zeros, uint64_t coins, uint32_t* words);

  // The same of v = send_momentum * m + send_gradient * g, and m is replaced. Momentum, coefficients and arithmetic
  // are float32 (float64 for a float64 gradient): two rounded products and a rounded sum, never fused, to nearest,
  // whatever the floating-point environment says. A result smaller than the smallest normal number is +0, for v and
  // for m: otherwise the momentum of a coordinate that gets no gradient any more stops at the smallest subnormal, and
  // votes one way for ever. Where g is not finite m stays as it was, and the bit is that of send_momentum * m. Counted
  // as not finite is a coordinate where g or v is. Which NaN takes the place of a NaN in m is not specified.
  PackCounts (*pack_momentum[kNumDTypes])(const void* gradient, void* momentum, size_t numel,
                                          const MomentumCoefficients& coefficients, Undecided zeros, uint64_t coins,
                                          uint32_t* words);

  // True if any coordinate of x is NaN or ±inf.
  bool (*has_nonfinite[kNumDTypes])(const void* x, size_t numel);

  // Per coordinate, the bit that more of the num_rows rows of ceil(numel / 32) words hold, `ties` where as many hold 1
  // as 0. 1 <= num_rows <= 65535. Returns how many of the numel coordinates were tied. Takes up to 320 KB of the stack.
  uint64_t (*majority_vote)(const uint32_t* const* rows, size_t num_rows, size_t numel, Undecided ties, uint64_t coins,
                            uint32_t* out);

  // Counters: one count per coordinate, of which planes[j] holds bit j, as words. Adds, modulo 2^num_planes, the counts
  // whose bits are addends[0] to addends[num_planes - 1], where null stands for a plane of zeros. What the unused bits
  // of the last word count means nothing.
  void (*add_counts)(uint32_t* const* planes, size_t num_planes, const uint32_t* const* addends, size_t numel);

  // Adds, modulo 2^num_planes, `weight` where a coordinate is not active and 2 * weight where it is active and
  // positive: a sum of such votes, M with their weights, is M + n_plus - n_minus.
  void (*add_counts_ternary)(uint32_t* const* planes, size_t num_planes, const uint32_t* sign, const uint32_t* active,
                             uint64_t weight, size_t numel);

  // As majority_vote, of num_votes votes of which the count of a coordinate says how many were 1.
  // 1 <= num_votes < 2^num_planes.
  uint64_t (*decide_counts)(const uint32_t* const* planes, size_t num_planes, uint64_t num_votes, size_t numel,
                            Undecided ties, uint64_t coins, uint32_t* out);

  // Ternary: active is 1 where the count is positive_from or more, or less than negative_below, and sign is 1 in the
  // first case. Both limits are less than 2^num_planes. Returns how many of the numel coordinates are 0.
  uint64_t (*decide_counts_ternary)(const uint32_t* const* planes, size_t num_planes, uint64_t negative_below,
                                    uint64_t positive_from, size_t numel, uint32_t* sign, uint32_t* active);

  // out[i] = the value whose bits are `positive`, with its sign bit flipped where the bit of coordinate i is 0.
  void (*unpack_signs[kNumDTypes])(const uint32_t* words, size_t numel, uint64_t positive, void* out);

  // Ternary: active is 1 where the magnitude of x is above a threshold, and sign is 1 where x > 0 besides. NaN is never
  // active. `limit` are the bits of the threshold, a value of the dtype from 0 to +inf: the magnitude is above it where
  // its bits, as an integer, are. Counted as zeros are the coordinates that are neither active nor NaN. Writes
  // ceil(numel / 32) words to each plane.
  PackCounts (*pack_ternary[kNumDTypes])(const void* x, size_t numel, uint64_t limit, uint32_t* sign, uint32_t* active);

  // Per coordinate, with abstention: of the num_rows rows of planes, n_plus are active and positive and n_minus active
  // and negative. The result is their majority's sign where |n_plus - n_minus| >= quorum, otherwise 0, that is not
  // active. 1 <= num_rows <= 65535, 1 <= quorum, of any size. Returns how many of the numel coordinates are 0. Takes up
  // to 320 KB of the stack.
  uint64_t (*majority_vote_ternary)(const uint32_t* const* signs, const uint32_t* const* actives, size_t num_rows,
                                    size_t numel, uint64_t quorum, uint32_t* sign, uint32_t* active);

  // out[i] = +0 where coordinate i is not active, otherwise as unpack_signs.
  void (*unpack_ternary[kNumDTypes])(const uint32_t* sign, const uint32_t* active, size_t numel, uint64_t positive,
                                     void* out);
};

// One step of splitmix64.
SIGNVOTE_HOST_DEVICE static inline uint64_t mix(uint64_t x) {
  x += 0x9E3779B97F4A7C15u;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
  return x ^ (x >> 31);
}

}  // namespace signvote

#endif
