// Products of several tokens with float32 matrices. Lanes are tokens: a row's numbers are multiplied one after the other,
// each with 16 tokens at once, so that weights are read once and need no turning.
#include <string_view>

#include "tiles.hpp"

namespace hermes {

#if defined(__x86_64__)
HERMES_TARGET_BEGIN(HERMES_AVX512)

namespace {

constexpr size_t LANES = 16;
constexpr size_t STRIP = 4 * LANES;           // tokens with whose sums a core's registers are filled
constexpr size_t ROWS = 24;                   // copied together; as many registers hold sums
constexpr size_t TILE = 16 * ROWS;            // at most dealt out together: they share a block of tokens in a core's cache
constexpr size_t STEP = 6;                    // rows that fill registers with four times 16 tokens
constexpr size_t RELOAD = 12;                 // rows
constexpr size_t TURNED = 128;                // columns dealt out together: no two cores write to neighbouring lines
constexpr size_t TOKENS = FLOAT_TOKENS;       // turned at once, for the second-level cache
constexpr size_t COLUMNS = FLOAT_MOST_BLOCK;  // of a row, copied to where no two rows share a line of the first-level cache
constexpr size_t FEW = 32768;                 // numbers

__mmask16 first(size_t count) { return __mmask16((1u << std::min(count, LANES)) - 1); }

// Tokens as they are multiplied: strip after strip, of each strip one column after the other.
struct Turned {
  float* at;
  size_t tokens, columns;

  size_t lanes(size_t strip) const {
    return std::min(STRIP, (tokens + LANES - 1) / LANES * LANES - strip * STRIP);
  }
  float* strip(size_t number) const { return at + number * STRIP * columns; }

  // Fills columns [begin, end) of 16 lanes from `token` on; those behind the last token with nothing.
  void fill(const float* x, size_t token, size_t begin, size_t end) const {
    const size_t width = lanes(token / STRIP);
    float* to = strip(token / STRIP) + token % STRIP;
    for (size_t column = begin; column < end; column += LANES) {
      __m512i words[LANES];
      for (size_t t = 0; t < LANES; ++t)
        words[t] = token + t < tokens
                       ? _mm512_maskz_loadu_epi32(first(columns - column), x + (token + t) * columns + column)
                       : _mm512_setzero_si512();
      turn(words);
      for (size_t c = 0; c < LANES && column + c < columns; ++c)
        _mm512_storeu_si512(to + (column + c) * width, words[c]);
    }
  }
};

// Sums of R copied rows with V * 16 tokens of a strip, over so many columns in order, each product and its addition
// rounded once. Rows that come next, from `ahead` on and `stride` apart, are fetched meanwhile, unless it is null.
template <int V, int R>
inline void sum_up(const float* strip, const float* rows, size_t columns, const float* ahead, size_t stride,
                   __m512 (&sums)[R][V]) {
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_ps();
  for (size_t column = 0; column < columns;) {
    if (ahead)
      for (int r = 0; r < R; ++r)
        _mm_prefetch(reinterpret_cast<const char*>(ahead + r * stride + column), _MM_HINT_T1);
    for (const size_t end = std::min(column + LANES, columns); column < end; ++column) {
      __m512 x[V];
      for (int v = 0; v < V; ++v) x[v] = _mm512_loadu_ps(strip + (column * V + v) * LANES);
#pragma GCC unroll 24
      for (int r = 0; r < R; ++r) {
        const __m512 weight = _mm512_set1_ps(rows[r * COLUMNS + column]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] = _mm512_fmadd_ps(x[v], weight, sums[r][v]);
      }
    }
  }
}

// What a thread works in: some rows of a block of columns, and the totals of all tokens with the rows of a tile.
struct Tile {
  const Product& p;
  const float* weights;
  size_t row, count;  // rows from there on
  alignas(64) float rows[ROWS * COLUMNS];
  alignas(64) float totals[TOKENS * TILE];  // of each strip, row after row

  Tile(const Product& p, const float* weights, size_t row, size_t count)
      : p(p), weights(weights), row(row), count(count) {}

  const float* at(size_t r, size_t column) const { return weights + (row + r) * p.columns + column; }

  float bias(size_t r) const { return r < count ? floats(p.bias)[row + r] : 0; }

  void copy(size_t first_row, size_t column, size_t columns) {
    for (size_t r = 0; r < ROWS; ++r)
      for (size_t c = 0; c < columns; c += LANES) {
        const auto mask = first_row + r < count ? first(columns - c) : __mmask16(0);
        _mm512_store_ps(rows + r * COLUMNS + c, _mm512_maskz_loadu_ps(mask, at(first_row + r, column + c)));
      }
  }

