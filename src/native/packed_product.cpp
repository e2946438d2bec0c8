// Products with packed rows. 16 rows are unpacked at a time, 64 columns of each, into a tile of the first-level cache;
// while the next columns are unpacked these are multiplied, as one sum after the other would leave the core waiting.
#include "tiles.hpp"

namespace hermes {

#if defined(__x86_64__)
HERMES_TARGET_BEGIN(HERMES_BF16_PRODUCTS)

namespace {

// Where a row goes on in its chunk, of which `left` blocks are left. Of a raw chunk there is the `rest` alone.
struct Row {
  const u8 *codes, *rest, *escapes;
  u32 base;  // four times
  size_t chunk, left;

  bool is_raw() const { return !codes; }
  // The first block of a chunk.
  Row(const Chunk& from, size_t index) : chunk(index), left(from.elements / BLOCK) {
    const bool raw = from.encoding == RAW;
    codes = raw ? nullptr : from.planes.codes;
    rest = raw ? from.payload : from.planes.rest;
    escapes = raw ? nullptr : from.planes.escapes;
    base = raw ? 0 : from.planes.base * 0x01010101u;
  }
  Row() = default;

  void advance(size_t blocks) {
    if (!is_raw()) codes += blocks * CODE_BYTES;
    rest += blocks * (is_raw() ? 2 * BLOCK : BLOCK);
    left -= blocks;
  }
};

// Goes over a matrix row by row, before it is unpacked: where each begins, and that no escape lies outside its chunk.
class Walk {
 public:
  Walk(const Matrix& m, size_t row) : m_(m) {
    const size_t block = (m.skip + row * m.columns) / BLOCK;
    enter(block / CHUNK_BLOCKS);
    pass(block % CHUNK_BLOCKS);
  }

  // The next row; every block of it is passed.
  Row next() {
    if (!row_.left) enter(row_.chunk + 1);
    const Row row = row_;
    pass(m_.columns / BLOCK);
    return row;
  }

  Result result() const { return {fault_, m_.number + u32(row_.chunk)}; }
  // Whether 64 bytes can be read from any escape that was passed.
  bool has_room() const { return has_room_; }

 private:
  static constexpr size_t CHUNK_BLOCKS = CHUNK_ELEMENTS / BLOCK;

  void enter(size_t index) {
    if (fault_ != Fault::NONE) return;
    fault_ = m_.open(index, chunk_);
    if (fault_ == Fault::NONE && chunk_.elements % BLOCK) fault_ = Fault::REST;
    if (fault_ != Fault::NONE) {
      row_.chunk = index;
      return;
    }
    row_ = Row(chunk_, index);
    if (!row_.is_raw() && size_t(chunk_.planes.readable - chunk_.planes.end) < 64) has_room_ = false;
  }

  void pass(size_t blocks) {
    while (blocks && fault_ == Fault::NONE) {
      if (!row_.left) {
        enter(row_.chunk + 1);
        continue;
      }
      const size_t count = std::min(blocks, row_.left);
      if (!row_.is_raw()) {
        const size_t escapes = count_escapes(row_.codes, count);
        const size_t there = size_t(chunk_.planes.end - row_.escapes);
        // As in `decode`, nothing may be left of a chunk that was read to its end.
        if (count == row_.left ? escapes != there : escapes > there) fault_ = Fault::ESCAPES;
        row_.escapes += escapes;
      }
      row_.advance(count);
      blocks -= count;
    }
  }

