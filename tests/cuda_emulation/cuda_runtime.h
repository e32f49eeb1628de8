// For tests only: enough of CUDA, in plain C++20, to execute the kernels of csrc/cuda on the CPU, where sanitizers can
// watch them.
//
// Every CUDA thread of a block is a std::thread, __syncthreads is a std::barrier over the block and a shuffle is an
// exchange through slots between two barriers over the warp. Blocks run one after another, so `static` is right for
// __shared__, and a block that depends on another one running at the same time would hang. Only what the kernels use is
// here. A data race between threads of a block is a data race between std::threads: ThreadSanitizer finds a missing
// __syncthreads.
//
// Shared memory is poisoned before every block: bytes of 0xff, which are NaN as floating-point numbers. `static` alone
// would keep what the block before has written, and zero at first.
//
// What is not shown by this: memory ordering weaker than the CPU's, races between blocks, alignment faults of 16-byte
// accesses (UBSan reports those), and speed.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#define SAM_CUDA_EMULATION
#define CUDART_VERSION 13000
#define SAM_CUDA_COMPILER "emulation"
#define SAM_CUDA_ARCHITECTURES "none"
#define SAM_CUDA_DEVICE_TYPE "cpu"

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

struct dim3 {
  unsigned x = 1;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// ---- Host functions -------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorLaunchFailure = 719,
  cudaErrorUnknown = 999
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess };
constexpr unsigned long long cudaEnableDefault = 0;
struct cudaFuncAttributes {};

// What tests set and read through ctypes.
#define SAM_VISIBLE [[gnu::visibility("default"), gnu::used]] inline
extern "C" {
// Launches so far.
SAM_VISIBLE std::atomic<int64_t> sam_emulation_launches{0};
// The launch that many launches from now fails, once; negative: none.
SAM_VISIBLE std::atomic<int64_t> sam_emulation_fail_after{-1};
// Nonzero: launches do nothing. What is left is what a launch costs on the host, less the driver's part.
SAM_VISIBLE std::atomic<int64_t> sam_emulation_skip{0};
// Size in bytes of the arguments of the last launch.
SAM_VISIBLE std::atomic<int64_t> sam_emulation_argument_bytes{0};
// Nonzero: loads and stores are counted below, those of 2^i bytes in element i.
SAM_VISIBLE std::atomic<int64_t> sam_emulation_counts_accesses{0};
SAM_VISIBLE std::atomic<int64_t> sam_emulation_loads[5] = {};
SAM_VISIBLE std::atomic<int64_t> sam_emulation_stores[5] = {};
// The error that the next look-up of a kernel finds, and the last one that nobody has asked for yet.
SAM_VISIBLE std::atomic<int64_t> sam_emulation_probe_error{0};
SAM_VISIBLE std::atomic<int64_t> sam_emulation_last_error{0};
// The current device, and bit by bit which devices have a context.
SAM_VISIBLE std::atomic<int64_t> sam_emulation_device{0};
SAM_VISIBLE std::atomic<int64_t> sam_emulation_contexts{0};
}

inline const char* cudaGetErrorName(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInsufficientDriver:
      return "cudaErrorInsufficientDriver";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorLaunchFailure:
      return "cudaErrorLaunchFailure";
    default:
      return "cudaErrorUnknown";
  }
}
inline const char* cudaGetErrorString(cudaError_t status) {
  switch (status) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInsufficientDriver:
      return "CUDA driver version is insufficient for CUDA runtime version";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "unknown error";
  }
}
inline cudaError_t cudaGetLastError() {
  return static_cast<cudaError_t>(sam_emulation_last_error.exchange(cudaSuccess));
}
inline cudaError_t cudaGetDevice(int* device) { return *device = static_cast<int>(sam_emulation_device), cudaSuccess; }
// As from CUDA 12 on: a device that becomes the current one gets a context.
inline cudaError_t cudaSetDevice(int device) {
  sam_emulation_device = device;
  sam_emulation_contexts |= int64_t{1} << device;
  return cudaSuccess;
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
inline cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  int (*get_state)(int, unsigned*, int*) = [](int device, unsigned* flags, int* active) {
    *flags = 0;
    *active = static_cast<int>(sam_emulation_contexts >> device & 1);
    return 0;
  };
  *function = reinterpret_cast<void*>(get_state);
  return *result = cudaDriverEntryPointSuccess, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel) {
  sam_emulation_last_error = sam_emulation_probe_error.load();
  return static_cast<cudaError_t>(sam_emulation_probe_error.load());
}
// Few blocks, so that every block walks many tiles; SAM_FAST_EMULATED_BLOCKS sets another number.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  const char* wanted = std::getenv("SAM_FAST_EMULATED_BLOCKS");
  return *value = wanted == nullptr ? 3 : std::atoi(wanted), cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

// ---- Shared memory --------------------------------------------------------------------------------------------------

