// fasttx._C: the host side that is no tensor op - which instruction sets there are, which is in use, how this was built.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
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

namespace {

// A hash of up to 16 words spread evenly over a block of memory, and of the bytes past its last whole word: cheap evidence
// that it has not changed.
uint64_t fingerprint(uintptr_t address, size_t bytes) {
  constexpr size_t kSamples = 16;
  const char* base = reinterpret_cast<const char*>(address);
  uint64_t hash = 0xcbf29ce484222325u;
  const auto add = [&](const char* at, size_t size) {
    uint64_t word = 0;
    memcpy(&word, at, size);
    hash = (hash ^ word) * 0x100000001b3u;
  };
  const size_t words = bytes / sizeof(uint64_t), samples = std::min(words, kSamples);
  for (size_t i = 0; i < samples; ++i) {
    add(base + (samples == words ? i : i * (words - 1) / (kSamples - 1)) * sizeof(uint64_t), sizeof(uint64_t));
  }
  add(base + words * sizeof(uint64_t), bytes % sizeof(uint64_t));
  return hash;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("isas", [] {
    std::vector<std::pair<std::string, bool>> all;
    for (int i = 0; i < kNumIsas; ++i) all.emplace_back(kIsas[i].name, kIsas[i].supported());
    return all;
  }, "Every instruction set in this build, from the plainest on, and whether this machine has it.");
  m.def("isa", [] { return std::string(table().isa); }, "The instruction set in use.");
  m.def("default_isa", [] { return std::string(default_isa().name); },
        "The instruction set that is used until set_isa names one.");
  m.def("set_isa", [](const std::string& name) { set_isa(isa_named(name)); }, py::arg("name"),
        "Uses this instruction set from now on; ValueError for one that this machine lacks.");
  m.def("fingerprint", &fingerprint, py::arg("address"), py::arg("bytes"),
        "A hash of a sample of the memory at this address.");
  m.def("workspace_bytes", &workspace_bytes, "Bytes of the workspaces that threads keep for their next calls.");
  m.def("release_workspaces", &release_workspaces, "Frees them.");
  m.attr("dtypes") = std::vector<std::string>{"float32", "bfloat16", "float16", "float64"};
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target_version") = "2.10";
  define_kernels(m);
}

}  // namespace fasttx::bindings
