// Products of one token with a float32 matrix, which are bound by memory: rows by a dot product each, or columns, as of a
// matrix that lies turned, by adding row after row. In two orders each: MKL's without vectors of 512 bits, where products are rounded before they
// are added, and with them, where both are rounded once.
#include <string_view>

#include "tiles.hpp"

namespace hermes {

#if defined(__x86_64__)
HERMES_TARGET_BEGIN(HERMES_AVX512)

namespace {

constexpr size_t QUADS = 2;            // of rows at a time, so that a core need not wait for its sums
constexpr size_t MOST_COLUMNS = 4096;  // of a turned matrix at a time, their sums in the first-level cache
constexpr int ROWS = 16;                  // of such a matrix at a time
constexpr __mmask16 EACH_FIRST = 0x1111;  // lane of each four

// Rounded by itself: a multiplication and an addition behind it the compiler may make one. What is added changes nothing,
// zeros of either sign included.
inline __m512 times(__m512 a, __m512 b) { return _mm512_fmadd_ps(a, b, _mm512_set1_ps(-0.0f)); }

// Four rows, of each four columns.
inline __m512 load_quad(const float* const* rows, size_t column) {
  const auto load = [&](int r) { return _mm_loadu_ps(rows[r] + column); };
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(load(0)), load(1), 1);
  const __m256 high = _mm256_insertf128_ps(_mm256_castps128_ps256(load(2)), load(3), 1);
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1);
}

// The first lanes of each four, plus of four products the ones from `begin` to `end`, one after the other.
inline __m512 add_singly(__m512 to, __m512 products, size_t begin, size_t end) {
  for (size_t i = begin; i < end; ++i) {
    const __m512i lane = _mm512_set1_epi32(int(i));
    to = _mm512_mask_add_ps(to, EACH_FIRST, to, _mm512_permutevar_ps(products, lane));
  }
  return to;
}

// Of each four rows the sums over `columns`, a multiple of four, in the first lanes of fours: `head` columns one after the
// other, then four at a time in four lanes, the first of which goes on from there; these as (0 + 2) + (1 + 3); the rest.
inline void dot(const float* x, const float* const (&rows)[QUADS * 4], size_t columns, size_t head, Ahead& ahead,
                __m512 (&sums)[QUADS]) {
  const __m512 first = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
  for (size_t q = 0; q < QUADS; ++q)
    sums[q] = add_singly(_mm512_setzero_ps(), times(first, load_quad(rows + 4 * q, 0)), 0, head);
  const size_t end = head + (columns - head) / 4 * 4;
  size_t column = head;
  for (; column + 16 <= end; column += 16) {
    ahead.fetch<QUADS * 4>();
    const __m512 tokens = _mm512_loadu_ps(x + column);
    for (size_t q = 0; q < QUADS; ++q) {
      __m512 p[4];
      for (int r = 0; r < 4; ++r) p[r] = times(tokens, _mm512_loadu_ps(rows[4 * q + r] + column));
      const __m512 a = _mm512_shuffle_f32x4(p[0], p[1], 0x44), b = _mm512_shuffle_f32x4(p[0], p[1], 0xEE);
      const __m512 c = _mm512_shuffle_f32x4(p[2], p[3], 0x44), d = _mm512_shuffle_f32x4(p[2], p[3], 0xEE);
      sums[q] = _mm512_add_ps(sums[q], _mm512_shuffle_f32x4(a, c, 0x88));
      sums[q] = _mm512_add_ps(sums[q], _mm512_shuffle_f32x4(a, c, 0xDD));
      sums[q] = _mm512_add_ps(sums[q], _mm512_shuffle_f32x4(b, d, 0x88));
      sums[q] = _mm512_add_ps(sums[q], _mm512_shuffle_f32x4(b, d, 0xDD));
    }
  }
  for (size_t q = 0; q < QUADS; ++q) {
    for (size_t c = column; c < end; c += 4)
      sums[q] = _mm512_add_ps(sums[q], times(_mm512_broadcast_f32x4(_mm_loadu_ps(x + c)), load_quad(rows + 4 * q, c)));
    sums[q] = _mm512_add_ps(sums[q], _mm512_permute_ps(sums[q], 0x4E));
    sums[q] = _mm512_add_ps(sums[q], _mm512_permute_ps(sums[q], 0xB1));
    const __m512 last = _mm512_broadcast_f32x4(_mm_loadu_ps(x + columns - 4));
    if (end < columns)
      sums[q] = add_singly(sums[q], times(last, load_quad(rows + 4 * q, columns - 4)), end + 4 - columns, 4);
  }
}

