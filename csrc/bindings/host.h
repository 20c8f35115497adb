// What the two halves of fasttx._C share.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "common.h"

namespace fasttx::bindings {

// The instruction set of that name; throws std::invalid_argument unless this machine has it.
const Isa& isa_named(const std::string& name);

// Adds every kernel of the table and its arguments to the module.
void define_kernels(pybind11::module_& m);
// Adds the functions that calls ask.
void define_quick(pybind11::module_& m);
// Adds the ways from a call on plain tensors to its op.
void define_plain_calls(pybind11::module_& m);
// Adds the class Snapshot.
void define_snapshot(pybind11::module_& m);
// Adds what there is to know of the CUDA kernels.
void define_cuda(pybind11::module_& m);

// A C function as Python's table of methods has it.
template <class F>
PyCFunction as_method(F function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace fasttx::bindings
