// Spreads a bucket's chunks over threads.
#pragma once

#include <cstdint>

#include "../table.h"

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
#include <omp.h>
#endif

namespace sam {
inline namespace SAM_ISA {

#if defined(__SANITIZE_THREAD__)
// Small tensors are shared out too: to find races, not to save time.
constexpr int64_t kElementsPerThread = 16;
#else
// Below this many elements per thread a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;
#endif

struct Range {
  int64_t begin;
  int64_t end;
};

// The chunks of thread `thread` of `threads`: contiguous, about equally many elements each, and the same for every operation, so that a
// thread meets the memory that it touched before.
inline Range chunk_range(const Chunks& chunks, int thread, int threads) {
  const int64_t total = chunks.data[chunks.size - 1].slot + chunks.data[chunks.size - 1].count;
  auto first_at = [&](int part) {
    const int64_t slot = total / threads * part + total % threads * part / threads;
    int64_t low = 0, high = chunks.size;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (chunks.data[middle].slot < slot) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  return {first_at(thread), thread + 1 == threads ? chunks.size : first_at(thread + 1)};
}

// Calls work(range) on up to `threads` threads.
template <class Work>
inline void parallel_chunks(const Chunks& chunks, int threads, const Work& work) {
  if (chunks.size == 0) return;
  const int64_t total = chunks.data[chunks.size - 1].slot + chunks.data[chunks.size - 1].count;
  const int64_t useful = (total + kElementsPerThread - 1) / kElementsPerThread;
  [[maybe_unused]] const int wanted = static_cast<int>(useful < threads ? useful : threads);
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see how libgomp's threads wait for each other, but sees it of these.
  std::vector<std::thread> others;
  for (int thread = 1; thread < wanted; ++thread) others.emplace_back([&, thread] { work(chunk_range(chunks, thread, wanted)); });
  if (wanted > 1) work(chunk_range(chunks, 0, wanted));
  for (std::thread& other : others) other.join();
  if (wanted > 1) return;
#elif defined(_OPENMP)
  if (wanted > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(wanted)
    work(chunk_range(chunks, omp_get_thread_num(), omp_get_num_threads()));
    return;
  }
#endif
  work(Range{0, chunks.size});
}

}  // namespace SAM_ISA
}  // namespace sam
