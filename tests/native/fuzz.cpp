// Looks for reads and writes out of bounds, undefined behaviour and disagreement in the decoders (`make fuzz`).
//
// Input is cut into a header, payload and a range to decode; the checksum is made right, so that the checks behind it
// are reached. Buffers are exactly as large as they may be, for AddressSanitizer to see the byte after. With libFuzzer
// (clang) it is a target; with any other compiler it makes its own inputs for the seconds it is given.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "../../src/native/product.hpp"

using namespace hermes;

namespace {

void require(bool holds, const char* what) {
  if (!holds) {
    std::fprintf(stderr, "%s\n", what);
    std::abort();
  }
}

struct Exact {  // on the heap, without a spare byte
  explicit Exact(const std::vector<u8>& from) : bytes(new u8[from.size()]), size(from.size()) {
    std::copy(from.begin(), from.end(), bytes.get());
  }
  explicit Exact(size_t size) : bytes(new u8[size]()), size(size) {}
  std::unique_ptr<u8[]> bytes;
  size_t size;
};

// Every supported path must come to the same end, and to the same bytes where that is a good one.
void decode_everywhere(const std::vector<u8>& chunks, size_t target_bytes, size_t item, u32 number, size_t skip,
                       const u8* expected) {
  const Exact source(chunks);
  bool first = true;
  Result agreed{};
  std::vector<u8> bytes;
  for (const Path* const* path = paths; *path; ++path) {
    if (!(*path)->is_supported()) continue;
    Exact target(target_bytes);
    const Result result =
        decode(**path, source.bytes.get(), source.size, target.bytes.get(), target.size, item, number, skip);
    if (first) {
      agreed = result;
      bytes.assign(target.bytes.get(), target.bytes.get() + target.size);
      first = false;
    }
    require(result.fault == agreed.fault && result.chunk == agreed.chunk, "paths disagree on the fault");
    require(result.fault != Fault::NONE || std::equal(bytes.begin(), bytes.end(), target.bytes.get()),
            "paths disagree on the bytes");
  }
  // What was checked before is decoded without its checksum, and must be no less safe.
  const bool is_right = check(best_path(), source.bytes.get(), source.size, number).fault == Fault::NONE;
  Exact target(target_bytes);
  const Result unchecked =
      decode(best_path(), source.bytes.get(), source.size, target.bytes.get(), target.size, item, number, skip, true);
  require(!is_right || (unchecked.fault == agreed.fault && unchecked.chunk == agreed.chunk), "a checksum matters twice");
  require(agreed.fault != Fault::NONE || std::equal(bytes.begin(), bytes.end(), target.bytes.get()),
          "the bytes depend on the checksum");
  if (expected) {
    require(agreed.fault == Fault::NONE, "a good chunk was refused");
    require(std::equal(bytes.begin(), bytes.end(), expected), "a good chunk came out wrong");
  }
}

const Encoding choices_of[][4] = {{BF16, RAW}, {F16, RAW}, {F32_AS_BF16, F32_AS_F16, F32, RAW}, {RAW}};

// Packed rows as they lie there: multiplied where they can be unpacked, to what their unpacked ones give, else refused.
void multiply_packed(const std::vector<u8>& chunks, const std::vector<i64>& places, size_t skip, size_t rows,
                     size_t columns, size_t tokens) {
  if (!can_multiply() || !rows) return;
  const Exact source(chunks), x(tokens * columns * 2), y(tokens * rows * 2);
  for (size_t i = 0; i < x.size; ++i) x.bytes[i] = u8(i * 37 % 64);  // small numbers and none that are none
  const Matrix m{source.bytes.get(), source.size, places.data(), places.size(), 5, skip, rows, columns};
  const Product p{x.bytes.get(), tokens, columns, nullptr, 64 * (1 + tokens % 3), y.bytes.get(), rows, 0,
                  can_multiply_tiles() && tokens % 4 != 1};
  const Result result = multiply(p, m, 1 + tokens % 2);
  const size_t padded = (rows + GROUP_ROWS - 1) / GROUP_ROWS * GROUP_ROWS;
  const Exact weights(padded * columns * 2), expected(tokens * padded * 2);
  const Result unpacked = unpack_rows(m, 0, rows, weights.bytes.get(), 1);
  require((result.fault == Fault::NONE) == (unpacked.fault == Fault::NONE), "a product where there is no matrix");
  if (result.fault != Fault::NONE) return;
  Product plain = p;
  plain.y = expected.bytes.get(), plain.y_stride = padded;
  multiply(plain, weights.bytes.get(), padded, 1);
  const auto require_same = [&] {
    for (size_t t = 0; t < tokens; ++t)
      require(std::equal(y.bytes.get() + t * rows * 2, y.bytes.get() + (t + 1) * rows * 2,
                         expected.bytes.get() + t * padded * 2),
              "a product with packed rows differs");
  };
  require_same();
  // In the order of rows that stay, too; and where that is damaged, nothing outside may be touched.
  const Exact scratch(interleave_bytes(columns)), again(weights.size);
  interleave(m, source.bytes.get(), scratch.bytes.get());
  require(multiply(p, m, 1).fault == Fault::NONE && unpack_rows(m, 0, rows, again.bytes.get(), 2).fault == Fault::NONE,
          "interleaving damages");
  require_same();
  require(std::equal(weights.bytes.get(), weights.bytes.get() + rows * columns * 2, again.bytes.get()),
          "interleaved rows unpack to others");
  for (size_t i = 0; i < 8; ++i) source.bytes[i * 7919 % source.size] ^= u8(1 + i * 31);
  multiply(p, m, 1);
  unpack_rows(m, rows / 3, rows, again.bytes.get(), 1);
}

void one_matrix(const u8* data, size_t size) {
  const size_t columns = 64 * (1 + data[1] % 5), elements = (size - 8) / 2 / columns * columns;
  std::vector<u8> chunks(elements * 3 + 1000);
  std::vector<i64> places{0};
  size_t at = 0;
  for (size_t i = 0; i < elements; i += CHUNK_ELEMENTS) {
    const size_t count = std::min(CHUNK_ELEMENTS, elements - i);
    chunks.resize(at + largest_chunk(count, 2));
    at += encode(data + 8 + 2 * i, count, 2, choices_of[0], u32(5 + i / CHUNK_ELEMENTS), chunks.data() + at);
    places.push_back(i64(at));
  }
  chunks.resize(at);
  if (!at) return;
  if (data[2] % 2) chunks[load<u32>(data + 4) % at] ^= data[3];  // which no checksum is asked about
  const size_t skip = 64 * (data[3] % 4) % elements;
  multiply_packed(chunks, places, skip, (elements - skip) / columns, columns, 1 + data[6] % 100);
}

// float32 in exactly as large buffers as they may be, with what one column after the other gives.
void multiply_some_floats(const u8* data, size_t size) {
  if (!can_multiply_floats()) return;
  const size_t tokens = 1 + load<u16>(data + 2) % 300, rows = 1 + data[4] % 60, columns = 1 + load<u16>(data + 5) % 700;
  const size_t block = 1 + load<u16>(data + 1) % FLOAT_MOST_BLOCK, part = 1 + load<u16>(data + 3) % 1000;
  const auto some = [&](size_t count, size_t from) {
    Exact numbers(count * 4);
    for (size_t i = 0; i < count; ++i)
      store(numbers.bytes.get() + 4 * i, float(data[(from + i * 13) % size]) / 64 - 2);
    return numbers;
  };
  const Exact x = some(tokens * columns, 0), weights = some(rows * columns, 5), bias = some(rows, 9);
  const unsigned threads = 1 + data[7] % 3;
  const Exact y(tokens * rows * 4), scratch(float_scratch_bytes(tokens, columns));
  const u8* given = data[7] % 2 ? bias.bytes.get() : nullptr;
  const size_t first = rows / 2;  // the others by themselves, with the tokens as they were turned for these
  for (const size_t from : {size_t(0), first}) {
    const size_t count = from ? rows - first : first ? first : rows;
    const Product p{x.bytes.get(), tokens, columns, given ? given + 4 * from : nullptr, block, y.bytes.get() + 4 * from,
                    rows, part};
    multiply_floats(p, weights.bytes.get() + 4 * from * columns, count, scratch.bytes.get(), from > 0, threads);
  }
  for (size_t t = 0; t < tokens; t += 1 + t / 8)
    for (size_t r = 0; r < rows; ++r) {
      float total = given ? load<float>(given + 4 * r) : 0;
      for (size_t begin = 0; begin < columns; begin += part) {
        float of_part = begin ? 0 : total;
        for (size_t from = begin; from < std::min(begin + part, columns); from += block) {
          float sum = 0;
          for (size_t c = from; c < std::min({from + block, begin + part, columns}); ++c)
            sum = std::fma(load<float>(x.bytes.get() + 4 * (t * columns + c)),
                           load<float>(weights.bytes.get() + 4 * (r * columns + c)), sum);
          of_part = from > begin || (given && !begin) ? of_part + sum : sum;
        }
        total = begin ? total + of_part : of_part;
      }
      require(load<u32>(y.bytes.get() + 4 * (t * rows + r)) == std::bit_cast<u32>(total), "a product of floats differs");
    }
}

// One token, with rows and with the turned matrix that has the same numbers; in places that begin anywhere.
void multiply_one_token(const u8* data, size_t size) {
  if (!can_multiply_floats()) return;
  const size_t rows = 1 + load<u16>(data + 2) % 3000, columns = 4 * (1 + load<u16>(data + 4) % 60), head = 1 + data[6] % 4;
  const Exact x(4 * std::max(rows, columns)), weights(4 * rows * columns), bias(x.size), y(4 * rows), turned(4 * columns);
  const auto fill = [&](const Exact& numbers) {
    for (size_t i = 0; i < numbers.size / 4; ++i)
      store(numbers.bytes.get() + 4 * i, float(data[(i * 7 + numbers.size) % size]) / 64 - 2);
  };
  fill(x), fill(weights), fill(bias);
  const auto number = [](const Exact& from, size_t i) { return load<float>(from.bytes.get() + 4 * i); };
  const unsigned threads = 1 + data[7] % 3;
  multiply_float_token({x.bytes.get(), 1, columns, nullptr, columns, y.bytes.get(), rows}, weights.bytes.get(), rows, head,
                       threads);
  const Product p{x.bytes.get(), 1, rows, bias.bytes.get(), 1, turned.bytes.get(), columns};
  if (rows % 8 == 0) multiply_float_columns(p, weights.bytes.get(), columns, true, threads);  // within bounds at least
  multiply_float_columns(p, weights.bytes.get(), columns, false, threads);
  for (size_t r = 0; r < rows; r += 1 + r / 16) {
    volatile float product, lanes[4] = {};  // volatile: no product is added before it is rounded
    const size_t main = head + (columns - head) / 4 * 4;
    for (size_t c = 0; c < main; ++c) {
      product = number(x, c) * number(weights, r * columns + c);
      lanes[c < head ? 0 : (c - head) % 4] = lanes[c < head ? 0 : (c - head) % 4] + product;
    }
    const float even = lanes[0] + lanes[2], odd = lanes[1] + lanes[3];
    volatile float total = even + odd;
    for (size_t c = main; c < columns; ++c) {
      product = number(x, c) * number(weights, r * columns + c);
      total = total + product;
    }
    require(number(y, r) == total, "a product of one token differs");
  }
  for (size_t c = 0; c < columns; ++c) {
    volatile float product, total = number(bias, c);
    for (size_t r = 0; r < rows; ++r) {
      product = number(x, r) * number(weights, r * columns + c);
      total = total + product;
    }
    require(number(turned, c) == total, "a product with a turned matrix differs");
  }
}

void seal(std::vector<u8>& chunk) {
  if (chunk.size() >= HEADER_BYTES)
    store(chunk.data(), checksum(best_path(), chunk.data() + CHECKED_FROM, chunk.size() - CHECKED_FROM));
}

constexpr size_t items[] = {2, 2, 4, 8};

void one_input(const u8* data, size_t size) {
  if (size < 8) return;
  if (data[0] % 8 == 7) return one_matrix(data, size);
  if (data[0] % 64 == 6) return multiply_some_floats(data, size);
  if (data[0] % 64 == 14) return multiply_one_token(data, size);
  const u8 kind = data[0] % 4, how = data[1];
  const size_t item = items[kind], skip = load<u16>(data + 2) % 600, wanted = load<u16>(data + 4) % 600;
  std::vector<u8> content(data + 8, data + size);
  if (how % 4 == 0) {  // as a header and payload, as they come
    std::vector<u8> chunk(HEADER_BYTES);
    chunk[8] = data[6];
    chunk[9] = data[7];
    const u32 elements = u32(wanted + how / 4), payload = u32(content.size());
    store(chunk.data() + 16, elements);
    store(chunk.data() + 20, payload);
    chunk.insert(chunk.end(), content.begin(), content.end());
    seal(chunk);
    decode_everywhere(chunk, wanted * item, item, 0, skip, nullptr);
    return;
  }
  content.resize(std::min(content.size() / item, CHUNK_ELEMENTS) * item);
  const size_t elements = content.size() / item;
  if (!elements) return;
  std::vector<u8> chunk(largest_chunk(elements, item));
  chunk.resize(encode(content.data(), elements, item, choices_of[kind], 5, chunk.data()));
  const size_t begin = skip % elements, count = 1 + wanted % (elements - begin);
  decode_everywhere(chunk, count * item, item, 5, begin, content.data() + begin * item);
  const size_t place = load<u32>(data + 4) % chunk.size();
  if (how % 4 == 1) {  // damaged without the checksum's knowledge: always found
    chunk[place] ^= data[6] | 1;
    for (const Path* const* path = paths; *path; ++path)
      if ((*path)->is_supported()) {
        std::vector<u8> target(elements * item);
        require(decode(**path, chunk.data(), chunk.size(), target.data(), target.size(), item, 5, 0).fault != Fault::NONE,
                "a damaged chunk was not noticed");
      }
  } else if (how % 4 == 2) {  // with it
    chunk[place] ^= data[6];
    seal(chunk);
    decode_everywhere(chunk, elements * item, item, 5, 0, nullptr);
  } else {  // cut short
    chunk.resize(place);
    seal(chunk);
    decode_everywhere(chunk, elements * item, item, 5, 0, nullptr);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const u8* data, size_t size) {
  one_input(data, size);
  return 0;
}

#ifndef HERMES_LIBFUZZER
int main(int argc, char** argv) {
  const double seconds = argc > 1 ? std::atof(argv[1]) : 10.0;
  std::mt19937_64 rng(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
  const auto start = std::chrono::steady_clock::now();
  size_t runs = 0;
  while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
    std::vector<u8> data(8 + rng() % (runs % 16 ? 2000 : 140000));
    const unsigned spread = unsigned(rng() % 3);  // of the bits: all of them, few exponents, almost none
    for (size_t i = 0; i < data.size(); ++i) data[i] = u8(spread == 2 ? rng() % 50 == 0 : rng());
    if (spread == 1)
      for (size_t i = 9; i < data.size(); i += 2) data[i] = u8(0x3C | (data[i] & 0x81));
    for (size_t i = 0; i < 8; ++i) data[i] = u8(rng());
    if (data[1] % 4 == 0) data[6] %= NUM_ENCODINGS + 1;
    one_input(data.data(), data.size());
    ++runs;
  }
  std::printf("%zu inputs;", runs);
  for (const Path* const* path = paths; *path; ++path)
    if ((*path)->is_supported()) std::printf(" %s", (*path)->name);
  std::printf(": no fault found\n");
}
#endif
