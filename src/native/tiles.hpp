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
#define HERMES_BF16_PRODUCTS HERMES_AVX512 ",avx512bf16,amx-tile,amx-bf16"

HERMES_TARGET_BEGIN(HERMES_BF16_PRODUCTS)

inline size_t count_escapes(const u8* codes, size_t blocks) {
  size_t even = 0, odd = 0;
  const auto of = [](const u8* at) { return size_t(_mm_popcnt_u64(escaped_in(at))); };
  for (; blocks >= 2; blocks -= 2, codes += 2 * CODE_BYTES) even += of(codes), odd += of(codes + CODE_BYTES);
  return even + odd + (blocks ? of(codes) : 0);
}

// Sums of 16 rows with some tokens, in float32. Two columns of all rows come at a time, as 16 pairs, in order. A pair's two
// products are added to a lane for each row.
template <int Tokens>
class PairSums {
 public:
  PairSums(const Product& p, size_t token) {
    for (int t = 0; t < Tokens; ++t) x_[t] = p.x + (token + t) * p.columns * 2;
    clear();
  }
  size_t tokens() const { return Tokens; }
  void clear() {
    for (int t = 0; t < Tokens; ++t) sums_[t] = _mm512_setzero_ps();
  }
  // The columns at byte `offset` of the tokens.
  void add(__m512i pair, size_t offset) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t)
      sums_[t] = _mm512_dpbf16_ps(sums_[t], __m512bh(pair), __m512bh(_mm512_set1_epi32(load<int>(x_[t] + offset))));
  }
  // Begins from nothing again, having added what was summed to the totals, or made it the totals.
  void add_up(bool is_first) {
    for (int t = 0; t < Tokens; ++t) totals_[t] = is_first ? sums_[t] : _mm512_add_ps(totals_[t], sums_[t]);
    clear();
  }
  __m512 total(size_t t) const { return totals_[t]; }

 private:
  const u8* x_[Tokens];
  __m512 sums_[Tokens], totals_[Tokens];
};

// The compiler does not know that tiles are loaded from memory, or of all that is read and written to set them up: what lies
// at `at` is written before, and read after.
inline void settle(const void* at) { asm volatile("" : : "r"(at) : "memory"); }

// The processor's matrix unit, set up for so many tokens; whatever it was set up for is put back. Few of its instructions
// are other threads' or functions' business: what oneDNN had in the tiles was used before it returned.
class MatrixUnit {
 public:
  static constexpr size_t MOST_TOKENS = 5 * 16;  // tiles 0 to 4 hold sums; X and LAST tokens, 16 or what is left; then weights
  enum Tile { X = 5, LAST, WEIGHTS };

  explicit MatrixUnit(size_t tokens) {
    _tile_storeconfig(before_);
    settle(before_);
    Config config{};
    config.palette = 1;
    for (size_t tile = 0; tile < X; ++tile) config.rows[tile] = u8(std::min<size_t>(16, tokens - std::min(tokens, 16 * tile)));
    config.rows[X] = 16, config.rows[LAST] = u8(tokens % 16), config.rows[WEIGHTS] = GROUP_ROWS;
    for (size_t tile = 0; tile < 8; ++tile)
      if (config.rows[tile]) config.row_bytes[tile] = 64;
    settle(&config);
    _tile_loadconfig(&config);
  }
  ~MatrixUnit() {
    settle(before_);
    _tile_loadconfig(before_);
  }
  MatrixUnit(const MatrixUnit&) = delete;

 private:
  struct alignas(64) Config {
    u8 palette, start_row, reserved[14];
    u16 row_bytes[16];
    u8 rows[16];
  };
  static_assert(sizeof(Config) == 64);
  alignas(64) u8 before_[64];
};

