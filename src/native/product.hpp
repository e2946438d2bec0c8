// Products with bf16 matrices. Packed rows are unpacked into a core's own cache and multiplied there, never stored.
#pragma once

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
};

inline constexpr size_t GROUP_ROWS = 16;          // multiplied at once
inline constexpr size_t TILE_BYTES = 512 * 1024;  // of a core's second-level cache
// Rows that a thread unpacks at a time: groups whose chunks are their own where the columns allow it, in `TILE_BYTES`.
size_t tile_rows(size_t columns);
// What `multiply` needs to work in with packed rows, for so many threads.
constexpr size_t scratch_bytes(size_t tile_rows, size_t columns, size_t threads) {
  return threads * (tile_rows * columns * 2 + 64);
}

// True where `multiply` can be used at all: bf16 dot products in 512 bits.
bool can_multiply();

// Rows [begin, end) as they are unpacked, to `target`, on several threads; a fault of one of them, or none.
Result unpack_rows(const Matrix& m, size_t begin, size_t end, u8* target, unsigned threads);

// Where tokens are, and what becomes of them: y[t][r] = bf16(sum over c of x[t][c] * row r[c], plus bias[r]). bf16
// products, summed in pairs of columns in order in float32, from nothing again for each `block` columns, these sums in
// order. Columns and `block` are multiples of 32. `bias` may be null. `y` has `y_stride` elements from a token to the next.
struct Product {
  const u8* x;
  size_t tokens, columns;
  const u8* bias;
  size_t block;
  u8* y;
  size_t y_stride;
};

// With `rows` unpacked rows of bf16 at `weights`, a multiple of GROUP_ROWS.
void multiply(const Product& p, const u8* weights, size_t rows, unsigned threads);
// With packed ones.
Result multiply(const Product& p, const Matrix& m, u8* scratch, unsigned threads);

}  // namespace hermes
