// 64-bit ARM: 16 elements at a time.
#include "codec.hpp"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace hermes {
namespace {

// Bit i of 16 as byte i, `weight` or zero.
inline uint8x16_t weighted(const u8* mask, u8 weight) {
  const uint8x16_t bit = vreinterpretq_u8_u64(vdupq_n_u64(0x8040201008040201));
  const uint8x16_t bytes = vcombine_u8(vdup_n_u8(mask[0]), vdup_n_u8(mask[1]));
  return vandq_u8(vtstq_u8(bytes, bit), vdupq_n_u8(weight));
}

template <Encoding E>
bool kernel(Planes& p, size_t first, size_t count, u8* out) {
  const uint8x16_t base = vdupq_n_u8(p.base), sign = vdupq_n_u8(0x80), zero = vdupq_n_u8(0);
  for (size_t block = first; block < first + count; ++block) {
    for (size_t lane = 0; lane < BLOCK; lane += 16) {
      const u8* codes = p.codes + CODE_BYTES * block + lane / 8;
      const u8* bits = p.bits + 24 * block + lane / 8;
      const uint8x16_t code = vorrq_u8(vorrq_u8(weighted(codes, 1), weighted(codes + 8, 2)), weighted(codes + 16, 4));
      const uint8x16_t exponent = vaddq_u8(base, code), rest = vld1q_u8(p.rest + BLOCK * block + lane);
      u8* to = out + lane * item_bytes(E);
      if constexpr (E == F16) {
        const uint8x16_t shifted = vandq_u8(vshlq_n_u8(exponent, 2), vdupq_n_u8(0x7C));
        const uint8x16_t high = vorrq_u8(vorrq_u8(shifted, weighted(bits, 1)),
                                         vorrq_u8(weighted(bits + 8, 2), weighted(bits + 16, 0x80)));
        vst2q_u8(to, (uint8x16x2_t{rest, high}));
        continue;
      }
      const uint8x16_t high = vbslq_u8(sign, rest, vshrq_n_u8(exponent, 1));
      const uint8x16_t low = vbslq_u8(sign, vshlq_n_u8(exponent, 7), rest);
      if constexpr (E == BF16) vst2q_u8(to, (uint8x16x2_t{low, high}));
      if constexpr (E == F32) {
        const uint8x16x2_t below = vld2q_u8(p.low + 2 * (BLOCK * block + lane));
        vst4q_u8(to, (uint8x16x4_t{below.val[0], below.val[1], low, high}));
      }
      if constexpr (E == F32_AS_BF16) vst4q_u8(to, (uint8x16x4_t{zero, zero, low, high}));
      if constexpr (E == F32_AS_F16) {
        const uint8x16_t byte =
            vorrq_u8(vorrq_u8(weighted(bits, 0x20), weighted(bits + 8, 0x40)), weighted(bits + 16, 0x80));
        vst4q_u8(to, (uint8x16x4_t{zero, byte, low, high}));
      }
    }
    if (!patch<E>(p, block, out)) return false;
    out += BLOCK * item_bytes(E);
  }
  return true;
}

u64 sum(const u8* data, size_t nbytes) {
  uint64x2_t total = vdupq_n_u64(0), key = {GOLDEN, 2 * GOLDEN};
  const uint64x2_t step = vdupq_n_u64(2 * GOLDEN);
  size_t at = 0;
  for (; at + 16 <= nbytes; at += 16, key = vaddq_u64(key, step)) {
    const uint32x4_t halves = vaddq_u32(vreinterpretq_u32_u8(vld1q_u8(data + at)), vreinterpretq_u32_u64(key));
    const uint64x2_t words = vreinterpretq_u64_u32(halves);
    total = vmlal_u32(total, vmovn_u64(words), vshrn_n_u64(words, 32));
  }
  u64 result = vaddvq_u64(total);
  for (; at < nbytes; at += 8) result += term(load<u64>(data + at), (at / 8 + 1) * GOLDEN);
  return result;
}

}  // namespace

HERMES_PATH(neon, [] { return true; });

}  // namespace hermes
#endif
