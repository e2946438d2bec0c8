// The decoder for Python: buffers in, nothing allocated, the interpreter lock released.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "codec.hpp"

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

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "The packed layout's decoder and encoder for this processor; checkpoint/codec.py is the reference.";
  m.def("decode_chunks", &decode_chunks, nb::arg("source"), nb::arg("target"), nb::arg("item_bytes"), nb::arg("number"),
        nb::arg("skip"), nb::arg("path") = "",
        "Decode consecutive chunks into target; (fault, number of the chunk), fault 0 if all went well.");
  m.def("encode_chunk", &encode_chunk, nb::arg("source"), nb::arg("target"), nb::arg("item_bytes"),
        nb::arg("encodings"), nb::arg("number"), "Encode one chunk into target; its size.");
  m.def("paths", [] {
    std::vector<std::string> names;
    for (const Path* const* path = paths; *path; ++path)
      if ((*path)->is_supported()) names.emplace_back((*path)->name);
    return names;
  }, "Instruction sets that this processor has, best first.");
}
