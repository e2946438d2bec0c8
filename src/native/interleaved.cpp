// Packed rows in the order in which products need them: a block unpacked is what is multiplied, turned no more.
#include "tiles.hpp"

namespace hermes {

#if defined(__x86_64__)
HERMES_TARGET_BEGIN(HERMES_BF16_PRODUCTS)

namespace {

// In place of a chunk's encoding; no file may have it.
constexpr u8 INTERLEAVED = 0x80;

// What comes before the planes, as long as a chunk's header, and at the same places what a chunk has too.
struct Header {
  u64 unused;
  u8 encoding, base;
  u16 zero;
  u32 number, blocks, escapes;
};
static_assert(sizeof(Header) == HEADER_BYTES);

// Where the chunks of rows [from, to) lie, if they are theirs alone. False if not.
bool find_chunks(const Matrix& m, size_t from, size_t to, size_t& first, size_t& begin, size_t& end) {
  const size_t elements = m.skip + from * m.columns, behind = m.skip + to * m.columns;
  if (elements % CHUNK_ELEMENTS || (behind % CHUNK_ELEMENTS && to != m.rows) || (to - from) % GROUP_ROWS) return false;
  first = elements / CHUNK_ELEMENTS;
  const size_t last = (behind + CHUNK_ELEMENTS - 1) / CHUNK_ELEMENTS;
  if (last >= m.num_places) return false;
  begin = size_t(m.places[first] - m.places[0]), end = size_t(m.places[last] - m.places[0]);
  return begin + HEADER_BYTES <= end && end <= m.bytes;
}

// The base that all these chunks have in common; false if they have none, or one of them is not packed.
bool find_base(const Matrix& m, size_t first, size_t end, u8& base) {
  for (size_t index = first; size_t(m.places[index] - m.places[0]) < end; ++index) {
    Chunk chunk;
    if (m.open(index, chunk) != Fault::NONE || chunk.encoding != BF16) return false;
    if (index > first && chunk.planes.base != base) return false;
    base = chunk.planes.base;
  }
  return true;
}

// A block of two columns of 16 rows, and two more; `escapes` moves on.
void encode_block(__m512i first, __m512i second, u8 base, u8* codes, u8* rest, u8*& escapes) {
  const __m512i bytes = _mm512_set1_epi16(0xFF), sign = _mm512_set1_epi8(char(0x80));
  const __m512i low = _mm512_packus_epi16(_mm512_and_si512(first, bytes), _mm512_and_si512(second, bytes));
  const __m512i high = _mm512_packus_epi16(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
  // Where the first operand has a bit the second's, else the third's; bits that cross into the next byte are masked.
  const __m512i exponent = _mm512_ternarylogic_epi64(
      _mm512_set1_epi8(1), _mm512_srli_epi16(low, 7), _mm512_slli_epi16(high, 1), 0xCA);
  const __m512i code = _mm512_min_epu8(_mm512_sub_epi8(exponent, _mm512_set1_epi8(char(base))), _mm512_set1_epi8(7));
  u64 escaped = ~u64{0};
  for (int bit = 0; bit < 3; ++bit) {
    const u64 plane = _mm512_test_epi8_mask(code, _mm512_set1_epi8(char(1 << bit)));
    store(codes + 8 * bit, plane);
    escaped &= plane;
  }
  _mm512_storeu_si512(rest, _mm512_ternarylogic_epi64(sign, high, low, 0xCA));
  const unsigned number = unsigned(_mm_popcnt_u64(escaped));
  _mm512_mask_storeu_epi8(escapes, _bzhi_u64(~u64{0}, number), _mm512_maskz_compress_epi8(escaped, exponent));
  escapes += number;
}

// `count` rows of `columns` elements into the bytes where their chunks were.
void encode_rows(const u8* rows, size_t count, size_t columns, u8 base, u32 number, u8* at) {
  const size_t blocks = count * columns / BLOCK;
  u8 *codes = at + HEADER_BYTES, *rest = codes + CODE_BYTES * blocks, *escapes = rest + BLOCK * blocks;
  const u8* const first_escape = escapes;
  for (size_t row = 0; row < count; row += GROUP_ROWS)
    for (size_t column = 0; column < columns; column += 32) {
      __m512i pairs[16];
      for (size_t r = 0; r < 16; ++r) pairs[r] = load64(rows + ((row + r) * columns + column) * 2);
      turn(pairs);
      for (int i = 0; i < 16; i += 2, codes += CODE_BYTES, rest += BLOCK)
        encode_block(pairs[i], pairs[i + 1], base, codes, rest, escapes);
    }
  const Header header{0, INTERLEAVED, base, 0, number, u32(blocks), u32(escapes - first_escape)};
  store(at, header);
}

// The 16 rows that come next with some tokens, from `token` on.
template <class Sums>
bool dot(const Product& p, Interleaved& rows, Ahead& ahead, Sums& sums, size_t token, size_t row) {
  const __m512i base = _mm512_set1_epi8(char(rows.base));
  // Copies stay in registers; through the reference they would be stored and loaded again at every block.
  const u8 *codes = rows.codes, *rest = rows.rest, *escapes = rows.escapes;
  const bool has_room = rows.has_room;
  for (size_t from = 0; from < p.columns; from += p.block) {
    const size_t to = std::min(from + p.block, p.columns);
    for (size_t c = from; c < to; c += 16) {
      ahead.fetch<6>(FOUR_BLOCKS_BYTES);
      if (size_t(rows.end - escapes) < 4 * BLOCK && count_escapes(codes, 4) > size_t(rows.end - escapes)) return false;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, codes += CODE_BYTES, rest += BLOCK) {
        const Halves pairs = join(exponents(base, codes, escapes, has_room), load64(rest));
        sums.add(pairs.first, (c + 4 * i) * 2);
        sums.add(pairs.second, (c + 4 * i + 2) * 2);
      }
    }
    sums.add_up(from == 0);
  }
  rows.codes = codes, rows.rest = rest, rows.escapes = escapes;
  for (size_t t = 0; t < sums.tokens(); ++t) write_sums(p, sums.total(t), token + t, row, GROUP_ROWS);
  return true;
}

}  // namespace

void interleave(const Matrix& m, u8* chunks, u8* scratch) {
  const size_t tile = tile_rows(m.columns);
  for (size_t from = 0; from < m.rows; from += tile) {
    const size_t to = std::min(from + tile, m.rows);
    size_t first, begin, end;
    u8 base;
    if (!find_chunks(m, from, to, first, begin, end) || !find_base(m, first, end, base)) continue;
    const size_t nbytes = (to - from) * m.columns * 2;
    const u32 number = m.number + u32(first);
    if (decode(best_path(), chunks + begin, end - begin, scratch, nbytes, 2, number, 0, true).fault != Fault::NONE)
      continue;
    // The escapes are those of the chunks, as the base is theirs, and headers are fewer: it fits.
    encode_rows(scratch, to - from, m.columns, base, number, chunks + begin);
  }
}

bool find_interleaved(const Matrix& m, size_t from, size_t to, Interleaved& rows) {
  size_t first, begin, end;
  if (from % tile_rows(m.columns) || !find_chunks(m, from, to, first, begin, end)) return false;
  const u8* const at = m.chunks + begin;
  const auto header = load<Header>(at);
  const size_t blocks = (to - from) * m.columns / BLOCK, fixed = HEADER_BYTES + (CODE_BYTES + BLOCK) * blocks;
  if (header.encoding != INTERLEAVED || header.number != m.number + u32(first) || header.blocks != blocks ||
      begin + fixed + header.escapes > end)
    return false;
  const u8* const rest = at + HEADER_BYTES + CODE_BYTES * blocks;
  const u8* const escapes = rest + BLOCK * blocks;
  rows = {at + HEADER_BYTES, rest, escapes, escapes + header.escapes, header.base,
          size_t(m.chunks + m.bytes - (escapes + header.escapes)) >= 64};
  return true;
}

bool multiply_group(const Product& p, Interleaved& rows, Ahead& ahead, size_t row) {
  Interleaved after = rows;
  bool is_whole = true;
  by_tokens(p, [&](auto& sums, size_t first) {
    after = rows;
    is_whole = is_whole && dot(p, after, ahead, sums, first, row);
  });
  rows = after;
  return is_whole;
}

bool unpack_group(size_t columns, Interleaved& rows, size_t skip, size_t count, u8* target) {
  const __m512i base = _mm512_set1_epi8(char(rows.base));
  for (size_t column = 0; column < columns; column += 32) {
    if (size_t(rows.end - rows.escapes) < 8 * BLOCK &&
        count_escapes(rows.codes, 8) > size_t(rows.end - rows.escapes))
      return false;
    __m512i pairs[16];
    for (int i = 0; i < 16; i += 2, rows.codes += CODE_BYTES, rows.rest += BLOCK) {
      const Halves halves = join(exponents(base, rows.codes, rows.escapes, rows.has_room), load64(rows.rest));
      pairs[i] = halves.first, pairs[i + 1] = halves.second;
    }
    turn(pairs);
    for (size_t r = 0; r < count; ++r) _mm512_storeu_si512(target + (r * columns + column) * 2, pairs[skip + r]);
  }
  return true;
}

HERMES_TARGET_END
#else

void interleave(const Matrix&, u8*, u8*) {}
bool find_interleaved(const Matrix&, size_t, size_t, Interleaved&) { return false; }
bool multiply_group(const Product&, Interleaved&, Ahead&, size_t) { return false; }
bool unpack_group(size_t, Interleaved&, size_t, size_t, u8*) { return false; }

#endif
}  // namespace hermes
