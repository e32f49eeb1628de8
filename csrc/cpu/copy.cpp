// backup / restore: copy a bucket's tensors to and from its backup, bit for bit, whatever their dtype.
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace sam {
inline namespace SAM_ISA {
namespace {

using V = Vec<uint8_t, kVectorBytes>;

// Copies past the caches where the target allows it; the caller fences.
inline void stream_copy(char* to, const char* from, int64_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % kVectorBytes != 0) {
    std::memcpy(to, from, static_cast<size_t>(bytes));
    return;
  }
  int64_t i = 0;
  for (; i + 4 * kVectorBytes <= bytes; i += 4 * kVectorBytes)
    for (int k = 0; k < 4; ++k) stream(to + i + k * kVectorBytes, load<V>(from + i + k * kVectorBytes));
  std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
}

template <bool ToBackup>
void copy(const Bucket& b, int threads) {
  const bool streams = num_elements(b) * b.itemsize >= kStreamBytes;
  parallel_chunks(b, threads, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& c = b.chunks[i];
      if (b.weights[c.tensor] == 0 || (!ToBackup && b.saved[c.tensor] == 0)) continue;
      char* weights = reinterpret_cast<char*>(b.weights[c.tensor]) + c.begin * b.itemsize;
      char* backup = static_cast<char*>(b.backup) + c.slot * b.itemsize;
      const int64_t bytes = c.count * b.itemsize;
      char* to = ToBackup ? backup : weights;
      const char* from = ToBackup ? weights : backup;
      if (streams) stream_copy(to, from, bytes);
      else std::memcpy(to, from, static_cast<size_t>(bytes));
    }
    if (streams) stream_fence();
  });
}

}  // namespace

// As in perturb, the notes on what is saved are written here, where no Python signal can come between them and the
// copy.
void backup(const Bucket& b, int threads) {
  copy<true>(b, threads);
  for (int64_t i = 0; i < b.num_tensors; ++i) b.saved[i] = b.weights[i];
}

void restore(const Bucket& b, bool release, int threads) {
  copy<false>(b, threads);
  if (!release) return;
  for (int64_t i = 0; i < b.num_tensors; ++i)
    if (b.weights[i] != 0) b.saved[i] = 0;
}

}  // namespace SAM_ISA
}  // namespace sam
