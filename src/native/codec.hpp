// The packed layout (docs/format.md) as every instruction set sees it. checkpoint/codec.py is the reference.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

static_assert(std::endian::native == std::endian::little, "planes are read as they lie in the file");

namespace hermes {

using u8 = std::uint8_t;
using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = std::uint64_t;
using std::size_t;

enum Encoding : u8 { RAW, BF16, F16, F32, F32_AS_BF16, F32_AS_F16, NUM_ENCODINGS };

inline constexpr size_t CHUNK_ELEMENTS = 32768;
inline constexpr size_t BLOCK = 64;  // elements
inline constexpr size_t HEADER_BYTES = 24;
inline constexpr size_t CHECKED_FROM = 8;
inline constexpr size_t CODE_BYTES = 24;  // of a block: three words of 64 bits
inline constexpr size_t STREAM_BYTES = 1024 * 1024;  // decoded at once: as much as a second-level cache
inline constexpr u64 GOLDEN = 0x9E3779B97F4A7C15;

constexpr size_t bit_planes(Encoding e) { return e == F16 || e == F32_AS_F16 ? 3 : 0; }
constexpr size_t low_bytes(Encoding e) { return e == F32 ? 2 * BLOCK : 0; }
constexpr size_t item_bytes(Encoding e) { return e == BF16 || e == F16 ? 2 : 4; }
constexpr unsigned largest_base(Encoding e) { return (e == F16 ? 31 : 255) - 7; }
constexpr size_t fixed_bytes(Encoding e, size_t elements) {
  return (elements + BLOCK - 1) / BLOCK * (CODE_BYTES + 8 * bit_planes(e) + BLOCK + low_bytes(e));
}

template <class T>
inline T load(const u8* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class T>
inline void store(u8* to, T value) {
  std::memcpy(to, &value, sizeof value);
}

// What one word adds to the checksum.
inline u64 term(u64 word, u64 key) { return u64(u32(word) + u32(key)) * u32(u32(word >> 32) + u32(key >> 32)); }

// Which elements of a block have no code but an escape: those of which all three bits are set.
inline u64 escaped_in(const u8* codes) { return load<u64>(codes) & load<u64>(codes + 8) & load<u64>(codes + 16); }

// Where the planes of one chunk begin. `escapes` moves on as blocks are decoded in order, up to `end`; what lies behind
// may be read, up to `readable`, and the next chunk's planes are `ahead` of these. With `streams`, what is decoded is
// more than caches keep, and had better go around them.
struct Planes {
  const u8 *codes, *bits, *rest, *low, *escapes, *end, *readable;
  size_t ahead;
  u8 base;
  bool streams;

  u64 escaped(size_t block) const { return escaped_in(codes + CODE_BYTES * block); }
};

// One element from its exponent: what vector paths do for those that escaped, and the portable one for all.
template <Encoding E>
inline auto element(const Planes& p, size_t block, size_t lane, u8 exponent) {
  const u8 rest = p.rest[BLOCK * block + lane];
  const auto bit = [&](size_t plane) -> u32 { return p.bits[24 * block + 8 * plane + lane / 8] >> lane % 8 & 1; };
  if constexpr (E == F16) {
    return u16((exponent << 2 & 0x7C | bit(0) | bit(1) << 1 | bit(2) << 7) << 8 | rest);
  } else {
    const u32 top = (rest & 0x80) << 8 | exponent << 7 | (rest & 0x7F);
    if constexpr (E == BF16) return u16(top);
    if constexpr (E == F32) return top << 16 | load<u16>(p.low + 2 * (BLOCK * block + lane));
    if constexpr (E == F32_AS_BF16) return top << 16;
    if constexpr (E == F32_AS_F16) return top << 16 | bit(0) << 13 | bit(1) << 14 | bit(2) << 15;
  }
}

// Writes the escaped elements of a block over what was written for them. False when escapes run out.
template <Encoding E>
inline bool patch(Planes& p, size_t block, u8* out) {
  for (u64 escaped = p.escaped(block); escaped; escaped &= escaped - 1) {
    if (p.escapes == p.end) return false;
    const size_t lane = std::countr_zero(escaped);
    const auto word = element<E>(p, block, lane, *p.escapes++);
    store(out + sizeof word * lane, word);
  }
  return true;
}

// Decodes whole blocks [first, first + count) to `out`, wherever that lies. False when escapes run out.
using Kernel = bool (*)(Planes&, size_t first, size_t count, u8* out);

// One way of doing it. All give the same bytes; `kernels[RAW]` is null.
struct Path {
  const char* name;
  bool (*is_supported)();
  Kernel kernels[NUM_ENCODINGS];
  u64 (*sum)(const u8* data, size_t nbytes);  // of `checksum`, whole words only
};

// Functions between the two are compiled for these extensions, whatever the compiler was told.
#if defined(__clang__)
#define HERMES_TARGET_BEGIN(FEATURES) \
  HERMES_PRAGMA(clang attribute push(__attribute__((target(FEATURES))), apply_to = function))
#define HERMES_TARGET_END HERMES_PRAGMA(clang attribute pop)
#else
#define HERMES_TARGET_BEGIN(FEATURES) HERMES_PRAGMA(GCC push_options) HERMES_PRAGMA(GCC target(FEATURES))
#define HERMES_TARGET_END HERMES_PRAGMA(GCC pop_options)
#endif
#define HERMES_PRAGMA(TEXT) _Pragma(#TEXT)

#define HERMES_PATH(NAME, SUPPORTED)                                                                            \
  extern const Path NAME##_path;                                                                                \
  const Path NAME##_path = {#NAME, SUPPORTED, {nullptr, kernel<BF16>, kernel<F16>, kernel<F32>,                 \
                            kernel<F32_AS_BF16>, kernel<F32_AS_F16>}, sum}

// Best first, the portable one last; the null pointer ends it. Those that this processor lacks are in it, too.
extern const Path* const paths[];
const Path& best_path();

u64 checksum(const Path& path, const u8* data, size_t nbytes);

enum class Fault { NONE, TRUNCATED, HEADER, ENCODING, CHECKSUM, ESCAPES, REST };

struct Result {
  Fault fault;
  u32 chunk;
};

// A chunk whose planes lie within it. A raw one has none: its elements are the payload.
struct Chunk {
  Encoding encoding;
  size_t elements, bytes;
  const u8* payload;
  Planes planes;
};

// The chunk at `source`, of which so many bytes may be read. Everything is checked but its checksum and its escapes.
Fault open_chunk(const u8* source, size_t source_bytes, size_t item, u32 number, Chunk& chunk);

// Decodes consecutive chunks, of which the first has number `number`, from their element `skip` on, until `target` is
// full. Source and target must not overlap. Every chunk that is touched is checked whole, but for its checksum where
// that `is_checked`. No byte outside the two is read or written, whatever the source holds. Nothing is allocated.
Result decode(const Path& path, const u8* source, size_t source_bytes, u8* target, size_t target_bytes,
              size_t item, u32 number, size_t skip, bool is_checked = false);

// Compares the checksums of consecutive chunks that fill the source.
Result check(const Path& path, const u8* source, size_t source_bytes, u32 number);

// The largest chunk of so many elements, and the chunk that holds these: its size. `out` has room for the largest.
constexpr size_t largest_chunk(size_t elements, size_t item) {
  return HEADER_BYTES + elements * (item + 1) + 8 * BLOCK;
}
size_t encode(const u8* source, size_t elements, size_t item, const Encoding* choices, u32 number, u8* out);

}  // namespace hermes
