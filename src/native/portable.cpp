// Any processor: eight elements at a time in a word of 64 bits.
#include <array>

#include "codec.hpp"

namespace hermes {
namespace {

constexpr auto SPREAD = [] {  // the bits of a byte, a byte each
  std::array<u64, 256> table{};
  for (u64 byte = 0; byte < 256; ++byte)
    for (int bit = 0; bit < 8; ++bit) table[byte] |= (byte >> bit & 1) << 8 * bit;
  return table;
}();

template <Encoding E>
bool kernel(Planes& p, size_t first, size_t count, u8* out) {
  for (size_t block = first; block < first + count; ++block) {
    const u8* codes = p.codes + CODE_BYTES * block;
    for (size_t lane = 0; lane < BLOCK; lane += 8) {
      u64 exponents = p.base * 0x0101010101010101u + SPREAD[codes[lane / 8]] + 2 * SPREAD[codes[8 + lane / 8]] +
                      4 * SPREAD[codes[16 + lane / 8]];  // no carries: base is at most `largest_base`
      for (size_t i = lane; i < lane + 8; ++i, exponents >>= 8) {
        const auto word = element<E>(p, block, i, u8(exponents));
        store(out + sizeof word * i, word);
      }
    }
    if (!patch<E>(p, block, out)) return false;
    out += BLOCK * item_bytes(E);
  }
  return true;
}

u64 sum(const u8* data, size_t nbytes) {
  u64 total = 0, key = GOLDEN;
  for (size_t at = 0; at < nbytes; at += 8, key += GOLDEN) total += term(load<u64>(data + at), key);
  return total;
}

}  // namespace

HERMES_PATH(portable, [] { return true; });

}  // namespace hermes
