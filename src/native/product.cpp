#include "product.hpp"

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace hermes {
namespace {

// Runs work(0) to work(threads - 1) at once and waits for all: on torch's own threads, which may be spinning on the
// cores since its last product, where torch has brought GNU's OpenMP; else on threads of our own.
template <class Work>
void on_threads(unsigned threads, Work& work) {
  if (threads < 2) return work(0);
  struct Call {
    Work* work;
    std::atomic<unsigned> next{0};
  } call{&work};
  const auto body = +[](void* data) {
    auto* const call = static_cast<Call*>(data);
    (*call->work)(call->next++);
  };
#if defined(__unix__) || defined(__APPLE__)
  using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  if (parallel) return parallel(body, &call, threads, 0);
#endif
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, &call);
  body(&call);
  for (std::thread& other : others) other.join();
}

// Rows [begin, end) by one thread.
Result unpack(const Matrix& m, size_t begin, size_t end, u8* target) {
  const size_t first = m.skip + begin * m.columns, chunk = first / CHUNK_ELEMENTS;
  const u32 number = m.number + u32(chunk);
  if (chunk + 1 >= m.num_places) return {Fault::TRUNCATED, number};
  const size_t at = size_t(m.places[chunk] - m.places[0]);
  if (at > m.bytes) return {Fault::TRUNCATED, number};
  return decode(best_path(), m.chunks + at, m.bytes - at, target, (end - begin) * m.columns * 2, 2, number,
                first % CHUNK_ELEMENTS, true);
}

// Tiles, dealt to threads as they come: `work(thread, begin, end)` for rows, until one fails.
template <class Work>
Result over_tiles(size_t begin, size_t end, size_t rows, unsigned threads, Work work) {
  std::atomic<size_t> next{begin};
  std::atomic<bool> failed{false};
  Result fault{Fault::NONE, 0};
  auto run = [&](unsigned thread) {
    for (size_t row; !failed && (row = next.fetch_add(rows)) < end;) {
      const Result result = work(thread, row, std::min(row + rows, end));
      if (result.fault != Fault::NONE && !failed.exchange(true)) fault = result;
    }
  };
  on_threads(unsigned(std::min<size_t>(threads, (end - begin + rows - 1) / rows)), run);
  return fault;
}

}  // namespace

size_t tile_rows(size_t columns) {
  size_t rows = GROUP_ROWS;
  while (rows * columns % CHUNK_ELEMENTS && 2 * rows * columns * 2 <= TILE_BYTES) rows *= 2;
  return rows;
}

Result unpack_rows(const Matrix& m, size_t begin, size_t end, u8* target, unsigned threads) {
  return over_tiles(begin, end, tile_rows(m.columns), threads, [&](unsigned, size_t from, size_t to) {
    return unpack(m, from, to, target + (from - begin) * m.columns * 2);
  });
}

#if defined(__x86_64__)
HERMES_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,bmi,bmi2")

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

