#include "product.hpp"

#include <string_view>
#include <thread>
#include <vector>

#include "tiles.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace hermes {

// On torch's own threads, which may be spinning on the cores since its last product, where torch has brought GNU's
// OpenMP; else on threads of our own.
void on_threads(unsigned threads, void (*body)(void*), void* data) {
  if (threads < 2) return body(data);
#if defined(__unix__) || defined(__APPLE__)
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel) return parallel(body, data, threads, 0);
#endif
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

size_t tile_rows(size_t columns) {
  size_t rows = GROUP_ROWS;
  while (rows * columns % CHUNK_ELEMENTS && 2 * rows * columns * 2 <= TILE_BYTES) rows *= 2;
  return rows;
}

Result unpack_rows(const Matrix& m, size_t begin, size_t end, u8* target, unsigned threads) {
  return over_tiles(begin, end, tile_rows(m.columns), threads, [&](size_t from, size_t to, size_t) -> Result {
    const size_t first = m.skip + from * m.columns, chunk = first / CHUNK_ELEMENTS;
    const u32 number = m.number + u32(chunk);
    if (chunk + 1 >= m.num_places) return {Fault::TRUNCATED, number};
    const size_t at = size_t(m.places[chunk] - m.places[0]);
    if (at > m.bytes) return {Fault::TRUNCATED, number};
    return decode(best_path(), m.chunks + at, m.bytes - at, target + (from - begin) * m.columns * 2,
                  (to - from) * m.columns * 2, 2, number, first % CHUNK_ELEMENTS, true);
  });
}

#if defined(__x86_64__)
HERMES_TARGET_BEGIN(HERMES_BF16_PRODUCTS)

namespace {

// 16 rows of 16 words each, turned: word r of out[c] is word c of row r.
inline void turn(const u8* rows, size_t stride, __m512i out[16]) {
  __m512i a[16], b[16];
  for (int r = 0; r < 16; ++r) a[r] = _mm512_loadu_si512(rows + r * stride);
  for (int r = 0; r < 16; r += 2) {
    b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
    b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
  }
  for (int r = 0; r < 16; r += 4) {
    a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
    a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
    a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
    a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
  }
  for (int c = 0; c < 4; ++c) {
    b[c] = _mm512_shuffle_i32x4(a[c], a[c + 4], 0x88);
    b[c + 4] = _mm512_shuffle_i32x4(a[c], a[c + 4], 0xDD);
    b[c + 8] = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0x88);
    b[c + 12] = _mm512_shuffle_i32x4(a[c + 8], a[c + 12], 0xDD);
  }
  for (int c = 0; c < 4; ++c) {
    out[c] = _mm512_shuffle_i32x4(b[c], b[c + 8], 0x88);
    out[c + 4] = _mm512_shuffle_i32x4(b[c + 4], b[c + 12], 0x88);
    out[c + 8] = _mm512_shuffle_i32x4(b[c], b[c + 8], 0xDD);
    out[c + 12] = _mm512_shuffle_i32x4(b[c + 4], b[c + 12], 0xDD);
  }
}

// Tokens from `token` on with the 16 rows from `row` on.
template <int Tokens>
void dot(const Product& p, const u8* rows, Ahead& ahead, size_t token, size_t row) {
  const u8* x[Tokens];
  for (int t = 0; t < Tokens; ++t) x[t] = p.x + (token + t) * p.columns * 2;
  __m512 sum[Tokens], total[Tokens];
  for (size_t from = 0; from < p.columns; from += p.block) {
    const size_t to = std::min(from + p.block, p.columns);
    for (int t = 0; t < Tokens; ++t) sum[t] = _mm512_setzero_ps();
    for (size_t c = from; c < to; c += 32) {
      ahead.fetch<16>();
      __m512i pairs[16];
      turn(rows + c * 2, p.columns * 2, pairs);
#pragma GCC unroll 16
      for (int pair = 0; pair < 16; ++pair)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
          sum[t] = _mm512_dpbf16_ps(sum[t], __m512bh(pairs[pair]),
                                    __m512bh(_mm512_set1_epi32(load<int>(x[t] + (c + 2 * pair) * 2))));
    }
    for (int t = 0; t < Tokens; ++t) total[t] = from ? _mm512_add_ps(total[t], sum[t]) : sum[t];
  }
  for (int t = 0; t < Tokens; ++t) write_sums(p, total[t], token + t, row, GROUP_ROWS);
}

using Dot = void (*)(const Product&, const u8*, Ahead&, size_t, size_t);
constexpr Dot dots[] = {dot<1>, dot<2>, dot<3>, dot<4>, dot<5>, dot<6>, dot<7>, dot<8>};

}  // namespace

bool can_multiply() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && best_path().name == std::string_view("avx512");
}

void multiply(const Product& p, const u8* weights, size_t rows, unsigned threads) {
  over_tiles(0, rows, GROUP_ROWS, threads, [&](size_t row, size_t, size_t next) -> Result {
    Ahead ahead{weights + std::min(next, rows - GROUP_ROWS) * p.columns * 2};
    for (size_t token = 0; token < p.tokens; token += MOST_TOKENS)
      dots[std::min(p.tokens - token, MOST_TOKENS) - 1](p, weights + row * p.columns * 2, ahead, token, row);
    return {Fault::NONE, 0};
  });
}

HERMES_TARGET_END
#else

bool can_multiply() { return false; }
void multiply(const Product&, const u8*, size_t, unsigned) {}

#endif
}  // namespace hermes