// Lanes as (0..7) + (8..15), and so on, until one is left.
inline float add_halves(__m512 v) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  __m128 few = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  few = _mm_add_ps(few, _mm_movehl_ps(few, few));
  return _mm_cvtss_f32(_mm_add_ss(few, _mm_movehdup_ps(few)));
}

// Sums of rows as `multiply_float_lanes` has them.
inline void dot_lanes(const float* x, const float* const (&rows)[QUADS * 4], size_t columns, Ahead& ahead,
                      float (&results)[QUADS * 4]) {
  constexpr size_t R = QUADS * 4;
  __m512 sums[R];
  for (size_t r = 0; r < R; ++r) sums[r] = _mm512_maskz_mul_ps(1, _mm512_set1_ps(x[0]), _mm512_set1_ps(rows[r][0]));
  size_t column = 1;
  for (; column + 16 <= columns; column += 16) {
    ahead.fetch<R>();
    const __m512 tokens = _mm512_loadu_ps(x + column);
#pragma GCC unroll 8
    for (size_t r = 0; r < R; ++r) sums[r] = _mm512_fmadd_ps(tokens, _mm512_loadu_ps(rows[r] + column), sums[r]);
  }
  const auto rest = __mmask16((1u << (columns - column)) - 1);
  for (size_t r = 0; r < R; ++r) {
    results[r] = add_halves(sums[r]);
    if (!rest) continue;
    const __m512 tokens = _mm512_maskz_loadu_ps(rest, x + column), row = _mm512_maskz_loadu_ps(rest, rows[r] + column);
    results[r] = add_halves(_mm512_mask_fmadd_ps(tokens, rest, row, _mm512_zextps128_ps512(_mm_set_ss(results[r]))));
  }
}

// Columns [begin, end), counted from the cache line on that a row begins in, so that a vector is a line: as many as are to
// `skip` come before the first.
struct Span {
  size_t begin, end, skip;

  // Of the 16 columns from `column` on those that are there.
  __mmask16 mask(size_t column) const {
    const auto low = __mmask16(column < skip ? ~0u << (skip - column) : ~0u);
    return low & __mmask16(end - column < 16 ? (1u << (end - column)) - 1 : ~0u);
  }
};

// The total plus R rows' products, in one of the orders of `multiply_float_columns`.
template <int R, bool BY_EIGHT>
inline __m512 plus_rows(__m512 total, const __m512 (&x)[R], const __m512 (&rows)[R]) {
  if constexpr (BY_EIGHT) {
#pragma GCC unroll 2
    for (int r = 0; r < R; r += 8) {
      const auto two = [&](int a, int b) { return _mm512_fmadd_ps(x[b], rows[b], _mm512_mul_ps(x[a], rows[a])); };
      total = _mm512_fmadd_ps(x[r + 4], rows[r + 4], _mm512_fmadd_ps(x[r + 6], rows[r + 6], total));
      total = _mm512_add_ps(_mm512_add_ps(total, two(r + 7, r + 5)),
                            _mm512_add_ps(two(r + 2, r), two(r + 3, r + 1)));
    }
  } else {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) total = _mm512_add_ps(total, times(x[r], rows[r]));
  }
  return total;
}

// Adds R rows from `row` on to the totals of a span. One row after the other it fetches as many behind them; processors
// whose MKL takes eight at a time are up to a fifth faster if that is left to them.
template <int R, bool BY_EIGHT>
inline void add_rows(const float* x, const float* row, size_t columns, const Span& span, float* totals) {
  __m512 tokens[R];
  for (int r = 0; r < R; ++r) tokens[r] = _mm512_set1_ps(x[r]);
  [[maybe_unused]] size_t ahead = span.begin, rows_ahead = R;  // line after line, as memory likes it
  for (size_t column = span.begin; column < span.end; column += 16) {
    if constexpr (!BY_EIGHT) {
#pragma GCC unroll 16
      for (int line = 0; line < R; ++line)
        _mm_prefetch(reinterpret_cast<const char*>(row + rows_ahead * columns + ahead + 16 * line), _MM_HINT_T1);
      if ((ahead += 16 * R) >= span.end) ahead = span.begin, ++rows_ahead;
    }
    const __mmask16 mask = span.mask(column);
    __m512 rows[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) rows[r] = _mm512_maskz_loadu_ps(mask, row + r * columns + column);
    float* const to = totals + column - span.begin;
    _mm512_store_ps(to, plus_rows<R, BY_EIGHT>(_mm512_load_ps(to), tokens, rows));
  }
}

