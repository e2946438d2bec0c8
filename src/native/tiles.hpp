// What products with plain and with packed rows share: rows dealt out to threads, and sums that become bf16.
#pragma once

#include <algorithm>
#include <atomic>

#include "product.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hermes {

// Calls body(data) on so many threads at once and waits for all.
void on_threads(unsigned threads, void (*body)(void*), void* data);

// Rows [begin, end), so many at a time, to threads as they come: `work(from, to, next)`, `next` being the rows that the
// same thread does afterwards, or `end`; until one fails.
template <class Work>
Result over_tiles(size_t begin, size_t end, size_t rows, unsigned threads, Work work) {
  struct Deal {
    Work* work;
    size_t end, rows;
    std::atomic<size_t> next;
    std::atomic<bool> failed{false};
    Result fault{Fault::NONE, 0};

    size_t deal() { return std::min(end, next.fetch_add(rows)); }
    void run() {
      for (size_t row = deal(), after; row < end && !failed; row = after) {
        after = deal();
        const Result result = (*work)(row, std::min(row + rows, end), after);
        if (result.fault != Fault::NONE && !failed.exchange(true)) fault = result;
      }
    }
  } deal{&work, end, rows, begin};
  const size_t tiles = (end - begin + rows - 1) / rows;
  on_threads(unsigned(std::min<size_t>(threads, tiles)), [](void* data) { static_cast<Deal*>(data)->run(); }, &deal);
  return deal.fault;
}

#if defined(__x86_64__)
#define HERMES_BF16_PRODUCTS "avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vbmi2,avx512bf16,avx2,bmi,bmi2,popcnt"

HERMES_TARGET_BEGIN(HERMES_BF16_PRODUCTS)

// Memory that a thread uses next, fetched while it computes: it then comes as fast as from the second-level cache.
struct Ahead {
  const u8* at;

  template <int LINES>
  void fetch(size_t nbytes = 64 * LINES) {
    for (int line = 0; line < LINES; ++line) _mm_prefetch(reinterpret_cast<const char*>(at) + 64 * line, _MM_HINT_T1);
    at += nbytes;
  }
};

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
