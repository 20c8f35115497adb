// Calls on plain tensors: whether they are that, and whether gradients are wanted, asked in C; then the op at once.
// Python takes longer to ask than a kernel takes for a small tensor.
#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>

#include "host.h"
#include "torch_module.h"

namespace fasttx::bindings {
namespace {

namespace py = pybind11;

// fasttx.dispatch's: what backend this thread asked for, as `name`, and a list of who wants to hear of every call.
struct Dispatch {
  py::object requested;
  py::list listeners;
};
const Dispatch* dispatch = nullptr;

// Whether each is None or a dense tensor on the CPU, of no subclass, and all of one dtype that the kernels compute in;
// the first one is no None.
bool are_plain(const Torch& torch, PyObject* const* tensors, Py_ssize_t count) {
  py::object dtype;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* tensor = tensors[i];
    if (i > 0 && tensor == Py_None) continue;
    if (!torch.is_plain(tensor)) return false;
    const py::object its_dtype = torch.dtype(tensor);
    if (i == 0) {
      dtype = its_dtype;
      const auto is_known = [&](const py::object& known) { return known.is(dtype); };
      if (std::none_of(std::begin(torch.dtypes), std::end(torch.dtypes), is_known)) return false;
    }
    if (!its_dtype.is(dtype) || torch.is_cpu(tensor).ptr() != Py_True || torch.is_nested(tensor).ptr() != Py_False ||
        !torch.layout(tensor).is(torch.strided)) {
      return false;
    }
  }
  return true;
}

// Whether the CPU kernels take a call on these tensors, and nobody asks what it runs on.
bool takes(const Torch& torch, PyObject* const* tensors, Py_ssize_t count) {
  static const auto* name = new py::str("name");
  static const auto* automatic = new py::str("auto");
  return dispatch != nullptr && dispatch->listeners.empty() &&
         py::object(dispatch->requested.attr(*name)).equal(*automatic) && !is_true(torch.is_autocast_enabled) &&
         are_plain(torch, tensors, count);
}

// Which of an op's two ways a call on these tensors takes, `ways` being (without gradients, with them); null where that
// takes a closer look.
PyObject* way_of(PyObject* ways, PyObject* const* tensors, Py_ssize_t count) {
  const Torch& torch = torch_module();
  if (!takes(torch, tensors, count) || is_true(torch.are_transforms_active)) return nullptr;
  static const auto* level_name = new py::str("_current_level");
  PyObject* level = PyDict_GetItemWithError(torch.forward_ad.ptr(), level_name->ptr());
  if (level == nullptr || PyLong_AsLong(level) >= 0) return nullptr;  // tensors may carry tangents
  const auto requires_grad = [&](PyObject* x) { return x != Py_None && torch.requires_grad(x).ptr() == Py_True; };
  const bool differentiable = std::any_of(tensors, tensors + count, requires_grad) && is_true(torch.is_grad_enabled);
  return PyTuple_GET_ITEM(ways, differentiable ? 1 : 0);
}

// Whether a shape ends in these dims, or consists of them.
bool ends_in(const py::object& shape, PyObject* const* dims, Py_ssize_t count, bool exactly) {
  const Py_ssize_t size = PyTuple_GET_SIZE(shape.ptr());
  if (exactly ? size != count : size < count) return false;
  PyObject* const* const last = &PyTuple_GET_ITEM(shape.ptr(), size - count);
  return std::equal(dims, dims + count, last, [](PyObject* dim, PyObject* length) {
    return PyLong_CheckExact(dim) && PyObject_RichCompareBool(dim, length, Py_EQ) == 1;
  });
}

PyObject* runs_on_cpu(PyObject*, PyObject* const* tensors, Py_ssize_t count) {
  return with_errors([&] { return PyBool_FromLong(takes(torch_module(), tensors, count)); });
}

// A tensor's sizes, as Python's integers.
class Sizes {
 public:
  Sizes(const Torch& torch, PyObject* tensor) : shape_(torch.shape(tensor)) {}
  Py_ssize_t count() const { return PyTuple_GET_SIZE(shape_.ptr()); }
  int64_t operator[](Py_ssize_t i) const { return PyLong_AsLongLong(PyTuple_GET_ITEM(shape_.ptr(), i)); }

