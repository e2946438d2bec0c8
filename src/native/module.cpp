// The decoder for Python: buffers in, nothing allocated, the interpreter lock released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "product.hpp"

namespace nb = nanobind;
using namespace hermes;

namespace {

class Buffer {
 public:
  Buffer(nb::handle object, int flags) {
    if (PyObject_GetBuffer(object.ptr(), &view_, flags)) throw nb::python_error();
  }
  ~Buffer() { PyBuffer_Release(&view_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  u8* data() const { return static_cast<u8*>(view_.buf); }
  size_t size() const { return size_t(view_.len); }

 private:
  Py_buffer view_;
};

const Path& path_named(const std::string& name) {
  if (name.empty()) return best_path();
  for (const Path* const* path = paths; *path; ++path)
    if (name == (*path)->name && (*path)->is_supported()) return **path;
  throw nb::value_error("no such path on this processor");
}

nb::tuple decode_chunks(nb::handle source, nb::handle target, size_t item, u32 number, size_t skip,
                        const std::string& path) {
  const Path& way = path_named(path);
  const Buffer from(source, PyBUF_SIMPLE), to(target, PyBUF_WRITABLE);
  Result result;
  {
    nb::gil_scoped_release release;
    result = decode(way, from.data(), from.size(), to.data(), to.size(), item, number, skip);
  }
  return nb::make_tuple(int(result.fault), result.chunk);
}

nb::tuple check_chunks(nb::handle source, u32 number) {
  const Buffer from(source, PyBUF_SIMPLE);
  Result result;
  {
    nb::gil_scoped_release release;
    result = check(best_path(), from.data(), from.size(), number);
  }
  return nb::make_tuple(int(result.fault), result.chunk);
}

size_t encode_chunk(nb::handle source, nb::handle target, size_t item, nb::bytes encodings, u32 number) {
  const Buffer from(source, PyBUF_SIMPLE), to(target, PyBUF_WRITABLE);
  Encoding choices[NUM_ENCODINGS] = {};
  if (encodings.size() >= NUM_ENCODINGS || item == 0 || from.size() % item || from.size() / item > CHUNK_ELEMENTS ||
      to.size() < largest_chunk(from.size() / item, item))
    throw nb::value_error("sizes do not fit a chunk");
  for (size_t i = 0; i < encodings.size(); ++i) {
    choices[i] = Encoding(encodings.c_str()[i]);
    if (choices[i] == RAW || choices[i] >= NUM_ENCODINGS || item_bytes(choices[i]) != item)
      throw nb::value_error("an encoding of another dtype");
  }
  nb::gil_scoped_release release;
  return encode(from.data(), from.size() / item, item, choices, number, to.data());
}

// The addresses are the caller's word: he keeps that memory alive, and as large as the numbers say.
using Address = std::uintptr_t;
u8* at(Address address) { return reinterpret_cast<u8*>(address); }

// With the chunks' places as bytes of 64-bit numbers.
template <class Work>
nb::tuple with_matrix(Address chunks, size_t nbytes, nb::handle places, u32 number, size_t skip, size_t rows,
                      size_t columns, Work work) {
  const Buffer table(places, PyBUF_SIMPLE);
  const Matrix matrix{at(chunks), nbytes, reinterpret_cast<const i64*>(table.data()), table.size() / sizeof(i64),
                      number, skip, rows, columns};
  if (matrix.num_places == 0 || columns == 0) throw nb::value_error("an empty matrix");
  Result result;
  {
    nb::gil_scoped_release release;
    result = work(matrix);
  }
  return nb::make_tuple(int(result.fault), result.chunk);
}

Product product(Address x, size_t tokens, size_t columns, Address bias, size_t block, bool by_tiles, Address y,
                size_t y_stride, size_t step) {
  if (!can_multiply()) throw nb::value_error("no bf16 products on this processor");
  if (columns == 0 || columns % step || block == 0 || block % step)
    throw nb::value_error("columns or block are no multiple of what is multiplied at once");
  if (by_tiles && !can_multiply_tiles()) throw nb::value_error("no matrix unit on this processor");
  return {at(x), tokens, columns, at(bias), block, at(y), y_stride, 0, by_tiles};
}

void multiply_rows(Address weights, size_t rows, size_t columns, Address x, size_t tokens, Address bias, size_t block,
                   bool by_tiles, Address y, size_t y_stride, unsigned threads) {
  const Product what = product(x, tokens, columns, bias, block, by_tiles, y, y_stride, 32);
  if (rows == 0 || rows % GROUP_ROWS) throw nb::value_error("rows are no multiple of 16");
  nb::gil_scoped_release release;
  multiply(what, at(weights), rows, threads);
}

void multiply_float_rows(Address weights, size_t rows, size_t columns, Address x, size_t tokens, Address bias,
                         size_t block, size_t part, Address y, size_t y_stride, Address scratch, bool turned,
                         unsigned threads) {
  if (!can_multiply_floats()) throw nb::value_error("no float32 products on this processor");
  if (columns == 0 || block == 0 || block > FLOAT_MOST_BLOCK || part == 0)
    throw nb::value_error("no columns, or a block too large, or no part");
  const Product what{at(x), tokens, columns, at(bias), block, at(y), y_stride, part};
  nb::gil_scoped_release release;
  multiply_floats(what, at(weights), rows, at(scratch), turned, threads);
}

void multiply_one_float_token(Address weights, size_t rows, size_t columns, Address x, Address bias, size_t head,
                              Address y, unsigned threads) {
  if (!can_multiply_floats()) throw nb::value_error("no float32 products on this processor");
  if (rows == 0 || columns < 4 || columns % 4 || head == 0 || head > 4) throw nb::value_error("no such rows");
  nb::gil_scoped_release release;
  multiply_float_token({at(x), 1, columns, at(bias), columns, at(y), rows}, at(weights), rows, head, threads);
}

void multiply_lanes(Address weights, size_t rows, size_t columns, Address x, Address bias, Address y,
                    unsigned threads) {
  if (!can_multiply_floats()) throw nb::value_error("no float32 products on this processor");
  if (rows == 0 || columns == 0) throw nb::value_error("no such rows");
  nb::gil_scoped_release release;
  multiply_float_lanes({at(x), 1, columns, at(bias), columns, at(y), rows}, at(weights), rows, threads);
}

void multiply_turned(Address weights, size_t rows, size_t columns, Address x, Address bias, bool by_eight, Address y,
                     unsigned threads) {
  if (!can_multiply_floats()) throw nb::value_error("no float32 products on this processor");
  if (!bias) throw nb::value_error("no bias");
  if (by_eight && rows % 8) throw nb::value_error("rows are no multiple of eight");
  nb::gil_scoped_release release;
  multiply_float_columns({at(x), 1, rows, at(bias), 1, at(y), columns}, at(weights), columns, by_eight, threads);
}

nb::tuple multiply_packed(Address chunks, size_t nbytes, nb::handle places, u32 number, size_t skip, size_t rows,
                          size_t columns, Address x, size_t tokens, Address bias, size_t block, bool by_tiles,
                          Address y, size_t y_stride, unsigned threads) {
  const Product what = product(x, tokens, columns, bias, block, by_tiles, y, y_stride, BLOCK);
  if (rows == 0 || skip % BLOCK) throw nb::value_error("no rows, or a row that begins within a block");
  return with_matrix(chunks, nbytes, places, number, skip, rows, columns, [&](const Matrix& matrix) {
    return multiply(what, matrix, threads);
  });
}

void interleave_rows(Address chunks, size_t nbytes, nb::handle places, u32 number, size_t skip, size_t rows,
                     size_t columns, Address scratch) {
  if (!can_multiply() || columns % BLOCK || skip % BLOCK) throw nb::value_error("rows that are not multiplied packed");
  with_matrix(chunks, nbytes, places, number, skip, rows, columns, [&](const Matrix& matrix) {
    interleave(matrix, at(chunks), at(scratch));
    return Result{Fault::NONE, 0};
  });
}

nb::tuple unpack_some_rows(Address chunks, size_t nbytes, nb::handle places, u32 number, size_t skip, size_t rows,
                           size_t columns, size_t begin, size_t end, Address target, unsigned threads) {
  if (begin > end || end > rows) throw nb::value_error("no such rows");
  return with_matrix(chunks, nbytes, places, number, skip, rows, columns, [&](const Matrix& matrix) {
    return unpack_rows(matrix, begin, end, at(target), threads);
  });
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The packed layout's decoder and encoder for this processor; checkpoint/codec.py is the reference.";
  m.def("decode_chunks", &decode_chunks, nb::arg("source"), nb::arg("target"), nb::arg("item_bytes"), nb::arg("number"),
        nb::arg("skip"), nb::arg("path") = "",
        "Decode consecutive chunks into target; (fault, number of the chunk), fault 0 if all went well.");
  m.def("check_chunks", &check_chunks, nb::arg("source"), nb::arg("number"),
        "Compare the checksums of consecutive chunks; (fault, number of the chunk).");
  m.def("encode_chunk", &encode_chunk, nb::arg("source"), nb::arg("target"), nb::arg("item_bytes"),
        nb::arg("encodings"), nb::arg("number"), "Encode one chunk into target; its size.");
  m.def("can_multiply", &can_multiply, "Whether this processor has what `multiply` needs.");
  m.def("can_multiply_tiles", &can_multiply_tiles, "Whether it can do so by the matrix unit.");
  m.def("multiply", &multiply_rows, nb::arg("weights"), nb::arg("rows"), nb::arg("columns"), nb::arg("x"),
        nb::arg("tokens"), nb::arg("bias"), nb::arg("block"), nb::arg("by_tiles"), nb::arg("y"), nb::arg("y_stride"),
        nb::arg("threads"),
        "Multiply bf16 tokens at x with rows of bf16 weights, into y.");
  m.def("can_multiply_floats", &can_multiply_floats, "Whether this processor has what products with float32 need.");
  m.def("float_scratch_bytes", &float_scratch_bytes, nb::arg("tokens"), nb::arg("columns"),
        "What `multiply_floats` needs to work in.");
  m.def("multiply_floats", &multiply_float_rows, nb::arg("weights"), nb::arg("rows"), nb::arg("columns"), nb::arg("x"),
        nb::arg("tokens"), nb::arg("bias"), nb::arg("block"), nb::arg("part"), nb::arg("y"), nb::arg("y_stride"),
        nb::arg("scratch"), nb::arg("turned"), nb::arg("threads"),
        "Multiply float32 tokens at x with rows of float32 weights, into y.");
  m.def("multiply_float_token", &multiply_one_float_token, nb::arg("weights"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("x"), nb::arg("bias"), nb::arg("head"), nb::arg("y"), nb::arg("threads"),
        "Multiply one float32 token at x with rows of float32 weights, into y.");
  m.def("multiply_float_lanes", &multiply_lanes, nb::arg("weights"), nb::arg("rows"), nb::arg("columns"), nb::arg("x"),
        nb::arg("bias"), nb::arg("y"), nb::arg("threads"), "The same, summed in 16 lanes.");
  m.def("multiply_float_columns", &multiply_turned, nb::arg("weights"), nb::arg("rows"), nb::arg("columns"),
        nb::arg("x"), nb::arg("bias"), nb::arg("by_eight"), nb::arg("y"), nb::arg("threads"),
        "Multiply one float32 token at x, as many numbers as there are rows, with columns of float32 weights, into y.");
  m.def("multiply_packed", &multiply_packed, nb::arg("chunks"), nb::arg("nbytes"), nb::arg("places"), nb::arg("number"),
        nb::arg("skip"), nb::arg("rows"), nb::arg("columns"), nb::arg("x"), nb::arg("tokens"), nb::arg("bias"),
        nb::arg("block"), nb::arg("by_tiles"), nb::arg("y"), nb::arg("y_stride"), nb::arg("threads"),
        "The same with packed rows; (fault, number of the chunk).");
  m.def("interleave_bytes", &interleave_bytes, nb::arg("columns"), "What `interleave` needs to work in.");
  m.def("interleave", &interleave_rows, nb::arg("chunks"), nb::arg("nbytes"), nb::arg("places"), nb::arg("number"),
        nb::arg("skip"), nb::arg("rows"), nb::arg("columns"), nb::arg("scratch"),
        "Put packed rows that stay in memory in the order in which products need them.");
  m.def("unpack_rows", &unpack_some_rows, nb::arg("chunks"), nb::arg("nbytes"), nb::arg("places"), nb::arg("number"),
        nb::arg("skip"), nb::arg("rows"), nb::arg("columns"), nb::arg("begin"), nb::arg("end"), nb::arg("target"),
        nb::arg("threads"), "Unpack bf16 rows on several threads; (fault, number of the chunk).");
  m.def("paths", [] {
    std::vector<std::string> names;
    for (const Path* const* path = paths; *path; ++path)
      if ((*path)->is_supported()) names.emplace_back((*path)->name);
    return names;
  }, "Instruction sets that this processor has, best first.");
}