  // Adds the block of columns that was copied of these rows to the totals of a strip with V * 16 lanes, or begins them.
  template <int V>
  void add(const float* strip, float* to, size_t first_row, size_t column, size_t columns, const float* ahead) {
    constexpr int R = V == 1 ? 12 : int(ROWS) / V;
    for (size_t r = 0; r < ROWS && first_row + r < count; r += R) {
      __m512 sums[R][V];
      sum_up<V, R>(strip + column * V * LANES, rows + r * COLUMNS, columns, ahead ? ahead + r * p.columns : nullptr,
                   p.columns, sums);
      for (size_t i = 0; i < R; ++i)
        for (size_t v = 0; v < V; ++v) {
          float* total = to + (first_row + r + i) * STRIP + v * LANES;
          __m512 sum = sums[i][v];
          if (column % p.part)
            sum = _mm512_add_ps(_mm512_load_ps(total), sum);
          else if (!column && p.bias)
            sum = _mm512_add_ps(_mm512_set1_ps(bias(first_row + r + i)), sum);
          _mm512_store_ps(total, sum);
        }
    }
  }

  // Rows that are multiplied after those from `first_row` on, with this block of columns or the next.
  const float* after(size_t first_row, size_t column, size_t columns, const float* next) const {
    if (first_row + ROWS < count) return at(first_row + ROWS, column);
    return column + columns < p.columns ? at(0, column + columns) : next;
  }

  // All rows with all tokens, into y; those from `next` on, if it is not null, are the thread's next.
  void multiply(const Turned& x, const float* next, float* y) {
    for (size_t column = 0; column < p.columns;) {
      const size_t part = std::min(p.columns, (column / p.part + 1) * p.part);
      while (column < part) {
        const size_t columns = std::min(p.block, part - column);
        for (size_t r = 0; r < count; r += ROWS) {
          copy(r, column, columns);
          const float* ahead = after(r, column, columns, next);
          for (size_t s = 0; s * STRIP < x.tokens; ++s, ahead = nullptr) {
            const float* strip = x.strip(s);
            float* to = totals + s * STRIP * TILE;
            switch (x.lanes(s) / LANES) {
              case 1: add<1>(strip, to, r, column, columns, ahead); break;
              case 2: add<2>(strip, to, r, column, columns, ahead); break;
              case 3: add<3>(strip, to, r, column, columns, ahead); break;
              default: add<4>(strip, to, r, column, columns, ahead);
            }
          }
        }
        column += columns;
      }
      write(x.tokens, y, part > p.part);
    }
  }

  // The totals, or what was written before plus them.
  void write(size_t tokens, float* y, bool adds) const {
    for (size_t token = 0; token < tokens; token += LANES)
      for (size_t r = 0; r < count; r += LANES) {
        const float* from = totals + token / STRIP * STRIP * TILE + token % STRIP;
        __m512i words[LANES];
        for (size_t i = 0; i < LANES; ++i)
          words[i] = r + i < count ? _mm512_load_si512(from + (r + i) * STRIP) : _mm512_setzero_si512();
        turn(words);
        for (size_t t = 0; t < LANES && token + t < tokens; ++t) {
          float* const to = y + (token + t) * p.y_stride + row + r;
          const __mmask16 mask = first(count - r);
          __m512 sum = _mm512_castsi512_ps(words[t]);
          if (adds) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), sum);
          _mm512_mask_storeu_ps(to, mask, sum);
        }
      }
  }
};

// Rows dealt out together: the fewer, the more often all tokens come from the third-level cache, which takes about as long
// as `RELOAD` rows do; the more, the longer the last thread is waited for.
size_t float_tile_rows(size_t rows, unsigned threads) {
  size_t best = TILE, least = SIZE_MAX;
  for (size_t tile = TILE; tile >= STEP; tile -= STEP) {
    const size_t tiles = (rows + tile - 1) / tile, turns = (tiles + threads - 1) / threads;
    const size_t cost = turns * (std::min(tile, rows) + RELOAD);
    if (cost < least) best = tile, least = cost;
  }
  return best;
}

}  // namespace

bool can_multiply_floats() { return best_path().name == std::string_view("avx512"); }

void multiply_floats(const Product& p, const u8* weights, size_t rows, u8* scratch, bool turned, unsigned threads) {
  for (size_t token = 0; token < p.tokens; token += TOKENS) {
    const Turned x{reinterpret_cast<float*>(scratch), std::min(TOKENS, p.tokens - token), p.columns};
    // Other threads would take longer to begin than this takes with few tokens.
    const unsigned fillers = x.tokens * x.columns < FEW ? 1 : threads;
    if (!turned || p.tokens > TOKENS)
      over_tiles(0, p.columns, TURNED, fillers, [&](size_t from, size_t to, size_t) -> Result {
        for (size_t t = 0; t < x.tokens; t += LANES) x.fill(floats(p.x) + token * p.columns, t, from, to);
        return {Fault::NONE, 0};
      });
    over_tiles(0, rows, float_tile_rows(rows, threads), threads, [&](size_t from, size_t to, size_t next) -> Result {
      Tile tile(p, floats(weights), from, to - from);
      const float* const after = next < rows ? floats(weights) + next * p.columns : nullptr;
      tile.multiply(x, after, reinterpret_cast<float*>(p.y) + token * p.y_stride);
      return {Fault::NONE, 0};
    });
  }
}

HERMES_TARGET_END
#else

bool can_multiply_floats() { return false; }
void multiply_floats(const Product&, const u8*, size_t, u8*, bool, unsigned) {}

#endif
}  // namespace hermes
