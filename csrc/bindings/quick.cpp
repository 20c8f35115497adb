// Functions of fasttx._C that calls ask: plain C functions, at a third of pybind11's price.
#include "host.h"
#include "torch_module.h"
#include "weight_state.h"

namespace fasttx::bindings {
namespace {

namespace py = pybind11;

// Whether it is one block of memory without gaps: contiguous, or the transpose of what is.
bool is_dense(const Torch& torch, PyObject* tensor) {
  if (torch.is_contiguous(tensor).ptr() == Py_True) return true;
  const auto shape = py::reinterpret_borrow<py::tuple>(torch.shape(tensor));
  return shape.size() == 2 && torch.stride(tensor).equal(py::make_tuple(1, shape[0]));
}

PyObject* settled_state(PyObject*, PyObject* tensor) {
  return with_errors([&]() -> PyObject* {
    const Torch& torch = torch_module();
    if (!torch.is_plain(tensor) || is_true(torch.are_transforms_active)) Py_RETURN_NONE;
    if (torch.requires_grad(tensor).ptr() == Py_True && is_true(torch.is_grad_enabled)) Py_RETURN_NONE;
    if (torch.is_inference(tensor).ptr() == Py_True || torch.is_cpu(tensor).ptr() != Py_True) Py_RETURN_NONE;
    if (!is_dense(torch, tensor)) Py_RETURN_NONE;
    const WeightState state(tensor);
    return py::make_tuple(state.version, state.address, state.shape, state.stride, state.dtype, state.sample)
        .release()
        .ptr();
  });
}

PyObject* isa(PyObject*, PyObject*) { return PyUnicode_InternFromString(table().isa); }

PyMethodDef methods[] = {
    {"settled_state", &settled_state, METH_O, "What changes when the tensor does, or None: see fasttx.packing."},
    {"isa", &isa, METH_NOARGS, "The instruction set in use."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void define_quick(py::module_& m) {
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fasttx::bindings
