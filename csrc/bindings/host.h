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
// Adds the functions that every call of an op asks.
void define_quick(pybind11::module_& m);

}  // namespace fasttx::bindings
