// What products share: rows dealt out to threads; of bf16, products added, and sums that are rounded.
#pragma once

#include <algorithm>
#include <atomic>
#include <type_traits>

#include "avx512.hpp"
#include "product.hpp"

namespace hermes {

// Calls body(data) on so many threads at once and waits for all.
void on_threads(unsigned threads, void (*body)(void*), void* data);

// Rows [begin, end), so many at a time, to threads as they come: `work(from, to, next)`, `next` being the rows that the
// same thread does afterwards, or `end` where that is not known yet; until one fails.
template <class Work>
Result over_tiles(size_t begin, size_t end, size_t rows, unsigned threads, Work work) {
  struct Deal {
    Work* work;
    size_t end, rows, last;  // from there on nobody takes what he does not do at once: others would wait for him
    std::atomic<size_t> next;
    std::atomic<bool> failed{false};
    Result fault{Fault::NONE, 0};

    size_t deal() { return std::min(end, next.fetch_add(rows)); }
    void run() {
      for (size_t row = deal(); row < end && !failed;) {
        const bool is_last = next >= last;
        const size_t after = is_last ? end : deal();
        const Result result = (*work)(row, std::min(row + rows, end), after);
        if (result.fault != Fault::NONE && !failed.exchange(true)) fault = result;
        row = is_last ? deal() : after;
      }
    }
  } deal{&work, end, rows, end - std::min(end - begin, threads * rows), begin};
  const size_t tiles = (end - begin + rows - 1) / rows;
  on_threads(unsigned(std::min<size_t>(threads, tiles)), [](void* data) { static_cast<Deal*>(data)->run(); }, &deal);
  return deal.fault;
}

inline const float* floats(const u8* at) { return reinterpret_cast<const float*>(at); }

#if defined(__x86_64__)
#define HERMES_BF16_PRODUCTS HERMES_AVX512 ",avx512bf16"

HERMES_TARGET_BEGIN(HERMES_BF16_PRODUCTS)

inline size_t count_escapes(const u8* codes, size_t blocks) {
  size_t even = 0, odd = 0;
  const auto of = [](const u8* at) { return size_t(_mm_popcnt_u64(escaped_in(at))); };
  for (; blocks >= 2; blocks -= 2, codes += 2 * CODE_BYTES) even += of(codes), odd += of(codes + CODE_BYTES);
  return even + odd + (blocks ? of(codes) : 0);
}

// `work(n, first)` for so many tokens at a time, `n` a constant.
template <class Work>
void by_tokens(size_t tokens, Work work) {
  for (size_t first = 0; first < tokens; first += MOST_TOKENS) {
    switch (std::min(tokens - first, MOST_TOKENS)) {
      case 1: work(std::integral_constant<int, 1>{}, first); break;
      case 2: work(std::integral_constant<int, 2>{}, first); break;
      case 3: work(std::integral_constant<int, 3>{}, first); break;
      case 4: work(std::integral_constant<int, 4>{}, first); break;
      case 5: work(std::integral_constant<int, 5>{}, first); break;
      case 6: work(std::integral_constant<int, 6>{}, first); break;
      case 7: work(std::integral_constant<int, 7>{}, first); break;
      default: work(std::integral_constant<int, 8>{}, first);
    }
  }
}

// Two columns of 16 rows with those of each token, which begin at x[t] + `offset`.
template <int Tokens>
inline void add_products(__m512i pair, const u8* const* x, size_t offset, __m512* sum) {
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t)
    sum[t] = _mm512_dpbf16_ps(sum[t], __m512bh(pair), __m512bh(_mm512_set1_epi32(load<int>(x[t] + offset))));
}

// Memory that a thread uses next, fetched while it computes: it then comes as fast as from the second-level cache.
struct Ahead {
  const u8* at;

  template <int LINES>
  void fetch(size_t nbytes = 64 * LINES) {
    for (int line = 0; line < LINES; ++line) _mm_prefetch(reinterpret_cast<const char*>(at) + 64 * line, _MM_HINT_T1);
    at += nbytes;
  }
};

inline constexpr size_t FOUR_BLOCKS_BYTES = 4 * (BLOCK + CODE_BYTES + 2);  // as many escapes as there are in trained weights

// Adds the bias to the products of one token with `rows` rows from `row` on, 16 at most, and writes them.
inline void write_sums(const Product& p, __m512 sums, size_t token, size_t row, size_t rows) {
  const auto mask = __mmask16((1u << std::min(rows, GROUP_ROWS)) - 1);
  if (p.bias) {
    const __m256i bias = _mm256_maskz_loadu_epi16(mask, p.bias + row * 2);
    sums = _mm512_add_ps(sums, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bias), 16)));
  }
  _mm256_mask_storeu_epi16(p.y + (token * p.y_stride + row) * 2, mask, __m256i(_mm512_cvtneps_pbh(sums)));
}

HERMES_TARGET_END
#endif

}  // namespace hermes
