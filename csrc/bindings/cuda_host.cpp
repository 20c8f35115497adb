// What Python asks of the CUDA kernels: what they are compiled for; and a stand-in for the driver, for tests.
#include <string>

#include "../cuda/driver.h"
#include "host.h"

namespace fasttx::bindings {
namespace {

namespace py = pybind11;

// Kept until the interpreter ends: never freed, as its memory is Python's.
py::object* allocated = nullptr;
py::object* launched = nullptr;

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

constexpr cuda::Interceptor kToPython{&on_allocated, &on_launched};

}  // namespace

void define_cuda(py::module_& m) {
  m.def("cuda_architectures", [] { return std::string(cuda::kArchitectures); },
        "What the CUDA kernels are compiled for, as in 'sm_80 sm_90 compute_80'; empty where there are none.");
  m.def("intercept_cuda",
        [](py::object on_launch, py::object on_allocation) {
          cuda::intercept(nullptr);
          delete allocated;
          delete launched;
          allocated = launched = nullptr;
          if (on_launch.is_none()) return;
          allocated = new py::object(std::move(on_allocation));
          launched = new py::object(std::move(on_launch));
          cuda::intercept(&kToPython);
        },
        py::arg("on_launch"), py::arg("on_allocation"),
        "For tests: from now on CUDA kernels take CPU tensors, and every launch calls on_launch(image, name, grid, threads, "
        "shared, parameter) instead of the driver; on_allocation(address, bytes) hears of results. None ends it.");
}

}  // namespace fasttx::bindings
