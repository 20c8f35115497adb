// fasttx._C: the host side that is no tensor op - which instruction sets there are, which is in use, how this was built -
// and every kernel of the table, so that tests reach each of them directly.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "common.h"

namespace py = pybind11;

namespace fasttx::bindings {
namespace {

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

// Makes a pointer field readable and writable as an address: what tensor.data_ptr() gives.
template <class Args, class Pointer>
void address(py::class_<Args>& type, const char* name, Pointer Args::* field) {
  type.def_property(
      name, [field](const Args& args) { return reinterpret_cast<uintptr_t>(args.*field); },
      [field](Args& args, uintptr_t value) { args.*field = reinterpret_cast<Pointer>(value); });
}

// run_<op>(isa, dtype, args, begin, end): one range of a kernel's items on the calling thread; end < 0 means all.
template <class Args>
void kernel(py::module_& m, const char* name, Kernel<Args> (KernelTable::*entry)[kDTypes]) {
  m.def((std::string("run_") + name).c_str(),
        [entry](const std::string& isa, int dtype, const Args& args, int64_t begin, int64_t end) {
          if (dtype < 0 || dtype >= kDTypes) throw std::invalid_argument("dtype must be an index of `dtypes`");
          const Kernel<Args>& k = (isa_named(isa).table->*entry)[dtype];
          const Plan plan = k.plan(args);
          if (end < 0) end = plan.items;
          if (begin < 0 || begin > end || end > plan.items) {
            throw std::invalid_argument("begin and end must lie in order within the " + std::to_string(plan.items) +
                                        " items");
          }
          k.run(args, thread_scratch(plan.scratch_bytes), begin, end);
          return plan.items;
        },
        py::arg("isa"), py::arg("dtype"), py::arg("args"), py::arg("begin") = 0, py::arg("end") = -1);
}

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

void define_kernels(py::module_& m) {
  py::class_<Dropout>(m, "Dropout")
      .def(py::init([](uint64_t seed, uint32_t threshold, double scale) { return Dropout{seed, threshold, scale, true}; }));

  py::class_<LayerNormFwd> layer_norm_fwd(m, "LayerNormFwd");
  layer_norm_fwd.def(py::init<>())
      .def_readwrite("rows", &LayerNormFwd::rows).def_readwrite("width", &LayerNormFwd::width)
      .def_readwrite("eps", &LayerNormFwd::eps).def_readwrite("dropout", &LayerNormFwd::dropout);
  address(layer_norm_fwd, "x", &LayerNormFwd::x);
  address(layer_norm_fwd, "residual", &LayerNormFwd::residual);
  address(layer_norm_fwd, "weight", &LayerNormFwd::weight);
  address(layer_norm_fwd, "bias", &LayerNormFwd::bias);
  address(layer_norm_fwd, "y", &LayerNormFwd::y);
  address(layer_norm_fwd, "sum", &LayerNormFwd::sum);
  address(layer_norm_fwd, "mean", &LayerNormFwd::mean);
  address(layer_norm_fwd, "rstd", &LayerNormFwd::rstd);
  kernel(m, "layer_norm_fwd", &KernelTable::layer_norm_fwd);

  py::class_<ActivationFwd> activation_fwd(m, "ActivationFwd");
  activation_fwd.def(py::init<>())
      .def_readwrite("rows", &ActivationFwd::rows).def_readwrite("width", &ActivationFwd::width)
      .def_property("activation", [](const ActivationFwd& a) { return static_cast<int>(a.activation); },
                    [](ActivationFwd& a, int code) { a.activation = make_activation(code); });
  address(activation_fwd, "x", &ActivationFwd::x);
  address(activation_fwd, "bias", &ActivationFwd::bias);
  address(activation_fwd, "y", &ActivationFwd::y);
  kernel(m, "activation_fwd", &KernelTable::activation_fwd);

  py::class_<PackB> pack_b(m, "PackB");
  pack_b.def(py::init<>())
      .def_readwrite("k", &PackB::k).def_readwrite("n", &PackB::n)
      .def_readwrite("k_stride", &PackB::k_stride).def_readwrite("n_stride", &PackB::n_stride);
  address(pack_b, "b", &PackB::b);
  address(pack_b, "packed", &PackB::packed);
  kernel(m, "pack_b", &KernelTable::pack_b);

  py::class_<Gemm> gemm(m, "Gemm");
  gemm.def(py::init<>())
      .def_readwrite("m", &Gemm::m).def_readwrite("n", &Gemm::n).def_readwrite("k", &Gemm::k)
      .def_readwrite("a_stride", &Gemm::a_stride).def_readwrite("a_in_blocks", &Gemm::a_in_blocks).def_readwrite("c_stride", &Gemm::c_stride);
  address(gemm, "a", &Gemm::a);
  address(gemm, "b", &Gemm::b);
  address(gemm, "bias", &Gemm::bias);
  address(gemm, "c", &Gemm::c);
  kernel(m, "gemm", &KernelTable::gemm);
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
  m.attr("dtypes") = std::vector<std::string>{"float32", "bfloat16", "float16", "float64"};
  m.attr("compiler") = __VERSION__;
  m.attr("torch_target_version") = "2.10";
  define_kernels(m);
}

}  // namespace fasttx::bindings
