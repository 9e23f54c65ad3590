// unpack_signs: one of two values for each bit. unpack_ternary: one of them or 0.

namespace signvote {
namespace {

template <DType kDType>
SIGNVOTE_FLATTEN void unpack_signs(const uint32_t* words, size_t numel, uint64_t positive_bits, void* data) {
  using U = BitsOf<kDType>;
  const U positive = static_cast<U>(positive_bits), negative = static_cast<U>(positive ^ kSignBit<U>);
  U* out = static_cast<U*>(data);
  for (; numel >= kBlock; numel -= kBlock, words += 2, out += kBlock) {
    select_64(load_block(words, kBlock), positive, negative, out);
  }
  if (numel > 0) {
    U block[kBlock];
    select_64(load_block(words, numel), positive, negative, block);
    memcpy(out, block, numel * sizeof(U));
  }
}

template <DType kDType>
SIGNVOTE_FLATTEN void unpack_ternary(const uint32_t* sign, const uint32_t* active, size_t numel, uint64_t positive_bits,
                                     void* data) {
  using U = BitsOf<kDType>;
  const U positive = static_cast<U>(positive_bits), negative = static_cast<U>(positive ^ kSignBit<U>);
  U* out = static_cast<U*>(data);
  for (; numel >= kBlock; numel -= kBlock, sign += 2, active += 2, out += kBlock) {
    select_64(load_block(active, kBlock), load_block(sign, kBlock), positive, negative, out);
  }
  if (numel > 0) {
    U block[kBlock];
    select_64(load_block(active, numel), load_block(sign, numel), positive, negative, block);
    memcpy(out, block, numel * sizeof(U));
  }
}

}  // namespace
}  // namespace signvote
