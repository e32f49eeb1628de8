// Launching a kernel and reporting what went wrong.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#include <type_traits>

namespace sam::cuda {

inline void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // an error that is reported here must not be reported to somebody else as well
  throw std::runtime_error(std::string("CUDA error in ") + what + ": " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

// The launch is asynchronous; an error of an earlier kernel may be reported here.
template <class... Params>
void launch(const char* what, void (*kernel)(Params...), unsigned blocks, unsigned threads, cudaStream_t stream,
            const std::remove_cv_t<Params>&... args) {
#ifdef SAM_CUDA_EMULATION  // tests/cuda_emulation
  check(emulation::launch(kernel, blocks, threads, stream, args...), what);
#else
  void* pointers[] = {const_cast<void*>(static_cast<const void*>(&args))...};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), pointers, 0, stream),
        what);
#endif
}

// Whether the device has a context already: from CUDA 12 on cudaSetDevice makes one, and takes hundreds of megabytes
// for it.
inline bool has_context(int device) {
  using GetState = int (*)(int, unsigned int*, int*);  // cuDevicePrimaryCtxGetState of the driver, which is not linked
  static const GetState get_state = [] {
    void* found = nullptr;
#if CUDART_VERSION >= 12050
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPointByVersion("cuDevicePrimaryCtxGetState", &found, 7000, cudaEnableDefault, &result);
#elif CUDART_VERSION >= 12000
    cudaDriverEntryPointQueryResult result;
    const cudaError_t status =
        cudaGetDriverEntryPoint("cuDevicePrimaryCtxGetState", &found, cudaEnableDefault, &result);
#else
    const cudaError_t status = cudaErrorNotSupported;  // CUDA 11's cudaSetDevice makes no context
#endif
    if (status != cudaSuccess) cudaGetLastError();
    return status == cudaSuccess ? reinterpret_cast<GetState>(found) : nullptr;
  }();
  unsigned int flags = 0;
  int active = 1;
  return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
}

// Makes `device` the current one for as long as this lives. A previous device without a context is not given one:
// `device` then stays current. PyTorch does the same, and remembers by itself which device its user wants.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  }
  ~DeviceGuard() {
    if (previous_ != device_ && has_context(previous_)) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

}  // namespace sam::cuda
