// What the kernels have in common. A tile is 1024 coordinates, or fewer at the end of a run: each lane of a warp holds
// 32 of them, and makes, or takes, one of the tile's 32 words.
//
// In memory a tile is 32 / kField vectors for each lane: vector v of lane l are the kField coordinates from
// (32 * v + l) * kField on. A lane keeps them in this order, element i being coordinate i % kField of vector
// i / kField, and what it finds out about them as bits of a number, bit i for element i. transpose() makes words of
// such numbers, and numbers of words. Where a tile is whole and its memory aligned, kField is the number of coordinates
// that lie in the 16 bytes of an access; otherwise it is 1, and every access of a lane stands alone.
#ifndef SIGNVOTE_CUDA_TILE_H
#define SIGNVOTE_CUDA_TILE_H

#include "kernels.h"

namespace signvote {
namespace cuda {
namespace {

constexpr int kWarpSize = 32, kWarps = 8;
constexpr unsigned kAllLanes = 0xFFFFFFFF;

// Beyond so many blocks each of them takes more than one piece for a warp.
#ifndef SIGNVOTE_CUDA_MAX_BLOCKS
#define SIGNVOTE_CUDA_MAX_BLOCKS 16384
#endif

template <size_t kPieceSize>
__host__ __device__ size_t num_pieces(const Work& work) {
  return work.pieces != nullptr ? work.size : work.size / kPieceSize + (work.size % kPieceSize != 0);
}

// kernel(work, args...), a warp for each piece.
template <size_t kPieceSize, class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Work, Parameters...), cudaStream_t stream, const Work& work, Arguments... arguments) {
  const size_t blocks = (num_pieces<kPieceSize>(work) + kWarps - 1) / kWarps;
  if (blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks < SIGNVOTE_CUDA_MAX_BLOCKS ? blocks : SIGNVOTE_CUDA_MAX_BLOCKS));
  const auto start = [&](Work of, Parameters... parameters) {
    void* pointers[] = {&of, &parameters...};
    return cudaLaunchKernel(kernel, grid, dim3(kWarpSize * kWarps), pointers, 0, stream);
  };
  return start(work, static_cast<Parameters>(arguments)...);
}

template <class Counts>
cudaError_t clear(Counts* counts, cudaStream_t stream) {
  return counts != nullptr ? cudaMemsetAsync(counts, 0, sizeof *counts, stream) : cudaSuccess;
}

__device__ inline int lane() { return static_cast<int>(threadIdx.x) % kWarpSize; }

// do_piece(piece) for each piece of this warp.
template <size_t kPieceSize, class DoPiece>
__device__ void for_each_piece(const Work& work, const DoPiece& do_piece) {
  const size_t num = num_pieces<kPieceSize>(work), step = size_t{gridDim.x} * kWarps;
  for (size_t i = size_t{blockIdx.x} * kWarps + threadIdx.x / kWarpSize; i < num; i += step) {
    if (work.pieces != nullptr) {
      do_piece(work.pieces[i]);
    } else {
      const size_t first = i * kPieceSize, left = work.size - first;
      do_piece(piece_of(Run{0, 0, 0, 0, 0}, first, left < kPieceSize ? left : kPieceSize));
    }
  }
}

// The bits that undecided coordinates take in one word of a piece.
__device__ inline uint32_t undecided_word(Undecided rule, const Work& work, const Run& piece, int word) {
  if (rule != kCoin) return rule == kPositive ? ~uint32_t{0} : 0;
  const uint64_t coins =
      work.pieces != nullptr ? coins_by_place(piece, work.seed) : work.coins + static_cast<uint64_t>(piece.first) / 64;
  return static_cast<uint32_t>(mix(coins + static_cast<uint64_t>(word / 2)) >> (32 * (word % 2)));
}

// Adds what the threads of a block have counted to *sum. All of them call it. When they next do, nobody writes the
// shared memory before the first barrier, to which the thread that reads it comes after that.
__device__ inline void add_over_block(uint64_t count, uint64_t* sum) {
  if (__syncthreads_or(count != 0) == 0) return;
  __shared__ unsigned long long of_warp[kWarps];
  unsigned long long total = count;
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    total += __shfl_xor_sync(kAllLanes, total, distance);
  }
  if (lane() == 0) of_warp[threadIdx.x / kWarpSize] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) total += of_warp[warp];
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), total);
  }
}

// What each lane has counted.
struct LaneCounts {
  uint64_t zeros = 0, nonfinite = 0;