// `Tokens` tokens with `Groups` groups of 16 unpacked rows, the first of which is row `row`, of which there are `rows`.
template <int Tokens, int Groups>
void dot(const Product& p, const u8* tile, size_t row, size_t rows, size_t token) {
  const u8* x[Tokens];
  for (int t = 0; t < Tokens; ++t) x[t] = p.x + (token + t) * p.columns * 2;
  __m512 total[Groups][Tokens];
  for (size_t from = 0; from < p.columns; from += p.block) {
    const size_t to = std::min(from + p.block, p.columns);
    __m512 sum[Groups][Tokens];
    for (int g = 0; g < Groups; ++g)
      for (int t = 0; t < Tokens; ++t) sum[g][t] = _mm512_setzero_ps();
    for (size_t c = from; c < to; c += 32)
#pragma GCC unroll 2
      for (int g = 0; g < Groups; ++g) {
        __m512i pairs[16];
        turn(tile + g * GROUP_ROWS * p.columns * 2 + c * 2, p.columns * 2, pairs);
#pragma GCC unroll 16
        for (int pair = 0; pair < 16; ++pair)
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t)
            sum[g][t] = _mm512_dpbf16_ps(sum[g][t], __m512bh(pairs[pair]),
                                         __m512bh(_mm512_set1_epi32(load<int>(x[t] + (c + 2 * pair) * 2))));
      }
    for (int g = 0; g < Groups; ++g)
      for (int t = 0; t < Tokens; ++t) total[g][t] = from ? _mm512_add_ps(total[g][t], sum[g][t]) : sum[g][t];
  }
  for (int g = 0; g < Groups; ++g) {
    if (g * GROUP_ROWS >= rows) break;
    const size_t first = row + g * GROUP_ROWS, count = std::min(GROUP_ROWS, rows - g * GROUP_ROWS);
    const auto mask = __mmask16((1u << count) - 1);
    __m512 bias = _mm512_setzero_ps();
    if (p.bias)
      bias = _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p.bias + first * 2)), 16));
    for (int t = 0; t < Tokens; ++t) {
      const __m512 value = p.bias ? _mm512_add_ps(total[g][t], bias) : total[g][t];
      _mm256_mask_storeu_epi16(p.y + ((token + t) * p.y_stride + first) * 2, mask, __m256i(_mm512_cvtneps_pbh(value)));
    }
  }
}

template <int Tokens>
void dot_rows(const Product& p, const u8* tile, size_t row, size_t rows, size_t token) {
  size_t done = 0;
  if constexpr (Tokens <= 4)  // two sums of each token at once, as one waits for itself
    for (; rows - done > GROUP_ROWS; done += std::min(2 * GROUP_ROWS, rows - done))
      dot<Tokens, 2>(p, tile + done * p.columns * 2, row + done, rows - done, token);
  for (; done < rows; done += GROUP_ROWS)
    dot<Tokens, 1>(p, tile + done * p.columns * 2, row + done, rows - done, token);
}

using Dot = void (*)(const Product&, const u8*, size_t, size_t, size_t);
constexpr Dot dots[] = {nullptr,     dot_rows<1>, dot_rows<2>, dot_rows<3>, dot_rows<4>,
                        dot_rows<5>, dot_rows<6>, dot_rows<7>, dot_rows<8>};
constexpr size_t MOST_TOKENS = std::size(dots) - 1;  // at once

}  // namespace

bool can_multiply() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("bmi2");
}

namespace {

void multiply_tile(const Product& p, const u8* tile, size_t row, size_t rows) {
  for (size_t token = 0; token < p.tokens; token += MOST_TOKENS)
    dots[std::min(p.tokens - token, MOST_TOKENS)](p, tile, row, rows, token);
}

}  // namespace

void multiply(const Product& p, const u8* weights, size_t rows, unsigned threads) {
  over_tiles(0, rows, GROUP_ROWS, threads, [&](unsigned, size_t from, size_t to) {
    multiply_tile(p, weights + from * p.columns * 2, from, to - from);
    return Result{Fault::NONE, 0};
  });
}

Result multiply(const Product& p, const Matrix& m, u8* scratch, unsigned threads) {
  const size_t tile = tile_rows(m.columns), each = scratch_bytes(tile, m.columns, 1);
  return over_tiles(0, m.rows, tile, threads, [&](unsigned thread, size_t from, size_t to) {
    u8* const rows = scratch + thread * each;
    const Result result = unpack(m, from, to, rows);
    if (result.fault == Fault::NONE) multiply_tile(p, rows, from, to - from);
    return result;
  });
}

HERMES_TARGET_END
#else

bool can_multiply() { return false; }
void multiply(const Product&, const u8*, size_t, unsigned) {}
Result multiply(const Product&, const Matrix& m, u8*, unsigned) { return {Fault::ENCODING, m.number}; }

#endif
}  // namespace hermes
