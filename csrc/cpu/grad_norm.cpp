// grad_norm: the squared norm ||T g||^2 of a bucket, as one float64 partial sum per chunk.
#include "../sam_math.h"
#include "kernels.h"
#include "parallel.h"
#include "ends.h"
#include "simd.h"

namespace sam {
inline namespace SAM_ISA {
namespace {

// Sixteen float64 lanes whatever the vector width: element i of a chunk is summed in lane i % 16, so every instruction
// set gets the same bits, and the lanes hide the latency of the addition. float32 squares are exact in float64.
constexpr int kLanes = 16;
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(double));
constexpr int kVectors = kLanes / kWidth;
using V = Vec<double, kWidth>;

template <class T, class Part>
inline V load_as_double(const typename Storage<T>::Bits* p, Part part) {
  using B = Vec<typename Storage<T>::Bits, kWidth>;
  return to_double<kWidth>(Storage<T>::template widen<kWidth>(part.template load<B>(p)));
}

// part(i): how elements i, i + 1, ... are read.
template <class T, bool Adaptive, class PartOf>
inline void accumulate(V (&sums)[kVectors], const typename Storage<T>::Bits* w, const typename Storage<T>::Bits* g,
                       V eta, const PartOf& part) {
  for (int k = 0; k < kVectors; ++k) {
    const V grad = load_as_double<T>(g + k * kWidth, part(k * kWidth));
    V term;
    if constexpr (Adaptive) term = norm_term_adaptive(load_as_double<T>(w + k * kWidth, part(k * kWidth)), grad, eta);
    else term = norm_term(grad);
    sums[k] += term * term;
  }
}

// How many bytes ahead to prefetch. A hardware prefetcher stops at the end of its page; this one also has the next
// page's address translated before it is needed. One Zen 5 core reads 40 GB/s in this loop, 36 without prefetching;
// with four streams, a quarter of a chunk apart, 23. (Two Zen 3 cores, without prefetching: 36 with four streams, 30
// with one.)
constexpr int64_t kAhead = 8192;
constexpr int64_t kLine = 64;

// left: elements from the chunk's first to the tensor's last, behind which there is nothing to prefetch.
template <class T, bool Adaptive>
double sum_of_squares(const void* weights, const void* grads, int64_t n, int64_t left, double eta_value) {
  using Bits = typename Storage<T>::Bits;
  constexpr auto itemsize = static_cast<int64_t>(sizeof(Bits));
  const Bits* w = static_cast<const Bits*>(weights);
  const Bits* g = static_cast<const Bits*>(grads);
  const V eta = V{} + eta_value;
  V sums[kVectors] = {};
  int64_t i = 0;
  const auto add = [&](int64_t at, const auto& part) {
    accumulate<T, Adaptive>(sums, Adaptive ? w + at : nullptr, g + at, eta, part);
  };
  const auto whole = [](int64_t) { return Whole{}; };
  constexpr int64_t ahead = kAhead / itemsize;
  for (const int64_t end = left - ahead < n ? left - ahead : n; i + kLanes <= end; i += kLanes) {
    for (int64_t k = 0; k < kLanes; k += kLine / itemsize) {
      __builtin_prefetch(g + i + ahead + k);
      if constexpr (Adaptive) __builtin_prefetch(w + i + ahead + k);
    }
    add(i, whole);
  }
  for (; i + kLanes <= n; i += kLanes) add(i, whole);
  // Zero bits are zero in every format, and add nothing.
  if (i < n) add(i, [rest = n - i](int64_t at) { return First{rest - at}; });
  // Lane k + lane k + 8, then + 4, + 2, + 1: halves of the array of vectors first, then halves of the one that is left.
  for (int half = kVectors / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  V last = sums[0];
  for (int half = kWidth / 2; half > 0; half /= 2)
    for (int k = 0; k < half; ++k) last[k] += last[k + half];
  return last[0];
}

template <class T>
void grad_norm_of(const Bucket& b, const Group* options, double* partials, int threads) {
  using Bits = typename Storage<T>::Bits;
  parallel_chunks(b, threads, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& c = b.chunks[i];
      const Bits* g = reinterpret_cast<const Bits*>(b.along[c.tensor]);
      if (g == nullptr) {
        partials[i] = 0.0;
        continue;
      }
      const Bits* w = reinterpret_cast<const Bits*>(b.weights[c.tensor]);
      const Group& group = options[c.group];
      const int64_t left = b.tensors[c.tensor].numel - c.begin;
      partials[i] = group.adaptive != 0.0 ? sum_of_squares<T, true>(w + c.begin, g + c.begin, c.count, left, group.eta)
                                          : sum_of_squares<T, false>(nullptr, g + c.begin, c.count, left, 0.0);
    }
  });
}

}  // namespace

void grad_norm(const Bucket& b, const Group* options, double* partials, int threads) {
  with_dtype(b.dtype, [&](auto format) { grad_norm_of<decltype(format)>(b, options, partials, threads); });
}

}  // namespace SAM_ISA
}  // namespace sam
