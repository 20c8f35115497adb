// Snapshots of modules: whether anything about them has changed since what was found out about them was found out.
#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

#include "host.h"
#include "weight_state.h"

namespace fasttx::bindings {
namespace {

namespace py = pybind11;

// A reference that keeps nothing alive which could lead back to the object that a snapshot is kept for: weak where the
// value can be referred to weakly. Numbers, names and tuples cannot, and are held, so that no other takes their address.
class Reference {
 public:
  explicit Reference(PyObject* value) : value_(value), weak_(PyType_SUPPORTS_WEAKREFS(Py_TYPE(value))) {
    held_ = weak_ ? py::reinterpret_steal<py::object>(PyWeakref_NewRef(value, nullptr))
                  : py::reinterpret_borrow<py::object>(value);
    if (!held_) throw py::error_already_set();
  }
  bool is(PyObject* value) const { return value == value_ && (!weak_ || get().ptr() == value); }
  // None where it is gone.
  py::object get() const { return weak_ ? held_() : held_; }

 private:
  const PyObject* value_;
  bool weak_;
  py::object held_;
};

// What a dict holds, by identity; of the dicts among its values, what they hold: a module's attributes with its
// parameters, children and hooks.
class DictState {
 public:
  DictState(PyObject* dict, bool with_dicts) {
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value);) {
      Entry& entry = entries_.emplace_back(py::reinterpret_borrow<py::object>(key));
      if (with_dicts && PyDict_Check(value)) {
        entry.dict = std::make_unique<DictState>(value, false);
      } else {
        entry.value.emplace(value);
      }
    }
  }
  bool holds(PyObject* dict) const {
    if (PyDict_GET_SIZE(dict) != static_cast<Py_ssize_t>(entries_.size())) return false;
    auto entry = entries_.begin();
    PyObject *key, *value;
    for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &key, &value); ++entry) {
      if (!entry->key.is(py::handle(key))) return false;
      if (entry->dict ? !PyDict_Check(value) || !entry->dict->holds(value) : !entry->value->is(value)) return false;
    }
    return true;
  }

 private:
  struct Entry {
    explicit Entry(py::object name) : key(std::move(name)) {}
    py::object key;
    std::optional<Reference> value;
    std::unique_ptr<DictState> dict;
  };
  std::vector<Entry> entries_;
};

// An object's own attributes: not those that its class may make up.
py::object attributes(PyObject* object) {
  PyObject* dict = PyObject_GenericGetDict(object, nullptr);
  if (dict == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(dict);
}

class ObjectState {
 public:
  explicit ObjectState(PyObject* object)
      : type_(py::type::of(object)), state_(attributes(object).ptr(), true) {}
  bool holds(PyObject* object) const {
    return py::type::handle_of(object).is(type_) && state_.holds(attributes(object).ptr());
  }

 private:
  py::object type_;
  DictState state_;
};

// A weight, and what its values were.
class Weight {
 public:
  explicit Weight(py::object weight) : weight_(std::move(weight)), before_(weight_.ptr()) {}
  bool is_unchanged() const { return WeightState(weight_.ptr()) == before_; }

 private:
  py::object weight_;
  WeightState before_;
};

// Keeps none of the objects alive.
class Snapshot {
 public:
  Snapshot(const py::list& objects, const py::list& weights) : isa_(table().isa) {
    for (const py::handle object : objects) {
      states_.emplace_back(object.ptr());
      if (states_.size() > 1) others_.emplace_back(object.ptr());
    }
    for (const py::handle weight : weights) weights_.emplace_back(py::reinterpret_borrow<py::object>(weight));
  }
  bool holds(const py::object& first) const {
    if (table().isa != isa_ || !states_.front().holds(first.ptr())) return false;
    for (size_t i = 0; i < others_.size(); ++i)
      if (!states_[i + 1].holds(others_[i].get().ptr())) return false;
    return std::all_of(weights_.begin(), weights_.end(), [](const Weight& weight) { return weight.is_unchanged(); });
  }

 private:
  const char* isa_;
  std::vector<ObjectState> states_;
  std::vector<Reference> others_;
  std::vector<Weight> weights_;
};

}  // namespace

void define_snapshot(py::module_& m) {
  py::class_<Snapshot>(m, "Snapshot", "What objects have for attributes, and weights for values, to see whether that changes.")
      .def(py::init([](const py::list& objects, const py::list& weights) {
             if (objects.empty()) throw py::value_error("a snapshot is of one object at least");
             return std::make_unique<Snapshot>(objects, weights);
           }),
           py::arg("objects"), py::arg("weights"))
      .def("holds", &Snapshot::holds, py::arg("first"),
           "Whether nothing has changed about the objects, the first of which is given again, and the weights.");
}

}  // namespace fasttx::bindings
