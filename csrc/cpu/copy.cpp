// backup / restore: copy a bucket's rows to and from its flat buffer, bit for bit, whatever their dtype.
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

template <bool ToFlat>
void copy_rows(const CopyArgs& a) {
  if (a.chunks.size == 0) return;
  const Chunk& last = a.chunks.data[a.chunks.size - 1];
  const bool streams = (last.slot + last.count) * a.itemsize >= kStreamBytes;
  parallel_chunks(a.chunks, a.threads, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& c = a.chunks.data[i];
      if (a.rows[c.row] == 0 || (!ToFlat && a.saved[c.row] == 0)) continue;
      char* row = reinterpret_cast<char*>(a.rows[c.row]) + c.begin * a.itemsize;
      char* flat = static_cast<char*>(a.flat) + c.slot * a.itemsize;
      const int64_t bytes = c.count * a.itemsize;
      char* to = ToFlat ? flat : row;
      const char* from = ToFlat ? row : flat;
      if (streams) stream_copy(to, from, bytes);
      else std::memcpy(to, from, static_cast<size_t>(bytes));
    }
    if (streams) stream_fence();
  });
}

}  // namespace

// As in perturb, the notes on what is saved are written here, where no Python signal can come between them and the copy.
void backup(const CopyArgs& a) {
  copy_rows<true>(a);
  for (int64_t i = 0; i < a.chunks.size; ++i) a.saved[a.chunks.data[i].row] = a.rows[a.chunks.data[i].row];
}

void restore(const CopyArgs& a) {
  copy_rows<false>(a);
  if (!a.release) return;
  for (int64_t i = 0; i < a.chunks.size; ++i) {
    const int64_t row = a.chunks.data[i].row;
    if (a.rows[row] != 0) a.saved[row] = 0;
  }
}

}  // namespace SAM_ISA
}  // namespace sam
