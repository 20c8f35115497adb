// What changes when a tensor's values do.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace fasttx::bindings {

// Of a dense tensor on the CPU: its version counter, where it lies and how, and a hash of a sample of its values.
struct WeightState {
  Py_ssize_t version, address;
  uint64_t sample;
  pybind11::object dtype, shape, stride;
  explicit WeightState(PyObject* tensor);
  bool operator==(const WeightState& other) const {
    return version == other.version && address == other.address && sample == other.sample && dtype.is(other.dtype) &&
           shape.equal(other.shape) && stride.equal(other.stride);
  }
};

}  // namespace fasttx::bindings
