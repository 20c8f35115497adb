// What Python asks of the CUDA kernels: what they are compiled for; and a stand-in for the driver, for tests.
#include <cstring>
#include <string>

#include "../cuda/driver.h"
#include "host.h"

namespace fasttx::bindings {
namespace {

namespace py = pybind11;

// Kept until the interpreter ends: never freed, as its memory is Python's.
py::object* allocated = nullptr;
py::object* launched = nullptr;
py::object* encoded = nullptr;

void on_allocated(const void* at, size_t bytes) {
  const py::gil_scoped_acquire gil;
  (*allocated)(reinterpret_cast<uintptr_t>(at), bytes);
}

void on_launched(const cuda::Kernel& kernel, cuda::Grid grid, uint32_t threads, uint32_t shared, const void* args,
                 size_t bytes) {
  const py::gil_scoped_acquire gil;
  (*launched)(std::string(kernel.image), std::string(kernel.name), py::make_tuple(grid.x, grid.y, grid.z), threads, shared,
              py::bytes(static_cast<const char*>(args), bytes));
}

void on_encoded(cuda::TensorMap& map, const cuda::MappedTensor& tensor) {
  const py::gil_scoped_acquire gil;
  const auto tuple = [](const auto& values) {
    py::list list;
    for (const auto value : values) list.append(value);
    return py::tuple(list);
  };
  const std::string bytes = py::bytes((*encoded)(reinterpret_cast<uintptr_t>(tensor.data), tuple(tensor.sizes),
                                                 tuple(tensor.strides), tuple(tensor.box)));
  if (bytes.size() != sizeof(map)) throw py::value_error("a tensor map has 128 bytes");
  std::memcpy(&map, bytes.data(), sizeof(map));
}

cuda::Interceptor to_python{&on_allocated, &on_launched, &on_encoded, 0};

}  // namespace

void define_cuda(py::module_& m) {
  m.def("cuda_architectures", [] { return std::string(cuda::kArchitectures); },
        "What the CUDA kernels are compiled for, as in 'sm_80 sm_90 compute_80'; empty where there are none.");
  m.def("intercept_cuda",
        [](py::object on_launch, py::object on_allocation, py::object on_map, int capability) {
          cuda::intercept(nullptr);
          delete allocated;
          delete launched;
          delete encoded;
          allocated = launched = encoded = nullptr;
          if (on_launch.is_none()) return;
          allocated = new py::object(std::move(on_allocation));
          launched = new py::object(std::move(on_launch));
          encoded = new py::object(std::move(on_map));
          to_python.capability = capability;
          cuda::intercept(&to_python);
        },
        py::arg("on_launch"), py::arg("on_allocation"), py::arg("on_map") = py::none(), py::arg("capability") = 80,
        "For tests: from now on CUDA kernels take CPU tensors, and every launch calls on_launch(image, name, grid, threads, "
        "shared, parameter) instead of the driver; on_allocation(address, bytes) hears of results; on_map(address, sizes, "
        "strides, box) gives the 128 bytes of a map of 16-bit values in the 128-byte swizzle; capability is the device's, as "
        "in 90. None for on_launch ends it.");
}

}  // namespace fasttx::bindings