namespace emulation {

inline std::vector<std::pair<unsigned char*, int64_t>> shared;

// Byte by byte: under AddressSanitizer a variable's size includes what lies around it.
[[gnu::no_sanitize("address", "thread")]] inline void poison_shared() noexcept {
  for (const auto& [address, size] : shared)
    for (int64_t i = 0; i < size; ++i) const_cast<volatile unsigned char*>(address)[i] = 0xff;
}

}  // namespace emulation

// Notes a __shared__ variable. plugin.py knows them all from the module's symbols.
extern "C" SAM_VISIBLE void sam_emulation_share(void* address, int64_t size) {
  emulation::shared.emplace_back(static_cast<unsigned char*>(address), size);
}

// ---- Threads --------------------------------------------------------------------------------------------------------

namespace emulation {

constexpr unsigned kWarp = 32;

struct Warp {
  std::barrier<> barrier{kWarp};
  alignas(8) unsigned char slots[kWarp][8];
};

// The threads of a block. Between launches they wait: most of the time would go into starting hundreds of threads for
// every launch.
class Pool {
 public:
  explicit Pool(unsigned threads)
      : barrier(threads), between_(threads, Poison{}), start_(threads + 1), finish_(threads + 1) {
    for (unsigned w = 0; w < threads / kWarp; ++w) warps.push_back(std::make_unique<Warp>());
    for (unsigned t = 0; t < threads; ++t) std::thread([this, t] { work(t); }).detach();
  }

  // Runs kernel() on every thread of every block.
  void run(unsigned blocks, const std::function<void()>& kernel) {
    blocks_ = blocks;
    kernel_ = &kernel;
    poison_shared();
    start_.arrive_and_wait();
    finish_.arrive_and_wait();
  }

  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;

 private:
  struct Poison {
    void operator()() noexcept { poison_shared(); }
  };

  void work(unsigned thread);

  std::barrier<Poison> between_;
  std::barrier<> start_, finish_;
  unsigned blocks_ = 0;
  const std::function<void()>* kernel_ = nullptr;
};

inline thread_local Pool* block = nullptr;
inline thread_local dim3 thread_index, block_index, grid_size;

inline void Pool::work(unsigned thread) {
  block = this;
  thread_index.x = thread;
  for (;;) {
    start_.arrive_and_wait();
    grid_size.x = blocks_;
    for (unsigned b = 0; b < blocks_; ++b) {
      block_index.x = b;
      (*kernel_)();
      between_.arrive_and_wait();  // the next block only when this one is done
    }
    finish_.arrive_and_wait();
  }
}

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, unsigned blocks, unsigned threads, cudaStream_t, const Args&... args) {
  ++sam_emulation_launches;
  sam_emulation_argument_bytes = static_cast<int64_t>((sizeof(Args) + ...));
  if (sam_emulation_fail_after >= 0 && sam_emulation_fail_after-- == 0) return cudaErrorLaunchFailure;
  if (sam_emulation_skip != 0) return cudaSuccess;
  static std::mutex mutex;
  static std::map<unsigned, Pool*> pools;  // never destroyed: their threads never end
  const std::lock_guard<std::mutex> lock(mutex);
  Pool*& pool = pools[threads];
  if (pool == nullptr) pool = new Pool(threads);
  pool->run(blocks, [&] { kernel(args...); });
  return cudaSuccess;
}

}  // namespace emulation

#define threadIdx (::emulation::thread_index)
#define blockIdx (::emulation::block_index)
#define gridDim (::emulation::grid_size)

// ---- Device functions -----------------------------------------------------------------------------------------------

inline void __syncthreads() { emulation::block->barrier.arrive_and_wait(); }

template <class T>
T __shfl_down_sync(unsigned, T value, unsigned delta) {
  static_assert(sizeof(T) <= 8);
  emulation::Warp& warp = *emulation::block->warps[threadIdx.x / emulation::kWarp];
  const unsigned lane = threadIdx.x % emulation::kWarp;
  std::memcpy(warp.slots[lane], &value, sizeof(T));
  warp.barrier.arrive_and_wait();
  if (lane + delta < emulation::kWarp) std::memcpy(&value, warp.slots[lane + delta], sizeof(T));
  warp.barrier.arrive_and_wait();
  return value;
}

namespace emulation {

template <class T>
void count(std::atomic<int64_t> (&counters)[5]) {
  static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
  if (sam_emulation_counts_accesses != 0)
    ++counters[sizeof(T) == 1 ? 0 : sizeof(T) == 2 ? 1 : sizeof(T) == 4 ? 2 : sizeof(T) == 8 ? 3 : 4];
}

}  // namespace emulation

template <class T>
T __ldcs(const T* p) {
  emulation::count<T>(sam_emulation_loads);
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  emulation::count<T>(sam_emulation_loads);
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  emulation::count<T>(sam_emulation_stores);
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  emulation::count<T>(sam_emulation_stores);
  *p = value;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

using std::pow;
using std::sqrt;
