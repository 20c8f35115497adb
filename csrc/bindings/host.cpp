// fasttx._C: the host side that is no tensor op - which instruction sets there are, which is in use, how this was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "host.h"

namespace py = pybind11;

namespace fasttx::bindings {

const Isa& isa_named(const std::string& name) {
  const Isa* isa = find_isa(name.c_str());
  std::string usable;
  for (int i = 0; i < kNumIsas; ++i)
    if (kIsas[i].supported()) usable += std::string(usable.empty() ? "" : ", ") + kIsas[i].name;
  if (isa == nullptr) {
    throw std::invalid_argument("unknown instruction set '" + name + "'; this machine can use: " + usable);
  }
  if (!isa->supported()) {
    throw std::invalid_argument("this machine lacks the instruction set '" + name + "'; it can use: " + usable);
  }
  return *isa;
}

PYBIND11_MODULE(_C, m) {
  m.def("isas", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (int i = 0; i < kNumIsas; ++i) all.emplace_back(kIsas[i].name, kIsas[i].supported());
    return all;
  }, "Every instruction set in this build, from the plainest on, and whether this machine has it.");
  m.def("default_isa", [] { return std::string(default_isa().name); },
        "The instruction set that is used until set_isa names one.");
  m.def("set_isa", [](const std::string& name) { set_isa(isa_named(name)); }, py::arg("name"),
        "Uses this instruction set from now on; ValueError for one that this machine lacks.");
  m.def("workspace_bytes", &workspace_bytes, "Bytes of the workspaces that threads keep for their next calls.");
  m.def("release_workspaces", &release_workspaces, "Frees them.");
  m.def("poison_results", &poison_results, py::arg("on"),
        "Fills the memory of every result with NaN before a kernel runs, from now on or no longer, for tests. Returns how "
        "many have been filled.");
  const std::vector<std::string> dtypes = {"float32", "bfloat16", "float16", "float64"};
  m.attr("dtypes") = dtypes;
  // (instruction set, dtype) of linear layers whose weights are packed in parts, unless for the vector unit.
  std::vector<std::pair<std::string, std::string>> in_parts;
  for (int i = 0; i < kNumIsas; ++i)
    for (int dtype = 0; dtype < kDTypes; ++dtype)
      if (kIsas[i].table->takes_parts[dtype]) in_parts.emplace_back(kIsas[i].name, dtypes[dtype]);
  m.attr("in_parts") = in_parts;
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target_version") = "2.10";
  define_kernels(m);
  define_quick(m);
  define_plain_calls(m);
  define_snapshot(m);
  define_cuda(m);
}

}  // namespace fasttx::bindings
