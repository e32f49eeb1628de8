// Spreads a bucket's chunks over threads.
#pragma once

#include <cstdint>

#include "../table.h"

#if defined(__SANITIZE_THREAD__)
#include <thread>
#include <vector>
#elif defined(_OPENMP)
// What <omp.h> declares. Apple's clang comes without that header.
extern "C" {
int omp_get_num_threads();
int omp_get_thread_num();
int omp_in_parallel();
}
#endif

namespace sam {
inline namespace SAM_ISA {

#if defined(__SANITIZE_THREAD__)
// Small tensors are split over threads too: to find races, not to save time.
constexpr int64_t kElementsPerThread = 16;
#else
// Below this many elements per thread a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 32768;
#endif

struct Range {
  int64_t begin;
  int64_t end;
};

// The bucket's size, with the gaps between its tensors.
inline int64_t num_elements(const Bucket& b) {
  return b.num_chunks == 0 ? 0 : b.chunks[b.num_chunks - 1].slot + b.chunks[b.num_chunks - 1].count;
}

// The chunks of thread `thread` of `threads`: contiguous, about equally many elements each, and the same for every
// operation, so that a thread meets the memory that it touched before.
inline Range chunk_range(const Bucket& b, int thread, int threads) {
  const int64_t total = num_elements(b);
  auto first_at = [&](int part) {
    const int64_t slot = total / threads * part + total % threads * part / threads;
    int64_t low = 0, high = b.num_chunks;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (b.chunks[middle].slot < slot) low = middle + 1;
      else high = middle;
    }
    return low;
  };
  return {first_at(thread), thread + 1 == threads ? b.num_chunks : first_at(thread + 1)};
}

// Calls work(range) on up to `threads` threads.
template <class Work>
inline void parallel_chunks(const Bucket& b, int threads, const Work& work) {
  if (b.num_chunks == 0) return;
  const int64_t useful = (num_elements(b) + kElementsPerThread - 1) / kElementsPerThread;
  [[maybe_unused]] const int wanted = static_cast<int>(useful < threads ? useful : threads);
#if defined(__SANITIZE_THREAD__)
  // ThreadSanitizer does not see how libgomp's threads wait for each other, but sees it of these.
  std::vector<std::thread> others;
  for (int thread = 1; thread < wanted; ++thread)
    others.emplace_back([&, thread] { work(chunk_range(b, thread, wanted)); });
  if (wanted > 1) work(chunk_range(b, 0, wanted));
  for (std::thread& other : others) other.join();
  if (wanted > 1) return;
#elif defined(_OPENMP)
  if (wanted > 1 && !omp_in_parallel()) {
#pragma omp parallel num_threads(wanted)
    work(chunk_range(b, omp_get_thread_num(), omp_get_num_threads()));
    return;
  }
#endif
  work(Range{0, b.num_chunks});
}

}  // namespace SAM_ISA
}  // namespace sam
