#include "product.hpp"

#include <string_view>
#include <thread>
#include <vector>

#include "tiles.hpp"

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
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

namespace {

// Rows [begin, end) that lie in chunks.
Result unpack_chunks(const Matrix& m, size_t begin, size_t end, u8* target) {
  const size_t first = m.skip + begin * m.columns, chunk = first / CHUNK_ELEMENTS;
  const u32 number = m.number + u32(chunk);
  size_t at;
  if (!m.find(chunk, at)) return {Fault::TRUNCATED, number};
  return decode(best_path(), m.chunks + at, m.bytes - at, target, (end - begin) * m.columns * 2, 2, number,
                first % CHUNK_ELEMENTS, true);
}

}  // namespace

Result unpack_rows(const Matrix& m, size_t begin, size_t end, u8* target, unsigned threads) {
  const size_t tile = tile_rows(m.columns), row_bytes = m.columns * 2;
  return over_tiles(begin / tile * tile, end, tile, threads, [&](size_t from, size_t to, size_t) -> Result {
    const size_t low = std::max(from, begin);
    Interleaved rows;
    if (!find_interleaved(m, from, std::min(from + tile, m.rows), rows))
      return unpack_chunks(m, low, to, target + (low - begin) * row_bytes);
    for (size_t row = from; row < to; row += GROUP_ROWS) {
      const size_t skip = std::min(GROUP_ROWS, std::max(row, begin) - row);
      const size_t count = std::max(std::min(row + GROUP_ROWS, to), row + skip) - row - skip;
      if (!unpack_group(m.columns, rows, skip, count, target + (std::max(row, begin) - begin) * row_bytes))
        return {Fault::ESCAPES, m.number};
    }
    return {Fault::NONE, 0};
  });
}

#if defined(__x86_64__)
HERMES_TARGET_BEGIN(HERMES_BF16_PRODUCTS)

namespace {

// The 16 rows from `row` on with some tokens, from `token` on.
template <class Sums>
void dot(const Product& p, const u8* rows, Ahead& ahead, Sums& sums, size_t token, size_t row) {
  for (size_t from = 0; from < p.columns; from += p.block) {
    const size_t to = std::min(from + p.block, p.columns);
    for (size_t c = from; c < to; c += 32) {
      ahead.fetch<16>();
      __m512i pairs[16];
      for (int r = 0; r < 16; ++r) pairs[r] = load64(rows + (r * p.columns + c) * 2);
      turn(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) sums.add(pairs[i], (c + 2 * i) * 2);
    }
    sums.add_up(from == 0);
  }
  for (size_t t = 0; t < sums.tokens(); ++t) write_sums(p, sums.total(t), token + t, row, GROUP_ROWS);
}

}  // namespace

bool can_multiply() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512bf16") && best_path().name == std::string_view("avx512");
}

bool can_multiply_tiles() {
#if defined(__linux__)
  constexpr long ASK = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM for XTILEDATA: the kernel saves tiles from then on
  static const bool may = can_multiply() && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                          syscall(SYS_arch_prctl, ASK, TILES) == 0;
  return may;
#else
  return false;
#endif
}

void multiply(const Product& p, const u8* weights, size_t rows, unsigned threads) {
  over_tiles(0, rows, GROUP_ROWS, threads, [&](size_t row, size_t, size_t next) -> Result {
    Ahead ahead{weights + std::min(next, rows - GROUP_ROWS) * p.columns * 2};
    by_tokens(p, [&](auto& sums, size_t first) { dot(p, weights + row * p.columns * 2, ahead, sums, first, row); });
    return {Fault::NONE, 0};
  });
}

HERMES_TARGET_END
#else

bool can_multiply() { return false; }
bool can_multiply_tiles() { return false; }
void multiply(const Product&, const u8*, size_t, unsigned) {}

#endif
}  // namespace hermes