 private:
  py::object shape_;
};

// Whether linear layers take an input (..., in), one after another: weights (out, in), biases (out,) or None.
bool layers_fit(const Torch& torch, PyObject* const* given, Py_ssize_t count) {
  const Sizes input(torch, given[0]);
  if (input.count() == 0) return false;
  int64_t width = input[input.count() - 1];
  for (Py_ssize_t i = 1; i < count; i += 2) {
    if (given[i] == Py_None) return false;
    const Sizes weight(torch, given[i]);
    if (weight.count() != 2 || weight[1] != width) return false;
    width = weight[0];
    if (given[i + 1] == Py_None) continue;
    const Sizes bias(torch, given[i + 1]);
    if (bias.count() != 1 || bias[0] != width) return false;
  }
  return true;
}

PyObject* layers_run_on_cpu(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return with_errors([&] {
    const Torch& torch = torch_module();
    return PyBool_FromLong(count % 2 == 1 && takes(torch, given, count) && layers_fit(torch, given, count));
  });
}

PyObject* call(PyObject* ways, PyObject* const* given, Py_ssize_t count) {
  return with_errors([&]() -> PyObject* {
    PyObject* const op = count < 2 ? nullptr : way_of(ways, given, 2);
    if (op == nullptr) Py_RETURN_NONE;
    return PyObject_Vectorcall(op, given, count, nullptr);
  });
}

PyObject* call_layer_norm(PyObject* ways, PyObject* const* given, Py_ssize_t count) {
  return with_errors([&]() -> PyObject* {
    if (count != 5) Py_RETURN_NONE;
    PyObject *const input = given[0], *const weight = given[2], *const bias = given[3];
    PyObject* const tensors[] = {input, weight, bias};
    PyObject* const op = way_of(ways, tensors, 3);
    if (op == nullptr) Py_RETURN_NONE;
    const bool is_tuple = PyTuple_Check(given[1]);
    PyObject* const* const dims = is_tuple ? &PyTuple_GET_ITEM(given[1], 0) : &given[1];
    const Py_ssize_t num_dims = is_tuple ? PyTuple_GET_SIZE(given[1]) : 1;
    if (num_dims == 0) Py_RETURN_NONE;
    const Torch& torch = torch_module();
    for (PyObject* tensor : tensors) {
      if (tensor != Py_None && !ends_in(torch.shape(tensor), dims, num_dims, tensor != input)) Py_RETURN_NONE;
    }
    const int64_t product =
        std::transform_reduce(dims, dims + num_dims, int64_t{1}, std::multiplies<>(), PyLong_AsLongLong);
    if (product == 0) Py_RETURN_NONE;
    const auto width = py::reinterpret_steal<py::object>(PyLong_FromLongLong(product));
    PyObject* const args[] = {input, width.ptr(), weight, bias, given[4]};
    return PyObject_Vectorcall(op, args, 5, nullptr);
  });
}

PyObject* call_attention(PyObject* ways, PyObject* const* given, Py_ssize_t count) {
  return with_errors([&]() -> PyObject* {
    if (count != 7 || given[1] == Py_None || given[2] == Py_None) Py_RETURN_NONE;
    PyObject *const is_causal = given[3], *const offset = given[4], *const scale = given[5], *const wants_lse = given[6];
    PyObject* const op = way_of(ways, given, 3);
    if (op == nullptr || !PyBool_Check(is_causal) || !PyLong_CheckExact(offset) || !PyBool_Check(wants_lse)) Py_RETURN_NONE;
    const Torch& torch = torch_module();
    const Sizes q(torch, given[0]), k(torch, given[1]), v(torch, given[2]);
    if (q.count() != 4 || k.count() != 4 || v.count() != 4) Py_RETURN_NONE;
    const bool of_heads = k[0] == q[0] && v[0] == q[0] && k[1] == q[1] && v[1] == q[1];
    if (!of_heads || v[2] != k[2] || k[3] != q[3] || q[3] == 0) Py_RETURN_NONE;
    if (scale != Py_None && !PyFloat_CheckExact(scale)) Py_RETURN_NONE;
    const double factor = scale == Py_None ? 1.0 / std::sqrt(q[3]) : PyFloat_AS_DOUBLE(scale);
    if (!std::isfinite(factor)) Py_RETURN_NONE;
    static const py::object *unlimited = new py::int_(-1), *none_dropped = new py::float_(0.0), *no_weights = new py::int_(0);
    const bool is_differentiated = op == PyTuple_GET_ITEM(ways, 1);
    const py::float_ scale_used(factor);
    PyObject* const args[] = {given[0], given[1], given[2], Py_None, Py_None, Py_None, Py_None, Py_None,
                              is_causal, offset, unlimited->ptr(), unlimited->ptr(), none_dropped->ptr(), Py_None,
                              scale_used.ptr(), is_differentiated ? Py_True : wants_lse, no_weights->ptr()};
    return PyObject_Vectorcall(op, args, std::size(args), nullptr);
  });
}

PyMethodDef call_method = {"plain_call", as_method(&call), METH_FASTCALL,
                           "The op's result; None where its first two arguments are not plain tensors, or that takes a "
                           "closer look."};
PyMethodDef layer_norm_method = {"plain_layer_norm", as_method(&call_layer_norm), METH_FASTCALL,
                                 "The same of (input, normalized_shape, weight, bias, eps), where shapes fit too."};

PyMethodDef attention_method = {"plain_attention", as_method(&call_attention), METH_FASTCALL,
                                "The same of (query, key, value, is_causal, query_offset, scale, with_lse), padded and of "
                                "as many heads, where shapes fit too."};

py::object bound(PyMethodDef& method, const py::object& raw, const py::object& apply) {
  return py::reinterpret_steal<py::object>(PyCFunction_New(&method, py::make_tuple(raw, apply).ptr()));
}

PyMethodDef methods[] = {
    {"runs_on_cpu", as_method(&runs_on_cpu), METH_FASTCALL,
     "Whether all are dense CPU tensors of one dtype that the kernels know, and of no subclass (all but the first may "
     "be None), no backend is named, nobody listens, and autocast is off."},
    {"layers_run_on_cpu", as_method(&layers_run_on_cpu), METH_FASTCALL,
     "The same of (input, weight, bias, ...), where linear layers of these weights and biases fit the input."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

void define_plain_calls(py::module_& m) {
  m.def("watch",
        [](py::object requested, py::list listeners) {
          dispatch = new Dispatch{std::move(requested), std::move(listeners)};  // outlives the interpreter's end
        },
        py::arg("requested"), py::arg("listeners"), "Where fasttx.dispatch keeps what every call depends on.");
  m.def("plain_call", [](const py::object& raw, const py::object& apply) { return bound(call_method, raw, apply); },
        py::arg("raw"), py::arg("apply"), call_method.ml_doc);
  m.def("plain_layer_norm",
        [](const py::object& raw, const py::object& apply) { return bound(layer_norm_method, raw, apply); },
        py::arg("raw"), py::arg("apply"), layer_norm_method.ml_doc);
  m.def("plain_attention",
        [](const py::object& raw, const py::object& apply) { return bound(attention_method, raw, apply); },
        py::arg("raw"), py::arg("apply"), attention_method.ml_doc);
  if (PyModule_AddFunctions(m.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fasttx::bindings