// The same by the matrix unit, which takes 32 columns at once and has an order of its own for them. Its instructions want
// their tiles' numbers written out.
class TileSums {
 public:
  TileSums(const Product& p, size_t token)
      : x_(p.x + token * p.columns * 2), stride_(p.columns * 2),
        tokens_(std::min(MatrixUnit::MOST_TOKENS, p.tokens - token)), unit_(tokens_) {
    clear();
  }
  size_t tokens() const { return tokens_; }
  void clear() {
    _tile_zero(0);
    if (tokens_ > 16) _tile_zero(1);
    if (tokens_ > 32) _tile_zero(2);
    if (tokens_ > 48) _tile_zero(3);
    if (tokens_ > 64) _tile_zero(4);
  }
  void add(__m512i pair, size_t offset) {
    _mm512_store_si512(weights_[offset / 4 % GROUP_ROWS], pair);
    if (offset / 4 % GROUP_ROWS == GROUP_ROWS - 1) multiply(x_ + offset - 60);
  }
  void add_up(bool is_first) {
    alignas(64) float sums[MatrixUnit::MOST_TOKENS][16];
    _tile_stored(0, sums, 64);
    if (tokens_ > 16) _tile_stored(1, sums[16], 64);
    if (tokens_ > 32) _tile_stored(2, sums[32], 64);
    if (tokens_ > 48) _tile_stored(3, sums[48], 64);
    if (tokens_ > 64) _tile_stored(4, sums[64], 64);
    for (size_t t = 0; t < tokens_; ++t) {
      const __m512 sum = _mm512_load_ps(sums[t]);
      _mm512_store_ps(totals_[t], is_first ? sum : _mm512_add_ps(_mm512_load_ps(totals_[t]), sum));
    }
    clear();
  }
  __m512 total(size_t t) const { return _mm512_load_ps(totals_[t]); }

 private:
  // The weights with 32 columns of the tokens, which begin at `x`.
  void multiply(const u8* x) {
    static_assert(MatrixUnit::X == 5 && MatrixUnit::LAST == 6 && MatrixUnit::WEIGHTS == 7);
    settle(weights_);
    _tile_loadd(7, weights_, 64);
    const size_t next = 16 * stride_;
    size_t left = tokens_;
#define HERMES_ADD(SUMS)              \
  if (left >= 16) {                   \
    _tile_loadd(5, x, stride_);       \
    _tile_dpbf16ps(SUMS, 5, 7);       \
    x += next, left -= 16;            \
  } else {                            \
    if (left) {                       \
      _tile_loadd(6, x, stride_);     \
      _tile_dpbf16ps(SUMS, 6, 7);     \
    }                                 \
    return;                           \
  }
    HERMES_ADD(0) HERMES_ADD(1) HERMES_ADD(2) HERMES_ADD(3) HERMES_ADD(4)
#undef HERMES_ADD
  }

  const u8* x_;
  size_t stride_, tokens_;
  MatrixUnit unit_;
  alignas(64) u8 weights_[GROUP_ROWS][64];
  alignas(64) float totals_[MatrixUnit::MOST_TOKENS][16];
};

// `work(sums, first)` for some tokens at a time, with sums of them.
template <class Work>
void by_tokens(const Product& p, Work work) {
  if (p.by_tiles) {
    for (size_t first = 0; first < p.tokens; first += MatrixUnit::MOST_TOKENS) {
      TileSums sums(p, first);
      work(sums, first);
    }
    return;
  }
  const auto with = [&](auto tokens, size_t first) {
    PairSums<tokens> sums(p, first);
    work(sums, first);
  };
  for (size_t first = 0; first < p.tokens; first += MOST_TOKENS) {
    switch (std::min(p.tokens - first, MOST_TOKENS)) {
      case 1: with(std::integral_constant<int, 1>{}, first); break;
      case 2: with(std::integral_constant<int, 2>{}, first); break;
      case 3: with(std::integral_constant<int, 3>{}, first); break;
      case 4: with(std::integral_constant<int, 4>{}, first); break;
      case 5: with(std::integral_constant<int, 5>{}, first); break;
      case 6: with(std::integral_constant<int, 6>{}, first); break;
      case 7: with(std::integral_constant<int, 7>{}, first); break;
      default: with(std::integral_constant<int, 8>{}, first);
    }
  }
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