  __device__ void add_to(PackCounts* counts) const {
    if (counts == nullptr) return;
    add_over_block(zeros, &counts->zeros);
    add_over_block(nonfinite, &counts->nonfinite);
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Coordinates in registers

// Elements are unsigned integers: uint16_t, of which a register holds two, uint32_t or uint64_t.
template <class U>
struct Format {
  using Register = uint32_t;
  static constexpr int kBits = 8 * sizeof(U), kPerRegister = static_cast<int>(sizeof(Register) / sizeof(U));
};
template <>
struct Format<uint64_t> {
  using Register = uint64_t;
  static constexpr int kBits = 64, kPerRegister = 1;
};

template <class U>
using RegisterOf = typename Format<U>::Register;

// `value` in every element of a register.
template <class U>
__host__ __device__ constexpr RegisterOf<U> in_each(U value) {
  return Format<U>::kPerRegister == 2 ? static_cast<RegisterOf<U>>(value) * 0x10001u : value;
}

template <class U>
constexpr U kSignBit = static_cast<U>(U{1} << (8 * sizeof(U) - 1));
template <class U>
constexpr RegisterOf<U> kSigns = in_each<U>(kSignBit<U>);
template <class U>
constexpr RegisterOf<U> kMagnitudes = in_each<U>(static_cast<U>(~kSignBit<U>));

constexpr uint64_t kInfinity[kNumDTypes] = {0x7F800000, 0x7FF0000000000000, 0x7C00, 0x7F80};

// Some of a lane's elements, a batch: as many as the registers take without giving up too many warps.
template <class U, int kCount>
struct Elements {
  using Register = RegisterOf<U>;
  static constexpr int kPerRegister = Format<U>::kPerRegister, kBits = Format<U>::kBits;
  static constexpr int kRegisters = kCount / kPerRegister;
  Register registers[kRegisters];

  __device__ U operator[](int i) const {
    return static_cast<U>(registers[i / kPerRegister] >> (kBits * (i % kPerRegister)));
  }
};

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Vector {
  T parts[kCount];
};

template <class U, int kField>
__device__ bool is_aligned(const U* x) {
  return reinterpret_cast<uintptr_t>(x) % (kField * sizeof(U)) == 0;
}

// A batch of the lane's elements, from `first` on, of the `numel` coordinates at x; where there is none, 0.
template <class U, int kField, int kCount>
__device__ Elements<U, kCount> load_elements(const U* x, size_t numel, int first) {
  constexpr int kPer = Format<U>::kPerRegister;
  Elements<U, kCount> elements;
  if constexpr (kField > 1) {
    constexpr int kParts = kField / kPer;
    const auto* vectors = reinterpret_cast<const Vector<RegisterOf<U>, kParts>*>(x) + kWarpSize * first / kField;
#pragma unroll
    for (int v = 0; v < kCount / kField; ++v) {
      const auto vector = vectors[v * kWarpSize + lane()];
#pragma unroll
      for (int part = 0; part < kParts; ++part) elements.registers[v * kParts + part] = vector.parts[part];
    }
  } else {
#pragma unroll
    for (int k = 0; k < kCount / kPer; ++k) elements.registers[k] = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = (first + i) * kWarpSize + lane();
      if (at < static_cast<int>(numel)) {
        elements.registers[i / kPer] |= static_cast<RegisterOf<U>>(x[at]) << (Format<U>::kBits * (i % kPer));
      }
    }
  }
  return elements;
}

template <class U, int kField, int kCount>
__device__ void store_elements(const Elements<U, kCount>& elements, U* x, size_t numel, int first) {
  if constexpr (kField > 1) {
    constexpr int kParts = kField / Format<U>::kPerRegister;
    using V = Vector<RegisterOf<U>, kParts>;
    auto* vectors = reinterpret_cast<V*>(x) + kWarpSize * first / kField;
#pragma unroll
    for (int v = 0; v < kCount / kField; ++v) {
      V vector;
#pragma unroll
      for (int part = 0; part < kParts; ++part) vector.parts[part] = elements.registers[v * kParts + part];
      vectors[v * kWarpSize + lane()] = vector;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int at = (first + i) * kWarpSize + lane();
      if (at < static_cast<int>(numel)) x[at] = elements[i];
    }
  }
}

// Bit i is the sign bit of element i.
template <class U, int kCount>
__device__ uint32_t sign_bits(const Elements<U, kCount>& elements) {
  constexpr int kPer = Format<U>::kPerRegister, kTop = 8 * sizeof(RegisterOf<U>) - 1;
  uint32_t bits = 0;
#pragma unroll
  for (int i = kCount - 1; i >= 0; --i) {
    const RegisterOf<U> top = elements.registers[i / kPer] << (Format<U>::kBits * (kPer - 1 - i % kPer));
    bits = bits << 1 | static_cast<uint32_t>(top >> kTop);
  }
  return bits;
}

// ---------------------------------------------------------------------------------------------------------------------
// Words

// The number that a word becomes, or the word that the numbers of several lanes become; twice, it is the number again.
// In groups of as many lanes as a number has fields of kField bits, field i of lane j changes places with field j of
// lane i.
template <int kField>
__device__ uint32_t transpose(uint32_t bits) {
#pragma unroll
  for (int distance = kWarpSize / kField / 2; distance > 0; distance /= 2) {
    const int shift = distance * kField;
    const uint32_t low = 0xFFFFFFFF / ((uint32_t{1} << shift) + 1);  // `shift` ones, `shift` zeros, and so on
    const uint32_t other = __shfl_xor_sync(kAllLanes, bits, distance);
    bits = (lane() & distance) == 0 ? (bits & low) | (other & low) << shift : (bits & ~low) | (other >> shift & low);
  }
  return bits;
}

// Which word of the tile is the lane's.
template <int kField>
__device__ int word_of_lane() {
  constexpr int kFields = kWarpSize / kField;
  return lane() % kFields * kField + lane() / kFields;
}

// Bits for those of the lane's coordinates that are among the first `numel` of the tile.
template <int kField>
__device__ uint32_t present(size_t numel) {
  if constexpr (kField > 1) return ~uint32_t{0};
  const int count = (static_cast<int>(numel) + kWarpSize - 1 - lane()) / kWarpSize;
  return count == kWarpSize ? ~uint32_t{0} : (uint32_t{1} << count) - 1;
}

// A bit for each of a lane's coordinates.
struct Signs {
  uint32_t not_positive = 0, zero = 0, nonfinite = 0;
};

// Whether there is a number among them that is zero or not finite.
template <class U, int kCount>
__device__ bool any_special(const Elements<U, kCount>& elements, U infinity) {
  using Register = RegisterOf<U>;
  if constexpr (Format<U>::kPerRegister == 2) {
    Register special = 0;
#pragma unroll
    for (int k = 0; k < elements.kRegisters; ++k) {
      // Added to a magnitude these set the sign bit of what is at least infinity, and of what is more than 0.
      const Register magnitudes = elements.registers[k] & kMagnitudes<U>;
      special |= (magnitudes + (kSigns<U> - in_each<U>(infinity))) | ~(magnitudes + kMagnitudes<U>);
    }
    return (special & kSigns<U>) != 0;
  } else {
    // Twice a number drops its sign. (Its magnitude would be kept in a register of its own for find_signs.)
    Register least = ~Register{0}, greatest = 0;
#pragma unroll
    for (int k = 0; k < elements.kRegisters; ++k) {
      const Register twice = elements.registers[k] + elements.registers[k];
      least = twice < least ? twice : least;
      greatest = twice > greatest ? twice : greatest;
    }
    return least == 0 || greatest >= infinity + infinity;
  }
}

// Adds those of a batch of numbers of a format with this infinity.
template <class U, int kCount>
__device__ void find_signs(const Elements<U, kCount>& elements, int first, U infinity, Signs& signs) {
  uint32_t not_positive = sign_bits(elements);
  if (any_special(elements, infinity)) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const U magnitude = static_cast<U>(elements[i] & static_cast<U>(~kSignBit<U>));
      const uint32_t bit = uint32_t{1} << i;
      if (magnitude == 0 || magnitude > infinity) not_positive |= bit;
      if (magnitude == 0) signs.zero |= bit << first;
      if (magnitude >= infinity) signs.nonfinite |= bit << first;
    }
  }
  signs.not_positive |= not_positive << first;
}

// Makes the lane's word of what all lanes found in a tile, and writes it if `words` is not null.
template <int kField>
__device__ void write_word(const Signs& signs, const Work& work, const Run& piece, Undecided zeros, uint32_t* words,
                           LaneCounts& counts) {
  const uint32_t mask = present<kField>(static_cast<size_t>(piece.numel));
  const int word = word_of_lane<kField>();
  uint32_t bits = transpose<kField>(~signs.not_positive & mask);
  if (__any_sync(kAllLanes, (signs.zero | signs.nonfinite) != 0)) {
    counts.zeros += __popc(signs.zero & mask);
    counts.nonfinite += __popc(signs.nonfinite & mask);
    bits |= transpose<kField>(signs.zero & mask) & undecided_word(zeros, work, piece, word);
  }
  if (words != nullptr && 32 * word < piece.numel) words[piece.word + word] = bits;
}

}  // namespace
}  // namespace cuda
}  // namespace signvote

#endif
