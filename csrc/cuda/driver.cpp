#include "driver.h"

#include <dlfcn.h>
#include <string.h>

#include <mutex>

namespace fasttx::cuda {
namespace {

// Errors of our own; the driver's are positive.
enum : int { kNoDriver = -1, kNoImage = -2, kOldDriver = -3 };

// The driver's functions, with the types of cuda.h (CUDA Driver API reference); every handle is a pointer.
struct Driver {
  int (*load_library)(void** library, const void* code, void*, void*, unsigned, void*, void*, unsigned);
  int (*get_kernel)(void** kernel, void* library, const char* name);
  int (*set_attribute)(int attribute, int value, void* kernel, int device);
  int (*launch)(void* function, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned shared,
                cudaStream_t stream, void** parameters, void** extra);
  int (*current_context)(void** context);
  int (*retain_context)(void** context, int device);
  int (*set_context)(void* context);
  int (*get_device)(int* device, int number);
  int (*get_attribute)(int* value, int attribute, int device);
  int (*encode)(TensorMap* map, int type, uint32_t rank, void* data, const uint64_t* sizes, const uint64_t* strides,
                const uint32_t* box, const uint32_t* steps, int interleave, int swizzle, int promotion, int fill);
  int (*error_string)(int error, const char** text);
  int missing = 0;
};

Driver find_driver() {
  Driver driver{};
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    driver.missing = kNoDriver;
    return driver;
  }
  const auto find = [&](auto& function, const char* name) {
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
    if (function == nullptr) driver.missing = kOldDriver;
  };
  find(driver.load_library, "cuLibraryLoadData");
  find(driver.get_kernel, "cuLibraryGetKernel");
  find(driver.set_attribute, "cuKernelSetAttribute");
  find(driver.launch, "cuLaunchKernel");
  find(driver.current_context, "cuCtxGetCurrent");
  find(driver.retain_context, "cuDevicePrimaryCtxRetain");
  find(driver.set_context, "cuCtxSetCurrent");
  find(driver.get_device, "cuDeviceGet");
  find(driver.get_attribute, "cuDeviceGetAttribute");
  find(driver.encode, "cuTensorMapEncodeTiled");
  find(driver.error_string, "cuGetErrorString");
  return driver;
}

const Driver& driver() {
  static const Driver found = find_driver();
  return found;
}

// Its number, or that of the last, which has no name.
int image_number(const char* name) {
  int number = 0;
  while (kImages[number].name != nullptr && strcmp(kImages[number].name, name) != 0) ++number;
  return number;
}

// The function, whose image is loaded if it is the first of it.
int find_function(Kernel& kernel, void** function) {
  constexpr int kMostImages = 64;
  static std::mutex mutex;
  static void* libraries[kMostImages] = {};
  const std::lock_guard lock(mutex);
  const int number = image_number(kernel.image);
  if (kImages[number].name == nullptr || number >= kMostImages) return kNoImage;
  if (libraries[number] == nullptr) {
    const int error =
        driver().load_library(&libraries[number], kImages[number].data, nullptr, nullptr, 0, nullptr, nullptr, 0);
    if (error != 0) return error;
  }
  const int error = driver().get_kernel(function, libraries[number], kernel.name);
  if (error == 0) kernel.function.store(*function);
  return error;
}

// A thread that has used nothing of CUDA has no context: it takes the device's, which is PyTorch's.
int ensure_context(int number) {
  void* context = nullptr;
  int device = 0, error = driver().current_context(&context);
  if (error != 0 || context != nullptr) return error;
  if ((error = driver().get_device(&device, number)) != 0) return error;
  if ((error = driver().retain_context(&context, device)) != 0) return error;
  return driver().set_context(context);
}

// Beyond 48 KiB, shared memory has to be asked for.
int ask_for_shared(Kernel& kernel, void* function, uint32_t bytes, int number) {
  constexpr int kMaxDynamicShared = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
  const uint64_t bit = uint64_t{1} << (number % 64);
  if (bytes <= 48 * 1024 || (number < 64 && (kernel.prepared.load() & bit) != 0)) return 0;
  int device = 0, error = driver().get_device(&device, number);
  if (error == 0) error = driver().set_attribute(kMaxDynamicShared, int(bytes), function, device);
  if (error == 0) kernel.prepared.fetch_or(bit);
  return error;
}

std::atomic<const Interceptor*> current{nullptr};

}  // namespace

int launch(Kernel& kernel, Grid grid, uint32_t threads, uint32_t shared, const void* args, size_t bytes, Queue queue) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  if (const Interceptor* stand_in = interceptor(); stand_in != nullptr) {
    stand_in->launched(kernel, grid, threads, shared, args, bytes);
    return 0;
  }
  if (driver().missing != 0) return driver().missing;
  if (const int error = ensure_context(queue.device); error != 0) return error;
  void* function = kernel.function.load();
  if (function == nullptr) {
    if (const int error = find_function(kernel, &function); error != 0) return error;
  }
  if (const int error = ask_for_shared(kernel, function, shared, queue.device); error != 0) return error;
  void* parameters[] = {const_cast<void*>(args)};
  return driver().launch(function, grid.x, grid.y, grid.z, threads, 1, 1, shared, queue.stream, parameters, nullptr);
}

bool has_image(const char* name) { return kImages[image_number(name)].name != nullptr; }

int capability(Queue queue) {
  constexpr int kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
  if (const Interceptor* stand_in = interceptor(); stand_in != nullptr) return stand_in->capability;
  int device = 0, major = 0, minor = 0;
  if (driver().missing != 0 || driver().get_device(&device, queue.device) != 0) return 0;
  if (driver().get_attribute(&major, kMajor, device) != 0 || driver().get_attribute(&minor, kMinor, device) != 0) return 0;
  return 10 * major + minor;
}

int encode(TensorMap& map, const MappedTensor& tensor) {
  if (const Interceptor* stand_in = interceptor(); stand_in != nullptr) {
    stand_in->encoded(map, tensor);
    return 0;
  }
  if (driver().missing != 0) return driver().missing;
  // CU_TENSOR_MAP_DATA_TYPE_, _INTERLEAVE_NONE, _SWIZZLE_128B, _L2_PROMOTION_L2_256B and _FLOAT_OOB_FILL_NONE: zeros.
  constexpr int kFloat16 = 6, kBfloat16 = 9, kNoInterleave = 0, kSwizzle128 = 3, kWholeLines = 3, kZeros = 0;
  constexpr uint32_t kSteps[4] = {1, 1, 1, 1};
  return driver().encode(&map, tensor.is_bf16 ? kBfloat16 : kFloat16, 4, const_cast<void*>(tensor.data), tensor.sizes,
                         tensor.strides, tensor.box, kSteps, kNoInterleave, kSwizzle128, kWholeLines, kZeros);
}

const char* error_text(int error) {
  switch (error) {
    case 0: return "no error";
    case kNoDriver: return "the CUDA driver, libcuda.so.1, was not found";
    case kNoImage: return "this build of fasttx does not contain the kernel";
    case kOldDriver: return "the CUDA driver is older than CUDA 12.0";
    default: break;
  }
  const char* text = nullptr;
  return driver().error_string(error, &text) == 0 && text != nullptr ? text : "unknown error of the CUDA driver";
}

void intercept(const Interceptor* interceptor) { current.store(interceptor); }
const Interceptor* interceptor() { return current.load(std::memory_order_relaxed); }

}  // namespace fasttx::cuda
