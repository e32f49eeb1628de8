// For tests only: enough of CUDA, in plain C++20, to execute the kernels of csrc/cuda on the CPU, where sanitizers can watch them.
//
// Every CUDA thread of a block is a std::thread, __syncthreads is a std::barrier over the block and a shuffle is an exchange through slots
// between two barriers over the warp. Blocks run one after another, so `static` is right for __shared__, and a block that depends on another
// one running at the same time would hang. Only what the kernels use is here. A data race between threads of a block is a data race between
// std::threads: ThreadSanitizer finds a missing __syncthreads.
//
// What is not shown by this: memory ordering weaker than the CPU's, races between blocks, alignment faults of 16-byte accesses (UBSan reports
// those), and speed.
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

// ---- Host functions ---------------------------------------------------------------------------------------------------------------------

using cudaStream_t = struct CUstream_st*;
enum cudaError_t { cudaSuccess = 0, cudaErrorLaunchFailure = 719 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount };

inline const char* cudaGetErrorString(cudaError_t status) { return status == cudaSuccess ? "no error" : "unspecified launch failure"; }
inline const char* cudaGetErrorName(cudaError_t status) { return status == cudaSuccess ? "cudaSuccess" : "cudaErrorLaunchFailure"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
// Few blocks, so that every block walks many tiles.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) { return *value = 3, cudaSuccess; }
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, size_t) {
  return *blocks = 1, cudaSuccess;
}

// ---- What tests set and read through ctypes ---------------------------------------------------------------------------------------------

extern "C" {
// Launches so far.
[[gnu::visibility("default"), gnu::used]] inline std::atomic<int64_t> sam_emulation_launches{0};
// The launch that many launches from now fails, once; negative: none.
[[gnu::visibility("default"), gnu::used]] inline std::atomic<int64_t> sam_emulation_fail_after{-1};
// Nonzero: launches do nothing. What is left is what a launch costs on the host, less the driver's part.
[[gnu::visibility("default"), gnu::used]] inline std::atomic<int64_t> sam_emulation_skip{0};
}

// ---- Threads ----------------------------------------------------------------------------------------------------------------------------

namespace emulation {

constexpr unsigned kWarp = 32;

struct Warp {
  std::barrier<> barrier{kWarp};
  alignas(8) unsigned char slots[kWarp][8];
};

// The threads of a block. They wait for the next launch in between: to start hundreds of threads for every launch is what takes the time.
class Pool {
 public:
  explicit Pool(unsigned threads) : barrier(threads), start_(threads + 1), finish_(threads + 1) {
    for (unsigned w = 0; w < threads / kWarp; ++w) warps.push_back(std::make_unique<Warp>());
    for (unsigned t = 0; t < threads; ++t) std::thread([this, t] { work(t); }).detach();
  }

  // Runs kernel() on every thread of every block.
  void run(unsigned blocks, const std::function<void()>& kernel) {
    blocks_ = blocks;
    kernel_ = &kernel;
    start_.arrive_and_wait();
    finish_.arrive_and_wait();
  }

  std::barrier<> barrier;
  std::vector<std::unique_ptr<Warp>> warps;

 private:
  void work(unsigned thread);

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
      barrier.arrive_and_wait();  // the next block only when this one is done
    }
    finish_.arrive_and_wait();
  }
}

template <class Kernel, class... Args>
cudaError_t launch(Kernel kernel, unsigned blocks, unsigned threads, cudaStream_t, const Args&... args) {
  ++sam_emulation_launches;
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

// ---- Device functions -------------------------------------------------------------------------------------------------------------------

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

template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
void __stcg(T* p, T value) {
  *p = value;
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}

using std::pow;
using std::sqrt;
