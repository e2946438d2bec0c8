// x86 with AVX-512 as in Ice Lake and Zen 4: a block at a time, its codes loaded as masks.
#include "avx512.hpp"

#if defined(__x86_64__)
HERMES_TARGET_BEGIN(HERMES_AVX512)

namespace hermes {
namespace {

inline void store64(u8* at, __m512i value) { _mm512_storeu_si512(at, value); }

// 64 words as they follow each other.
inline Halves in_order(Halves v) {
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  return {_mm512_permutex2var_epi64(v.first, front, v.second), _mm512_permutex2var_epi64(v.first, back, v.second)};
}
inline Halves zip8(__m512i low, __m512i high) { return in_order(join_bytes(low, high)); }
inline Halves zip16(__m512i low, __m512i high) {
  return in_order({_mm512_unpacklo_epi16(low, high), _mm512_unpackhi_epi16(low, high)});
}

// The same to whole lines of memory that no cache holds nor shall: they are not read before they are written.
template <bool STREAM>
inline void put64(u8* at, __m512i value) {
  if constexpr (STREAM)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(at), value);
  else
    store64(at, value);
}

template <Encoding E, bool STREAM>
bool blocks(Planes& p, size_t first, size_t count, u8* out) {
  const __m512i base = _mm512_set1_epi8(char(p.base));
  const u8* escapes = p.escapes;
  for (size_t block = first; block < first + count; ++block) {
    const u8* codes = p.codes + CODE_BYTES * block;
    const u8* bits = p.bits + 24 * block;
    // One core alone does not keep enough reads of memory under way; this chunk was fetched with the one before it.
    _mm_prefetch(reinterpret_cast<const char*>(codes + p.ahead), _MM_HINT_T1);
    _mm_prefetch(reinterpret_cast<const char*>(p.rest + BLOCK * block + p.ahead), _MM_HINT_T1);
    if (size_t(p.end - escapes) < size_t(_mm_popcnt_u64(p.escaped(block)))) return false;
    const __m512i exponent = exponents(base, codes, escapes, size_t(p.readable - escapes) >= 64);
    const __m512i rest = load64(p.rest + BLOCK * block);
    if constexpr (E == F16) {
      const __m512i shifted = _mm512_and_si512(_mm512_slli_epi16(exponent, 2), _mm512_set1_epi8(0x7C));
      const __m512i high = plus(plus(plus(shifted, bits, 1), bits + 8, 2), bits + 16, 0x80);
      const Halves words = zip8(rest, high);
      put64<STREAM>(out, words.first), put64<STREAM>(out + 64, words.second);
    } else {
      const Halves top = in_order(join(exponent, rest));
      if constexpr (E == BF16) {
        put64<STREAM>(out, top.first), put64<STREAM>(out + 64, top.second);
      } else {
        Halves below = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        if constexpr (E == F32) {
          const u8* from = p.low + 2 * BLOCK * block;
          below = {load64(from), load64(from + 64)};
        } else if constexpr (E == F32_AS_F16) {
          below = zip8(_mm512_setzero_si512(),
                       plus(plus(plus(_mm512_setzero_si512(), bits, 0x20), bits + 8, 0x40), bits + 16, 0x80));
        }
        const Halves a = zip16(below.first, top.first), b = zip16(below.second, top.second);
        put64<STREAM>(out, a.first), put64<STREAM>(out + 64, a.second), put64<STREAM>(out + 128, b.first), put64<STREAM>(out + 192, b.second);
      }
    }
    out += BLOCK * item_bytes(E);
  }
  p.escapes = escapes;
  if constexpr (STREAM) _mm_sfence();
  return true;
}

template <Encoding E>
bool kernel(Planes& p, size_t first, size_t count, u8* out) {
  const bool is_aligned = reinterpret_cast<std::uintptr_t>(out) % 64 == 0;
  return (p.streams && is_aligned ? blocks<E, true> : blocks<E, false>)(p, first, count, out);
}

u64 sum(const u8* data, size_t nbytes) {
  const __m512i count = _mm512_setr_epi64(1, 2, 3, 4, 5, 6, 7, 8);
  __m512i key = _mm512_mullo_epi64(count, _mm512_set1_epi64(GOLDEN)), total = _mm512_setzero_si512();
  const __m512i step = _mm512_set1_epi64(8 * GOLDEN);
  size_t at = 0;
  for (; at + 64 <= nbytes; at += 64, key = _mm512_add_epi64(key, step)) {
    const __m512i halves = _mm512_add_epi32(load64(data + at), key);
    total = _mm512_add_epi64(total, _mm512_mul_epu32(halves, _mm512_srli_epi64(halves, 32)));
  }
  u64 lanes[8], result = 0;
  store64(reinterpret_cast<u8*>(lanes), total);
  for (const u64 lane : lanes) result += lane;
  for (; at < nbytes; at += 8) result += term(load<u64>(data + at), (at / 8 + 1) * GOLDEN);
  return result;
}

bool is_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vbmi") &&
         __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

}  // namespace

HERMES_PATH(avx512, is_supported);

}  // namespace hermes

HERMES_TARGET_END
#endif
