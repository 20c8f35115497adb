#include "torch_module.h"

namespace fasttx::bindings {

namespace py = pybind11;

const Torch& torch_module() {
  static const Torch* found = [] {
    const auto torch = py::module_::import("torch");
    const py::object tensor = torch.attr("Tensor"), c = torch.attr("_C");
    const auto property = [&](const char* name) { return Property(tensor, name); };
    return new Torch{  // outlives the interpreter's end
        .tensor = tensor,
        .parameter = torch.attr("nn").attr("Parameter"),
        .strided = torch.attr("strided"),
        .dtypes = {torch.attr("float32"), torch.attr("bfloat16"), torch.attr("float16"), torch.attr("float64")},
        .dtype = property("dtype"),
        .is_cpu = property("is_cpu"),
        .layout = property("layout"),
        .is_nested = property("is_nested"),
        .requires_grad = property("requires_grad"),
        .shape = property("shape"),
        .version = property("_version"),
        .bytes = property("nbytes"),
        .is_contiguous = Method(tensor, "is_contiguous"),
        .is_inference = Method(tensor, "is_inference"),
        .data_ptr = Method(tensor, "data_ptr"),
        .stride = Method(tensor, "stride"),
        .is_autocast_enabled = c.attr("_is_any_autocast_enabled"),
        .is_grad_enabled = c.attr("is_grad_enabled"),
        .are_transforms_active = c.attr("_are_functorch_transforms_active"),
        .forward_ad = torch.attr("autograd").attr("forward_ad").attr("__dict__"),
    };
  }();
  return *found;
}

bool is_true(const py::object& function) {
  PyObject* answer = PyObject_CallNoArgs(function.ptr());
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer).ptr() == Py_True;
}

}  // namespace fasttx::bindings