template <bool BY_EIGHT>
inline void add_all_rows(const float* x, size_t count, const float* row, size_t columns, const Span& span,
                         float* totals) {
  constexpr int REST = BY_EIGHT ? 8 : 1;
  size_t r = 0;
  for (; r + ROWS <= count; r += ROWS) add_rows<ROWS, BY_EIGHT>(x + r, row + r * columns, columns, span, totals);
  for (; r < count; r += REST) add_rows<REST, BY_EIGHT>(x + r, row + r * columns, columns, span, totals);
}

}  // namespace

void multiply_float_token(const Product& p, const u8* weights, size_t rows, size_t head, unsigned threads) {
  over_tiles(0, rows, QUADS * 4, threads, [&](size_t row, size_t to, size_t next) -> Result {
    Ahead ahead{weights + std::min(next, rows - 1) * p.columns * 4};
    const float* at[QUADS * 4];
    for (size_t r = 0; r < QUADS * 4; ++r) at[r] = floats(weights) + std::min(row + r, rows - 1) * p.columns;
    __m512 sums[QUADS];
    dot(floats(p.x), at, p.columns, head, ahead, sums);
    for (size_t q = 0; q < QUADS && row + 4 * q < to; ++q) {
      const auto mask = __mmask8((1u << std::min<size_t>(to - row - 4 * q, 4)) - 1);
      __m128 result = _mm512_castps512_ps128(_mm512_maskz_compress_ps(EACH_FIRST, sums[q]));
      const size_t offset = (row + 4 * q) * 4;
      if (p.bias) result = _mm_add_ps(_mm_maskz_loadu_ps(mask, p.bias + offset), result);
      _mm_mask_storeu_ps(p.y + offset, mask, result);
    }
    return {Fault::NONE, 0};
  });
}

void multiply_float_lanes(const Product& p, const u8* weights, size_t rows, unsigned threads) {
  over_tiles(0, rows, QUADS * 4, threads, [&](size_t row, size_t to, size_t next) -> Result {
    Ahead ahead{weights + std::min(next, rows - 1) * p.columns * 4};
    const float* at[QUADS * 4];
    for (size_t r = 0; r < QUADS * 4; ++r) at[r] = floats(weights) + std::min(row + r, rows - 1) * p.columns;
    float sums[QUADS * 4];
    dot_lanes(floats(p.x), at, p.columns, ahead, sums);
    for (size_t r = row; r < to; ++r)
      reinterpret_cast<float*>(p.y)[r] = p.bias ? floats(p.bias)[r] + sums[r - row] : sums[r - row];
    return {Fault::NONE, 0};
  });
}

void multiply_float_columns(const Product& p, const u8* weights, size_t columns, bool by_eight, unsigned threads) {
  const size_t skip = columns % 16 ? 0 : reinterpret_cast<std::uintptr_t>(weights) / 4 % 16;
  const size_t share = (skip + columns + threads - 1) / threads;
  over_tiles(0, skip + columns, std::min(MOST_COLUMNS, (share + 15) / 16 * 16), threads,
             [&](size_t begin, size_t end, size_t) -> Result {
    const Span span{begin, end, skip};
    alignas(64) float totals[MOST_COLUMNS];
    for (size_t c = begin; c < end; c += 16)
      _mm512_store_ps(totals + c - begin, _mm512_maskz_loadu_ps(span.mask(c), floats(p.bias) + c - skip));
    const float *x = floats(p.x), *row = floats(weights) - skip;
    (by_eight ? add_all_rows<true> : add_all_rows<false>)(x, p.columns, row, columns, span, totals);
    for (size_t c = begin; c < end; c += 16)
      _mm512_mask_storeu_ps(reinterpret_cast<float*>(p.y) + c - skip, span.mask(c),
                            _mm512_load_ps(totals + c - begin));
    return {Fault::NONE, 0};
  });
}

HERMES_TARGET_END
#else

void multiply_float_token(const Product&, const u8*, size_t, size_t, unsigned) {}
void multiply_float_lanes(const Product&, const u8*, size_t, unsigned) {}
void multiply_float_columns(const Product&, const u8*, size_t, bool, unsigned) {}

#endif
}  // namespace hermes
