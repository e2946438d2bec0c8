// Products with bf16 matrices, plain ones and packed ones, which are unpacked into a core's own cache and never stored;
// and with plain float32 ones.
#pragma once

#include <algorithm>

#include "codec.hpp"

namespace hermes {

using i64 = std::int64_t;

// Rows of a packed bf16 matrix: neighbouring chunks, the first of which has number `number` and holds the first element
// at its element `skip`. Chunk i is at `places[i]` - `places[0]` of the `bytes`. Their checksums were found right.
struct Matrix {
  const u8* chunks;
  size_t bytes;
  const i64* places;
  size_t num_places;  // one more than chunks
  u32 number;
  size_t skip, rows, columns;

  // Where the chunk so many behind the first begins, after so many of the bytes; false if there is none.
  bool find(size_t index, size_t& at) const {
    if (index + 1 >= num_places) return false;
    at = size_t(places[index] - places[0]);
    return at <= bytes;
  }

  // That chunk, with every check but that of its checksum.
  Fault open(size_t index, Chunk& chunk) const {
    size_t at;
    return find(index, at) ? open_chunk(chunks + at, bytes - at, 2, number + u32(index), chunk) : Fault::TRUNCATED;
  }
};

inline constexpr size_t GROUP_ROWS = 16;          // multiplied at once
inline constexpr size_t TILE_BYTES = 512 * 1024;  // unpacked, of a core's second-level cache
// Rows that a thread does at a time: groups whose chunks are their own where the columns allow it, in `TILE_BYTES`.
size_t tile_rows(size_t columns);

// True where `multiply` can be used at all: bf16 dot products and all that unpacking uses, in 512 bits.
bool can_multiply();
// True where it can use the matrix unit; asks the system for it once.
bool can_multiply_tiles();

// Rows [begin, end) as they are unpacked, to `target`, on several threads; a fault of one of them, or none.
Result unpack_rows(const Matrix& m, size_t begin, size_t end, u8* target, unsigned threads);

// Where tokens are, and what becomes of them: y[t][r] = bf16(sum over c of x[t][c] * row r[c], plus bias[r]). bf16
// products, summed in pairs of columns in order in float32, from nothing again for each `block` columns, these sums in
// order. `bias` may be null. `y` has `y_stride` elements from a token to the next.
struct Product {
  const u8* x;
  size_t tokens, columns;
  const u8* bias;
  size_t block;
  u8* y;
  size_t y_stride;
  size_t part = 0;  // of float32 alone: columns that are summed by themselves, before they are added to those before
  bool by_tiles = false;  // of bf16 alone: 32 columns at a time, by the matrix unit
};

inline constexpr size_t MOST_TOKENS = 8;  // with the same rows at once; more of them take turns

// With `rows` rows at `weights`, a multiple of GROUP_ROWS. Columns and `block` are multiples of 32.
void multiply(const Product& p, const u8* weights, size_t rows, unsigned threads);
// With packed rows; a fault of one of them, or none. Columns, `block` and what is skipped are multiples of 64.
Result multiply(const Product& p, const Matrix& m, unsigned threads);

// True where those with float32 can be used.
bool can_multiply_floats();
// The same of float32, x, weights, bias and y alike: each product and its addition rounded once, column after column, from
// nothing again for each `block` columns and each `part`; the bias first, then these sums in order, of each part by
// itself, then the parts. Any number of rows and columns; `block` is FLOAT_MOST_BLOCK at most. `scratch` has
// `float_scratch_bytes`; with `turned` it still holds these tokens, of a product before, where they are FLOAT_TOKENS at
// most.
void multiply_floats(const Product& p, const u8* weights, size_t rows, u8* scratch, bool turned, unsigned threads);
inline constexpr size_t FLOAT_MOST_BLOCK = 512;
inline constexpr size_t FLOAT_TOKENS = 256;  // at once; more of them take turns
inline size_t float_scratch_bytes(size_t tokens, size_t columns) {
  return (std::min(tokens, FLOAT_TOKENS) + 15) / 16 * 16 * columns * 4;
}

// One token of float32 with rows of float32, each product rounded before it is added: the first `head` columns, 1 to 4 of
// them, one after the other, on from there every fourth column in a lane, these as (0 + 2) + (1 + 3), then what is left
// over; then the bias. Columns are a multiple of four.
void multiply_float_token(const Product& p, const u8* weights, size_t rows, size_t head, unsigned threads);
// The same, each product and its addition rounded once: the first column, on from there every 16th in a lane, what is left
// over once more so; each time halves of the lanes are added, and these, until one is left. At least one column.
void multiply_float_lanes(const Product& p, const u8* weights, size_t rows, unsigned threads);
// One token with a matrix that lies turned, p.columns rows of `columns`: the bias, then row after row added to it, each
// product rounded before; or, `by_eight`, rows in eights, as (((t + 6) + 4) + (7 + 5)) + ((2 + 0) + (3 + 1)) to the
// total t, each product and its addition rounded once, where p.columns is a multiple of eight. There is a bias.
void multiply_float_columns(const Product& p, const u8* weights, size_t columns, bool by_eight, unsigned threads);

// Packed rows that stay in memory are put in the order in which products need them, where they have whole groups, chunks
// of their own and one base: `tile_rows` of them at a time, in the bytes that their chunks take. `chunks` are m's.
// `scratch` has `interleave_bytes`. What is no such rows, or is damaged, stays as it is.
void interleave(const Matrix& m, u8* chunks, u8* scratch);
inline size_t interleave_bytes(size_t columns) { return tile_rows(columns) * columns * 2; }

// Interleaved rows. Each block is four columns of a group of 16 rows, each lane of 128 bits four rows: two columns of
// each, then the other two. All codes come first, then signs with mantissas, then escapes.
struct Interleaved {
  const u8 *codes, *rest, *escapes, *end;
  u8 base;
  bool has_room;  // to read 64 bytes from any escape on
};
// Rows [from, to), dealt out together. False where they are not interleaved.
bool find_interleaved(const Matrix& m, size_t from, size_t to, Interleaved& rows);
struct Ahead;
// The next 16 rows with the tokens, their products to row `row`; moves on. False when escapes run out.
bool multiply_group(const Product& p, Interleaved& rows, Ahead& ahead, size_t row);
// The next 16 rows as they are unpacked, [skip, skip + count) of them to `target`; moves on. Likewise.
bool unpack_group(size_t columns, Interleaved& rows, size_t skip, size_t count, u8* target);

}  // namespace hermes
