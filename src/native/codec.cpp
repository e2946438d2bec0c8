// What no instruction set has a say in: the walk over chunks, every check, and the encoder.
#include "codec.hpp"

#include <algorithm>
#include <type_traits>

namespace hermes {

#if defined(__x86_64__)
extern const Path avx512_path, avx2_path;
#elif defined(__aarch64__)
extern const Path neon_path;
#endif
extern const Path portable_path;

const Path* const paths[] = {
#if defined(__x86_64__)
    &avx512_path, &avx2_path,
#elif defined(__aarch64__)
    &neon_path,
#endif
    &portable_path, nullptr};

const Path& best_path() {
  static const Path& best = [&]() -> const Path& {
    const Path* const* path = paths;
    while (!(*path)->is_supported()) ++path;
    return **path;
  }();
  return best;
}

u64 checksum(const Path& path, const u8* data, size_t nbytes) {
  const size_t whole = nbytes / 8 * 8;
  u64 total = path.sum(data, whole) + nbytes * GOLDEN;
  if (whole < nbytes) {
    u64 word = 0;
    std::memcpy(&word, data + whole, nbytes - whole);
    total += term(word, (whole / 8 + 1) * GOLDEN);
  }
  return total;
}

namespace {

struct Header {
  u64 sum;
  u8 encoding, base;
  u16 zero;
  u32 number, elements, payload_bytes;
};
static_assert(sizeof(Header) == HEADER_BYTES);

Planes planes_of(Encoding e, const Header& header, const u8* payload) {
  const size_t blocks = (header.elements + BLOCK - 1) / BLOCK;
  Planes p;
  p.codes = payload;
  p.bits = p.codes + CODE_BYTES * blocks;
  p.rest = p.bits + 8 * bit_planes(e) * blocks;
  p.low = p.rest + BLOCK * blocks;
  p.escapes = p.low + low_bytes(e) * blocks;
  p.readable = p.end = payload + header.payload_bytes;
  p.ahead = HEADER_BYTES + header.payload_bytes;
  p.base = header.base;
  p.streams = false;
  return p;
}

// Part of a block: decoded aside, then copied.
bool partial(Kernel kernel, Planes& p, size_t block, size_t item, size_t from, size_t count, u8* out) {
  u8 aside[BLOCK * 4];
  if (!kernel(p, block, 1, aside)) return false;
  std::memcpy(out, aside + from * item, count * item);
  return true;
}

// Elements [begin, end) of one chunk, whose header and checksum are right.
bool decode_range(Kernel kernel, Planes p, size_t elements, size_t item, size_t begin, size_t end, u8* out) {
  size_t block = begin / BLOCK;
  for (size_t before = 0; before < block; ++before) {
    const size_t escapes = size_t(std::popcount(p.escaped(before)));
    if (size_t(p.end - p.escapes) < escapes) return false;
    p.escapes += escapes;
  }
  if (begin % BLOCK) {
    const size_t count = std::min(end, (block + 1) * BLOCK) - begin;
    if (!partial(kernel, p, block++, item, begin % BLOCK, count, out)) return false;
    out += count * item;
  }
  if (const size_t whole = end / BLOCK; whole > block) {
    if (!kernel(p, block, whole - block, out)) return false;
    out += (whole - block) * BLOCK * item;
    block = whole;
  }
  if (block * BLOCK < end && !partial(kernel, p, block, item, 0, end - block * BLOCK, out)) return false;
  if (end < elements) return true;
  // Of a chunk that was decoded to its end, nothing may be left, and what fills up its last block is no escape.
  return p.escapes == p.end && (elements % BLOCK == 0 || p.escaped(elements / BLOCK) >> elements % BLOCK == 0);
}

}  // namespace

Fault open_chunk(const u8* source, size_t source_bytes, size_t item, u32 number, Chunk& chunk) {
  if (source_bytes < HEADER_BYTES) return Fault::TRUNCATED;
  const auto header = load<Header>(source);
  const auto e = Encoding(header.encoding);
  if (header.encoding >= NUM_ENCODINGS || header.zero || header.number != number || header.elements == 0 ||
      header.elements > CHUNK_ELEMENTS)
    return Fault::HEADER;
  if (e == RAW ? header.base || header.payload_bytes != header.elements * item
               : item == item_bytes(e) && (header.base > largest_base(e) ||
                                           header.payload_bytes < fixed_bytes(e, header.elements)))
    return Fault::HEADER;
  if (e != RAW && item != item_bytes(e)) return Fault::ENCODING;
  chunk = {e, header.elements, HEADER_BYTES + size_t{header.payload_bytes}, source + HEADER_BYTES, {}};
  if (source_bytes < chunk.bytes) return Fault::TRUNCATED;
  if (e != RAW) chunk.planes = planes_of(e, header, chunk.payload);
  chunk.planes.readable = source + source_bytes;
  return Fault::NONE;
}

Result decode(const Path& path, const u8* source, size_t source_bytes, u8* target, size_t target_bytes, size_t item,
              u32 number, size_t skip, bool is_checked) {
  if (item == 0 || target_bytes % item) return {Fault::REST, number};
  const bool streams = target_bytes >= STREAM_BYTES;
  for (; target_bytes; ++number, skip = 0) {
    Chunk chunk;
    if (const Fault fault = open_chunk(source, source_bytes, item, number, chunk); fault != Fault::NONE)
      return {fault, number};
    if (!is_checked && checksum(path, source + CHECKED_FROM, chunk.bytes - CHECKED_FROM) != load<u64>(source))
      return {Fault::CHECKSUM, number};
    if (skip >= chunk.elements) return {Fault::REST, number};
    chunk.planes.streams = streams;
    const size_t end = std::min<size_t>(chunk.elements, skip + target_bytes / item);
    if (chunk.encoding == RAW)
      std::memcpy(target, chunk.payload + skip * item, (end - skip) * item);
    else if (!decode_range(path.kernels[chunk.encoding], chunk.planes, chunk.elements, item, skip, end, target))
      return {Fault::ESCAPES, number};
    target += (end - skip) * item;
    target_bytes -= (end - skip) * item;
    source += chunk.bytes;
    source_bytes -= chunk.bytes;
  }
  return {Fault::NONE, number};
}

Result check(const Path& path, const u8* source, size_t source_bytes, u32 number) {
  for (; source_bytes; ++number) {
    if (source_bytes < HEADER_BYTES) return {Fault::TRUNCATED, number};
    const auto header = load<Header>(source);
    const size_t chunk_bytes = HEADER_BYTES + size_t{header.payload_bytes};
    if (source_bytes < chunk_bytes) return {Fault::TRUNCATED, number};
    if (header.number != number || header.encoding >= NUM_ENCODINGS) return {Fault::HEADER, number};
    if (checksum(path, source + CHECKED_FROM, chunk_bytes - CHECKED_FROM) != header.sum)
      return {Fault::CHECKSUM, number};
    source += chunk_bytes;
    source_bytes -= chunk_bytes;
  }
  return {Fault::NONE, number};
}

namespace {

template <Encoding E>
bool encode_payload(const u8* source, size_t elements, Header& header, u8* payload) {
  using Word = std::conditional_t<item_bytes(E) == 2, u16, u32>;
  constexpr u32 zeros = E == F32_AS_BF16 ? 0xFFFF : E == F32_AS_F16 ? 0x1FFF : 0;
  const auto word_at = [&](size_t i) -> u32 { return load<Word>(source + i * sizeof(Word)); };
  const auto exponent = [](u32 word) { return u8(E == F16 ? word >> 10 & 31 : E == BF16 ? word >> 7 : word >> 23); };
  u32 counts[2][256] = {};  // two, so that neighbours do not wait for each other
  u32 seen = 0;
  for (size_t i = 0; i < elements; ++i) {
    const u32 word = word_at(i);
    seen |= word;
    ++counts[i % 2][exponent(word)];
  }
  if (seen & zeros) return false;
  u32 best = 0;
  for (unsigned base = 0; base <= largest_base(E); ++base) {
    u32 inside = 0;
    for (unsigned k = base; k < base + 7; ++k) inside += counts[0][k] + counts[1][k];
    if (inside > best) best = inside, header.base = u8(base);
  }
  header.encoding = E;
  header.payload_bytes = u32(fixed_bytes(E, elements) + (elements - best));
  if (header.payload_bytes >= elements * sizeof(Word)) return false;
  const Planes p = planes_of(E, header, payload);
  u8* escapes = payload + fixed_bytes(E, elements);
  std::memset(payload, 0, fixed_bytes(E, elements));
  for (size_t first = 0; first < elements; first += BLOCK) {
    u64 codes[3] = {}, bits[3] = {};
    u8* const rest = payload + (p.rest - payload) + first;
    u8* const low = payload + (p.low - payload) + 2 * first;
    for (size_t lane = 0; lane < std::min(BLOCK, elements - first); ++lane) {
      const u32 word = word_at(first + lane);
      const u8 offset = u8(exponent(word) - header.base);
      const u64 code = std::min<u8>(offset, 7);
      if (code == 7) *escapes++ = exponent(word);
      for (int k = 0; k < 3; ++k) codes[k] |= (code >> k & 1) << lane;
      if constexpr (E == F16) {
        rest[lane] = u8(word);
        bits[0] |= u64(word >> 8 & 1) << lane, bits[1] |= u64(word >> 9 & 1) << lane, bits[2] |= u64(word >> 15) << lane;
      } else {
        const u32 top = E == BF16 ? word : word >> 16;
        rest[lane] = u8(top >> 8 & 0x80 | top & 0x7F);
        if constexpr (E == F32) store(low + 2 * lane, u16(word));
        if constexpr (E == F32_AS_F16)
          for (int k = 0; k < 3; ++k) bits[k] |= u64(word >> (13 + k) & 1) << lane;
      }
    }
    std::memcpy(payload + first / BLOCK * CODE_BYTES, codes, sizeof codes);
    if (bit_planes(E)) std::memcpy(payload + (p.bits - payload) + first / BLOCK * 24, bits, sizeof bits);
  }
  return true;
}

bool encode_as(Encoding e, const u8* source, size_t elements, Header& header, u8* payload) {
  switch (e) {
    case BF16: return encode_payload<BF16>(source, elements, header, payload);
    case F16: return encode_payload<F16>(source, elements, header, payload);
    case F32: return encode_payload<F32>(source, elements, header, payload);
    case F32_AS_BF16: return encode_payload<F32_AS_BF16>(source, elements, header, payload);
    case F32_AS_F16: return encode_payload<F32_AS_F16>(source, elements, header, payload);
    default: return false;
  }
}

}  // namespace

size_t encode(const u8* source, size_t elements, size_t item, const Encoding* choices, u32 number, u8* out) {
  Header header{};
  header.number = number;
  header.elements = u32(elements);
  u8* const payload = out + HEADER_BYTES;
  for (; *choices != RAW; ++choices)
    if (encode_as(*choices, source, elements, header, payload)) break;
  if (*choices == RAW) {
    header.encoding = RAW;
    header.base = 0;
    header.payload_bytes = u32(elements * item);
    std::memcpy(payload, source, header.payload_bytes);
  }
  store(out, header);
  header.sum = checksum(best_path(), out + CHECKED_FROM, HEADER_BYTES + header.payload_bytes - CHECKED_FROM);
  store(out, header);
  return HEADER_BYTES + header.payload_bytes;
}

}  // namespace hermes
