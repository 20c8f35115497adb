// What calls ask of torch, each looked up once.
#pragma once

#include "property.h"

namespace fasttx::bindings {

struct Torch {
  pybind11::object tensor, parameter, strided, dtypes[4];
  Property dtype, is_cpu, layout, is_nested, requires_grad, shape, version, bytes;
  Method is_contiguous, is_inference, data_ptr, stride;
  pybind11::object is_autocast_enabled, is_grad_enabled, are_transforms_active;
  pybind11::dict forward_ad;

  // Whether it is a tensor, of no subclass.
  bool is_plain(PyObject* object) const {
    const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
    return type == tensor.ptr() || type == parameter.ptr();
  }
};

const Torch& torch_module();

// Whether a function, of no arguments, gives True.
bool is_true(const pybind11::object& function);

// A C function's body, whose exceptions of Python become its own.
template <class F>
PyObject* with_errors(F body) {
  try {
    return body();
  } catch (pybind11::error_already_set& error) {
    error.restore();
    return nullptr;
  }
}

}  // namespace fasttx::bindings