  const Matrix& m_;
  Chunk chunk_{};
  Row row_{};
  Fault fault_ = Fault::NONE;
  bool has_room_ = true;
};

// 64 columns of 16 rows: part[i][r] has columns 8i to 8i + 7 of rows r, r + 4, r + 8 and r + 12.
struct alignas(64) Tile {
  u8 part[8][4][64];
};

// Lanes of 128 bits turned: lane r of v[c] becomes lane c of v[r].
inline void turn_lanes(__m512i v[4]) {
  const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
  const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
  v[0] = _mm512_shuffle_i32x4(a, c, 0x88), v[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
  v[2] = _mm512_shuffle_i32x4(b, d, 0x88), v[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

// Exponents, and signs with mantissas, of 64 elements that were not packed.
inline void split(const u8* words, __m512i& exponent, __m512i& rest) {
  const __m512i first = load64(words), second = load64(words + 64);
  const auto bytes = [](__m512i a, __m512i b) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm512_cvtepi16_epi8(a)), _mm512_cvtepi16_epi8(b), 1);
  };
  exponent = bytes(_mm512_srli_epi16(first, 7), _mm512_srli_epi16(second, 7));
  const __m512i high = bytes(_mm512_srli_epi16(first, 8), _mm512_srli_epi16(second, 8));
  rest = _mm512_ternarylogic_epi64(_mm512_set1_epi8(char(0x80)), high, bytes(first, second), 0xCA);
}

// Block number `block`, from where the rows are, of rows[0], [4], [8] and [12], as part[...][r] of a tile.
inline void unpack_four(Row* rows, size_t block, bool has_room, u8 (*part)[4][64], size_t r) {
  __m512i exponent[4], rest[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Row& row = rows[4 * i];
    if (row.is_raw()) {
      split(row.rest + 2 * BLOCK * block, exponent[i], rest[i]);
      continue;
    }
    exponent[i] = exponents(_mm512_set1_epi32(int(row.base)), row.codes + CODE_BYTES * block, row.escapes, has_room);
    rest[i] = load64(row.rest + BLOCK * block);
  }
  turn_lanes(exponent), turn_lanes(rest);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const Halves halves = join(exponent[i], rest[i]);
    _mm512_store_si512(part[2 * i][r], halves.first);
    _mm512_store_si512(part[2 * i + 1][r], halves.second);
  }
}

// Eight columns of 16 rows.
template <class Sums>
inline void add_part(const u8 (&part)[4][64], size_t offset, Sums& sums) {
  const __m512i a = _mm512_unpacklo_epi32(load64(part[0]), load64(part[1]));
  const __m512i b = _mm512_unpackhi_epi32(load64(part[0]), load64(part[1]));
  const __m512i c = _mm512_unpacklo_epi32(load64(part[2]), load64(part[3]));
  const __m512i d = _mm512_unpackhi_epi32(load64(part[2]), load64(part[3]));
  sums.add(_mm512_unpacklo_epi64(a, c), offset);
  sums.add(_mm512_unpackhi_epi64(a, c), offset + 4);
  sums.add(_mm512_unpacklo_epi64(b, d), offset + 8);
  sums.add(_mm512_unpackhi_epi64(b, d), offset + 12);
}

// The 16 rows from `row` on, of which there are `count`, with some tokens, from `token` on.
template <class Sums>
void dot(const Product& p, const Matrix& m, Row (&rows)[GROUP_ROWS], bool has_room, Ahead& ahead, Sums& sums,
         size_t token, size_t row, size_t count) {
  Tile tiles[2];
  size_t block = 0, same = 0;  // blocks behind where `rows` point, and how many of them there are in every row's chunk
  for (size_t column = 0; column < p.columns; column += BLOCK, ++block) {
    if (block == same) {
      same = ~size_t{0};
      for (Row& of : rows) {
        of.advance(block);
        if (!of.left) {
          Chunk chunk;
          m.open(of.chunk + 1, chunk);  // as it was by the walk
          of = Row(chunk, of.chunk + 1);
        }
        same = std::min(same, of.left);
      }
      block = 0;
    }
    Tile &tile = tiles[column / BLOCK % 2], &before = tiles[column / BLOCK % 2 ^ 1];
    for (size_t r = 0; r < 4; ++r) {
      unpack_four(rows + r, block, has_room, tile.part, r);
      ahead.fetch<6>(FOUR_BLOCKS_BYTES);
      if (!column) continue;
      add_part(before.part[2 * r], (column - BLOCK + 16 * r) * 2, sums);
      add_part(before.part[2 * r + 1], (column - BLOCK + 16 * r + 8) * 2, sums);
    }
    if (column && column % p.block == 0) sums.add_up(column == p.block);
  }
  const Tile& last = tiles[(p.columns / BLOCK - 1) % 2];
  for (size_t i = 0; i < 8; ++i) add_part(last.part[i], (p.columns - BLOCK + 8 * i) * 2, sums);
  sums.add_up(p.columns <= p.block);
  for (size_t t = 0; t < sums.tokens(); ++t) write_sums(p, sums.total(t), token + t, row, count);
}

}  // namespace

Result multiply(const Product& p, const Matrix& m, unsigned threads) {
  const size_t tile = tile_rows(m.columns);
  return over_tiles(0, m.rows, tile, threads, [&](size_t from, size_t to, size_t next) -> Result {
    const size_t chunk = std::min((m.skip + std::min(next, m.rows - 1) * m.columns) / CHUNK_ELEMENTS, m.num_places - 1);
    Ahead ahead{m.chunks + (m.places[chunk] - m.places[0])};
    if (Interleaved rows; find_interleaved(m, from, to, rows)) {
      for (size_t row = from; row < to; row += GROUP_ROWS)
        if (!multiply_group(p, rows, ahead, row)) return {Fault::ESCAPES, m.number};
      return {Fault::NONE, 0};
    }
    Walk walk(m, from);
    for (size_t row = from; row < to; row += GROUP_ROWS) {
      const size_t count = std::min(GROUP_ROWS, to - row);
      Row begin[GROUP_ROWS];
      for (size_t i = 0; i < GROUP_ROWS; ++i) begin[i] = i < count ? walk.next() : begin[i - 1];
      if (const Result result = walk.result(); result.fault != Fault::NONE) return result;
      by_tokens(p, [&](auto& sums, size_t first) {
        Row rows[GROUP_ROWS];
        std::copy(begin, begin + GROUP_ROWS, rows);
        dot(p, m, rows, walk.has_room(), ahead, sums, first, row, count);
      });
    }
    return {Fault::NONE, 0};
  });
}

HERMES_TARGET_END
#else

Result multiply(const Product&, const Matrix& m, unsigned) { return {Fault::ENCODING, m.number}; }

#endif
}  // namespace hermes
