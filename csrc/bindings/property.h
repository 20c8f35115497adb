// Attributes of torch.Tensor, read without a look-up by name.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

namespace fasttx::bindings {

// A property of torch.Tensor, read by its getter itself: a tensor that is of no subclass has no other.
class Property {
 public:
  explicit Property(pybind11::handle tensor_class, const char* name)
      : descriptor_(
            reinterpret_cast<PyGetSetDescrObject*>(pybind11::object(tensor_class.attr(name)).release().ptr())) {
    if (!PyObject_TypeCheck(reinterpret_cast<PyObject*>(descriptor_), &PyGetSetDescr_Type)) {
      throw pybind11::type_error(std::string("torch.Tensor.") + name + " is no property");
    }
  }
  pybind11::object operator()(PyObject* tensor) const {
    PyObject* value = descriptor_->d_getset->get(tensor, descriptor_->d_getset->closure);
    if (value == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(value);
  }

 private:
  PyGetSetDescrObject* descriptor_;  // lives as long as torch
};

// A method of it that takes no arguments, likewise.
class Method {
 public:
  Method(pybind11::handle tensor_class, const char* name) : method_(tensor_class.attr(name)) {}
  pybind11::object operator()(PyObject* tensor) const {
    PyObject* result = PyObject_CallOneArg(method_.ptr(), tensor);
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
  }

 private:
  pybind11::object method_;
};

}  // namespace fasttx::bindings
