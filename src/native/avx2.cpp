// x86 with AVX2: 32 elements at a time.
#include "codec.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

HERMES_TARGET_BEGIN("avx2,bmi,bmi2,popcnt")

namespace hermes {
namespace {

// Bit i of `mask` as byte i, all ones or zero.
inline __m256i bytes_of(u32 mask) {
  const __m256i which = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x(0x8040201008040201);
  const __m256i bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(int(mask)), which);
  return _mm256_cmpeq_epi8(_mm256_and_si256(bytes, bit), bit);
}

inline __m256i weighted(u32 mask, int weight) { return _mm256_and_si256(bytes_of(mask), _mm256_set1_epi8(char(weight))); }

inline __m256i load32(const u8* at) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline void store32(u8* at, __m256i value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), value); }

// 32 elements of 16 bits, in order, from their lower and upper bytes.
struct Pair {
  __m256i first, second;
};
inline Pair zip8(__m256i low, __m256i high) {
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}
inline Pair zip16(__m256i low, __m256i high) {
  const __m256i a = _mm256_unpacklo_epi16(low, high), b = _mm256_unpackhi_epi16(low, high);
  return {_mm256_permute2x128_si256(a, b, 0x20), _mm256_permute2x128_si256(a, b, 0x31)};
}

template <Encoding E>
bool kernel(Planes& p, size_t first, size_t count, u8* out) {
  const __m256i base = _mm256_set1_epi8(char(p.base)), sign = _mm256_set1_epi8(char(0x80));
  for (size_t block = first; block < first + count; ++block) {
    for (size_t half = 0; half < 2; ++half) {
      const u8* codes = p.codes + CODE_BYTES * block + 4 * half;
      const u8* bits = p.bits + 24 * block + 4 * half;
      const __m256i code = _mm256_or_si256(
          _mm256_or_si256(weighted(load<u32>(codes), 1), weighted(load<u32>(codes + 8), 2)),
          weighted(load<u32>(codes + 16), 4));
      const __m256i exponent = _mm256_add_epi8(base, code);
      const __m256i rest = load32(p.rest + BLOCK * block + 32 * half);
      u8* to = out + 32 * half * item_bytes(E);
      if constexpr (E == F16) {
        const __m256i shifted = _mm256_and_si256(_mm256_slli_epi16(exponent, 2), _mm256_set1_epi8(0x7C));
        const __m256i high = _mm256_or_si256(
            _mm256_or_si256(shifted, weighted(load<u32>(bits), 1)),
            _mm256_or_si256(weighted(load<u32>(bits + 8), 2), weighted(load<u32>(bits + 16), 0x80)));
        const Pair words = zip8(rest, high);
        store32(to, words.first), store32(to + 32, words.second);
        continue;
      }
      const __m256i high = _mm256_or_si256(_mm256_and_si256(sign, rest),
                                           _mm256_andnot_si256(sign, _mm256_srli_epi16(exponent, 1)));
      const __m256i low = _mm256_or_si256(_mm256_andnot_si256(sign, rest),
                                          _mm256_and_si256(_mm256_slli_epi16(exponent, 7), sign));
      const Pair top = zip8(low, high);
      if constexpr (E == BF16) {
        store32(to, top.first), store32(to + 32, top.second);
        continue;
      }
      Pair below = {_mm256_setzero_si256(), _mm256_setzero_si256()};
      if constexpr (E == F32) {
        const u8* from = p.low + 2 * (BLOCK * block + 32 * half);
        below = {load32(from), load32(from + 32)};
      } else if constexpr (E == F32_AS_F16) {
        const __m256i byte = _mm256_or_si256(
            _mm256_or_si256(weighted(load<u32>(bits), 0x20), weighted(load<u32>(bits + 8), 0x40)),
            weighted(load<u32>(bits + 16), 0x80));
        below = zip8(_mm256_setzero_si256(), byte);
      }
      const Pair a = zip16(below.first, top.first), b = zip16(below.second, top.second);
      store32(to, a.first), store32(to + 32, a.second), store32(to + 64, b.first), store32(to + 96, b.second);
    }
    if (!patch<E>(p, block, out)) return false;
    out += BLOCK * item_bytes(E);
  }
  return true;
}

u64 sum(const u8* data, size_t nbytes) {
  __m256i total = _mm256_setzero_si256(), key = _mm256_setr_epi64x(GOLDEN, 2 * GOLDEN, 3 * GOLDEN, 4 * GOLDEN);
  const __m256i step = _mm256_set1_epi64x(4 * GOLDEN);
  size_t at = 0;
  for (; at + 32 <= nbytes; at += 32, key = _mm256_add_epi64(key, step)) {
    const __m256i halves = _mm256_add_epi32(load32(data + at), key);
    total = _mm256_add_epi64(total, _mm256_mul_epu32(halves, _mm256_srli_epi64(halves, 32)));
  }
  u64 lanes[4];
  std::memcpy(lanes, &total, sizeof lanes);
  u64 result = lanes[0] + lanes[1] + lanes[2] + lanes[3];
  for (; at < nbytes; at += 8) result += term(load<u64>(data + at), (at / 8 + 1) * GOLDEN);
  return result;
}

bool is_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace

HERMES_PATH(avx2, is_supported);

}  // namespace hermes

HERMES_TARGET_END
#endif
