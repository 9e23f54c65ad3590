// pack_momentum: the signs of a new momentum, which replaces the old one.

namespace signvote {
namespace {

template <DType kDType>
inline auto load_reals(const BitsOf<kDType>* x) {
  if constexpr (kDType == kFloat16) {
    return load_float16(x);
  } else if constexpr (kDType == kBFloat16) {
    return load_bfloat16(x);
  } else {
    return as_reals(load(x));
  }
}

inline float as_coefficient(uint32_t, double value) { return static_cast<float>(value); }
inline double as_coefficient(uint64_t, double value) { return value; }

// The rule of momentum: V is the width of momentum's dtype. With one coefficient for both, as in Signum, what is sent
// is what is kept.
template <DType kDType, bool kSendsKept>
struct MomentumRule {
  static constexpr DType kMomentum = Format<kDType>::kMomentum;
  using U = BitsOf<kDType>;
  using V = BitsOf<kMomentum>;
  using Coefficient = decltype(broadcast_real(as_coefficient(V{}, 0.0)));

  Coefficient send_momentum, send_gradient, keep_momentum, keep_gradient;

  explicit MomentumRule(const MomentumCoefficients& c)
      : send_momentum(broadcast_real(as_coefficient(V{}, c.send_momentum))),
        send_gradient(broadcast_real(as_coefficient(V{}, c.send_gradient))),
        keep_momentum(broadcast_real(as_coefficient(V{}, c.keep_momentum))),
        keep_gradient(broadcast_real(as_coefficient(V{}, c.keep_gradient))) {}

  static Lanes<V> without_subnormals(Lanes<V> a) {
    const Lanes<V> magnitude = broadcast<V>(kMagnitude<V>);
    const Lanes<V> below = broadcast<V>(Format<kMomentum>::kSmallestNormal - 1);
    return where(greater(a & magnitude, below), a);
  }

  // As many coordinates as a register holds: m is replaced, and what to send goes to v as well. The gradient is finite.
  Lanes<V> update_lanes(const U* gradient, V* m, V* v) const {
    const auto g_i = load_reals<kDType>(gradient);
    const auto m_i = as_reals(load(m));
    const Lanes<V> kept = without_subnormals(as_bits(keep_momentum * m_i + keep_gradient * g_i));
    store(m, kept);
    if constexpr (kSendsKept) return kept;
    const Lanes<V> sent = without_subnormals(as_bits(send_momentum * m_i + send_gradient * g_i));
    store(v, sent);
    return sent;
  }

  // A group. The rare case of a gradient that is not finite is left to signs(), block by block.
  void pack_group(const U* gradient, V* m, Undecided rule, uint64_t coins, uint32_t* words, Zeros& zeros,
                  PackCounts& counts) const {
    if (is_finite(gradient)) {
      V sent[kSendsKept ? 1 : kGroup];
      V* const v = kSendsKept ? m : sent;
      Magnitudes<kMomentum> magnitudes;
      for (size_t block = 0; block < kGroupBlocks; ++block) {
        store_mask_of_64<V>(words + 2 * block, [&](size_t i) {
          const size_t at = block * kBlock + i;
          const Lanes<V> lanes = update_lanes(gradient + at, m + at, v + at);
          magnitudes.add(lanes);
          return greater(lanes, broadcast<V>(0));
        });
        if (zeros.are_expected) zeros.blocks[block] = find_zeros<kMomentum>(v + block * kBlock);
      }
      finish_group<kMomentum>(v, magnitudes, rule, coins, words, zeros, counts);
    } else {
      for (size_t block = 0; block < kGroupBlocks; ++block) {
        const Signs found = signs(gradient + block * kBlock, m + block * kBlock);
        store_block(words + 2 * block, decide_block(found, rule, coins + block, counts), kBlock);
      }
    }
  }

  static bool is_finite(const U* gradient) {
    Lanes<U> greatest = broadcast<U>(0);
    for (size_t i = 0; i < kGroup; i += Lanes<U>::kCount) {
      greatest = max(greatest, load(gradient + i) & broadcast<U>(kMagnitude<U>));
    }
    return !any(greater(greatest, broadcast<U>(Format<kDType>::kInfinity - 1)));
  }

