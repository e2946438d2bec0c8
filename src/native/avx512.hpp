// What unpacking and the products share of AVX-512: 64 packed elements at a time, their codes loaded as masks; words
// turned.
#pragma once

#include "codec.hpp"

#if defined(__x86_64__)
#include <immintrin.h>

#define HERMES_AVX512 "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx2,bmi,bmi2,popcnt"

HERMES_TARGET_BEGIN(HERMES_AVX512)

namespace hermes {

inline __m512i load64(const u8* at) { return _mm512_loadu_si512(at); }

inline __m512i plus(__m512i to, const u8* mask, int weight) {
  return _mm512_mask_add_epi8(to, load<u64>(mask), to, _mm512_set1_epi8(char(weight)));
}

// Exponents of a block from its codes and its escapes, which move on. Those are read with what lies behind them where
// there `has_room` for 64 bytes, which is faster than a masked load, which does not touch what its mask leaves out.
inline __m512i exponents(__m512i base, const u8* codes, const u8*& escapes, bool has_room) {
  const u64 escaped = escaped_in(codes);
  const unsigned number = unsigned(_mm_popcnt_u64(escaped));
  const __m512i stored = has_room ? load64(escapes) : _mm512_maskz_loadu_epi8(_bzhi_u64(~u64{0}, number), escapes);
  escapes += number;
  return _mm512_mask_expand_epi8(plus(plus(plus(base, codes, 1), codes + 8, 2), codes + 16, 4), escaped, stored);
}

// Words: of each lane of 128 bits the first half, and the second.
struct Halves {
  __m512i first, second;
};

inline Halves join_bytes(__m512i low, __m512i high) {
  return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
}

// bf16 elements from their exponents, and signs with mantissas.
inline Halves join(__m512i exponent, __m512i rest) {
  const __m512i sign = _mm512_set1_epi8(char(0x80));
  // Where the first operand has a bit the second's, else the third's.
  const __m512i high = _mm512_ternarylogic_epi64(sign, rest, _mm512_srli_epi16(exponent, 1), 0xCA);
  const __m512i low = _mm512_ternarylogic_epi64(sign, _mm512_slli_epi16(exponent, 7), rest, 0xCA);
  return join_bytes(low, high);
}

// 16 rows of 16 words each turned: word r of v[c] becomes word c of v[r].
inline void turn(__m512i v[16]) {
  __m512i a[16];
  for (int r = 0; r < 16; r += 2) {
    a[r] = _mm512_unpacklo_epi32(v[r], v[r + 1]);
    a[r + 1] = _mm512_unpackhi_epi32(v[r], v[r + 1]);
  }
  for (int r = 0; r < 16; r += 4) {
    v[r] = _mm512_unpacklo_epi64(a[r], a[r + 2]);
    v[r + 1] = _mm512_unpackhi_epi64(a[r], a[r + 2]);
    v[r + 2] = _mm512_unpacklo_epi64(a[r + 1], a[r + 3]);
    v[r + 3] = _mm512_unpackhi_epi64(a[r + 1], a[r + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    a[c] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0x88);
    a[c + 4] = _mm512_shuffle_i32x4(v[c], v[c + 4], 0xDD);
    a[c + 8] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0x88);
    a[c + 12] = _mm512_shuffle_i32x4(v[c + 8], v[c + 12], 0xDD);
  }
  for (int c = 0; c < 4; ++c) {
    v[c] = _mm512_shuffle_i32x4(a[c], a[c + 8], 0x88);
    v[c + 4] = _mm512_shuffle_i32x4(a[c + 4], a[c + 12], 0x88);
    v[c + 8] = _mm512_shuffle_i32x4(a[c], a[c + 8], 0xDD);
    v[c + 12] = _mm512_shuffle_i32x4(a[c + 4], a[c + 12], 0xDD);
  }
}

}  // namespace hermes

HERMES_TARGET_END
#endif
