// Functions of fasttx._C that every call of an op asks: plain C functions, at a third of pybind11's price.
#include <algorithm>
#include <cstring>

#include "host.h"
#include "property.h"

namespace fasttx::bindings {
namespace {

namespace py = pybind11;

struct Torch {
  py::object tensor, parameter, strided, dtypes[4];
  Property dtype, is_cpu, layout, is_nested;

  explicit Torch(const py::module_& torch)
      : tensor(torch.attr("Tensor")), parameter(torch.attr("nn").attr("Parameter")), strided(torch.attr("strided")),
        dtypes{torch.attr("float32"), torch.attr("bfloat16"), torch.attr("float16"), torch.attr("float64")},
        dtype(tensor, "dtype"), is_cpu(tensor, "is_cpu"), layout(tensor, "layout"), is_nested(tensor, "is_nested") {}
};

const Torch& torch_module() {
  static const Torch* torch = new Torch(py::module_::import("torch"));  // outlives the interpreter's end
  return *torch;
}

// are_plain(*tensors): whether each is None or a dense tensor on the CPU, of no subclass, and all of one dtype that the
// kernels compute in; the first one is no None.
PyObject* are_plain(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  try {
    const Torch& torch = torch_module();
    py::object dtype;
    for (Py_ssize_t i = 0; i < count; ++i) {
      PyObject* tensor = tensors[i];
      if (i > 0 && tensor == Py_None) continue;
      const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor));
      if (type != torch.tensor.ptr() && type != torch.parameter.ptr()) Py_RETURN_FALSE;
      const py::object its_dtype = torch.dtype(tensor);
      if (i == 0) {
        dtype = its_dtype;
        const auto is_known = [&](const py::object& known) { return known.is(dtype); };
        if (std::none_of(std::begin(torch.dtypes), std::end(torch.dtypes), is_known)) Py_RETURN_FALSE;
      }
      if (!its_dtype.is(dtype) || torch.is_cpu(tensor).ptr() != Py_True || torch.is_nested(tensor).ptr() != Py_False ||
          !torch.layout(tensor).is(torch.strided)) {
        Py_RETURN_FALSE;
      }
    }
    Py_RETURN_TRUE;
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

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

template <class F>
PyCFunction as_method(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"are_plain", as_method(&are_plain), METH_FASTCALL,
     "Whether all are dense CPU tensors of one dtype that the kernels know, and of no subclass; all but the first may be None."},
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