  // A block: m is replaced, and what to send goes to v. The gradient is finite.
  void update(const U* gradient, V* m, V* v) const {
    for (size_t i = 0; i < kBlock; i += Lanes<V>::kCount) {
      const Lanes<V> sent = update_lanes(gradient + i, m + i, v + i);
      if constexpr (kSendsKept) store(v + i, sent);
    }
  }

  // For a non-finite coordinate the gradient counts as 0 in v, and m stays as it was.
  Signs signs(const U* gradient, V* m) const {
    V v[kBlock];
    const uint64_t nonfinite = find_nonfinite<kDType>(gradient);
    if (nonfinite == 0) {
      update(gradient, m, v);
    } else {
      U finite[kBlock];
      V kept[kBlock];
      memcpy(finite, gradient, sizeof finite);
      memcpy(kept, m, sizeof kept);
      for (size_t i = 0; i < kBlock; ++i) finite[i] = (nonfinite >> i & 1) != 0 ? U{0} : finite[i];
      update(finite, m, v);
      for (size_t i = 0; i < kBlock; ++i) m[i] = (nonfinite >> i & 1) != 0 ? kept[i] : m[i];
    }
    Signs signs = find_signs<kMomentum>(v);
    signs.nonfinite |= nonfinite;
    return signs;
  }
};

template <DType kDType, bool kSendsKept>
SIGNVOTE_FLATTEN PackCounts pack_with(const MomentumRule<kDType, kSendsKept>& rule, const BitsOf<kDType>* gradient,
                                      typename MomentumRule<kDType, kSendsKept>::V* m, size_t numel, Undecided zeros,
                                      uint64_t coins, uint32_t* words) {
  PackCounts counts{0, 0};
  Zeros found;
  for (; kHasGroups && numel >= kGroup;
       numel -= kGroup, gradient += kGroup, m += kGroup, words += kWords, coins += kGroupBlocks) {
    rule.pack_group(gradient, m, zeros, coins, words, found, counts);
  }
  for (; numel >= kBlock; numel -= kBlock, gradient += kBlock, m += kBlock, words += 2, ++coins) {
    store_block(words, decide_block(rule.signs(gradient, m), zeros, coins, counts), kBlock);
  }
  if (numel > 0) {
    const Tail gradient_tail(gradient, numel);
    Tail m_tail(m, numel);
    Signs signs = rule.signs(gradient_tail.block, m_tail.block);
    memcpy(m, m_tail.block, numel * sizeof *m);
    signs.positive &= low_bits(numel);
    signs.zero &= low_bits(numel);
    signs.nonfinite &= low_bits(numel);
    store_block(words, decide_block(signs, zeros, coins, counts), numel);
  }
  return counts;
}

template <DType kDType>
PackCounts pack_momentum(const void* gradient_data, void* momentum_data, size_t numel,
                         const MomentumCoefficients& coefficients, Undecided zeros, uint64_t coins, uint32_t* words) {
  // This is arithmetic, and the caller's thread may flush subnormal numbers or round otherwise.
  fenv_t environment;
  fegetenv(&environment);
  fesetenv(FE_DFL_ENV);
  const auto* gradient = static_cast<const BitsOf<kDType>*>(gradient_data);
  auto* m = static_cast<BitsOf<Format<kDType>::kMomentum>*>(momentum_data);
  const bool sends_kept = coefficients.send_momentum == coefficients.keep_momentum &&
                          coefficients.send_gradient == coefficients.keep_gradient;
  const PackCounts counts =
      sends_kept ? pack_with(MomentumRule<kDType, true>(coefficients), gradient, m, numel, zeros, coins, words)
                 : pack_with(MomentumRule<kDType, false>(coefficients), gradient, m, numel, zeros, coins, words);
  fesetenv(&environment);
  return counts;
}

}  // namespace
}  // namespace signvote
