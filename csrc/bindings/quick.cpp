// Functions of fasttx._C that calls ask: plain C functions, at a third of pybind11's price.
#include <algorithm>
#include <cstring>

#include "host.h"

namespace fasttx::bindings {
namespace {

namespace py = pybind11;

PyObject* fingerprint(PyObject*, PyObject* const* given, Py_ssize_t count) {
  if (count != 2) {
    PyErr_SetString(PyExc_TypeError, "fingerprint takes an address and a number of bytes");
    return nullptr;
  }
  const char* base = static_cast<const char*>(PyLong_AsVoidPtr(given[0]));
  const size_t bytes = PyLong_AsSize_t(given[1]);
  if (PyErr_Occurred() != nullptr) return nullptr;
  return PyLong_FromUnsignedLongLong(fingerprint_of(base, bytes));
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_InternFromString(table().isa); }

PyMethodDef methods[] = {
    {"fingerprint", as_method(&fingerprint), METH_FASTCALL, "A hash of a sample of the memory at this address."},
    {"isa", &isa, METH_NOARGS, "The instruction set in use."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

uint64_t fingerprint_of(const char* base, size_t bytes) {
  constexpr size_t kSamples = 16;
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](const char* at, size_t size) {
    uint64_t word = 0;
    memcpy(&word, at, size);
    hash = (hash ^ word) * 0x100000001b3u;
    hash ^= hash >> 32;  // else the highest bits of two words, the signs of float64, would cancel
  };
  const size_t words = bytes / sizeof(uint64_t), samples = std::min(words, kSamples);
  for (size_t i = 0; i < samples; ++i) {
    add(base + (samples == words ? i : i * (words - 1) / (kSamples - 1)) * sizeof(uint64_t), sizeof(uint64_t));
  }
  add(base + words * sizeof(uint64_t), bytes % sizeof(uint64_t));
  return hash;
}

void define_quick(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fasttx::bindings
