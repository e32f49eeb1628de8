// perturb: back the weights up and move them along the direction, w <- w + e, in one pass over memory.
#include "../sam_math.h"
#include "kernels.h"
#include "parallel.h"
#include "ends.h"
#include "simd.h"

namespace sam {
inline namespace SAM_ISA {
namespace {

template <class T>
struct Perturb {
  using Bits = typename Storage<T>::Bits;
  using Compute = typename Storage<T>::Compute;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Compute));
  using B = Vec<Bits, kWidth>;
  using C = Vec<Compute, kWidth>;

  template <bool Adaptive, bool Stream, bool Stochastic, class Part = Whole>
  static inline void vector(Bits* w, const Bits* g, Bits* backup, C eta, C scale,
                            [[maybe_unused]] const RoundingBits& random, Part part = {}) {
    const B bits = part.template load<B>(w);
    if constexpr (Stream) stream(backup, bits);
    else part.store(backup, bits);
    const C weight = Storage<T>::template widen<kWidth>(bits);
    const C direction = Storage<T>::template widen<kWidth>(part.template load<B>(g));
    C moved;
    if constexpr (Adaptive) moved = perturbed_adaptive(weight, direction, eta, scale);
    else moved = perturbed(weight, direction, scale);
    if constexpr (Stochastic) part.store(w, Storage<T>::template narrow<kWidth>(moved, random));
    else part.store(w, Storage<T>::template narrow<kWidth>(moved));
  }

  template <bool Adaptive, bool Stream, bool Stochastic>
  static void run(Bits* w, const Bits* g, Bits* backup, int64_t n, double eta_value, double scale_value,
                  const RoundingBits& random) {
    const C eta = C{} + static_cast<Compute>(eta_value);
    const C scale = C{} + static_cast<Compute>(scale_value);
    const auto at = [&](int64_t i) {
      vector<Adaptive, Stream, Stochastic>(w + i, g + i, backup + i, eta, scale, random.at(i));
    };
    int64_t i = n / kWidth * kWidth;  // backwards, as the chunks are: the hardware prefetches across their ends
    if (i < n) vector<Adaptive, false, Stochastic>(w + i, g + i, backup + i, eta, scale, random.at(i), First{n - i});
    while (i >= 4 * kWidth)
      for (int k = 0; k < 4; ++k) at(i -= kWidth);
    while (i > 0) at(i -= kWidth);
  }
};

// The partials in a fixed order: four running sums hide the latency of the addition.
double norm_of(const double* partials, int64_t n) {
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) sums[k] += partials[i + k];
  for (; i < n; ++i) sums[0] += partials[i];
  return __builtin_sqrt((sums[0] + sums[2]) + (sums[1] + sums[3]));
}

struct Args {
  const Bucket& bucket;
  const Group* options;
  double norm;
  double eps;
  Rounding rounding;
  int threads;
};

template <class T, bool Stream, bool Stochastic>
void perturb_of(const Args& a) {
  using Bits = typename Storage<T>::Bits;
  const Bucket& b = a.bucket;
  const bool moves = can_perturb(a.norm);
  parallel_chunks(b, a.threads, [&](Range range) {
    // Backwards: the direction that grad_norm read last is what is still in cache.
    for (int64_t i = range.end; i-- > range.begin;) {
      const Chunk& c = b.chunks[i];
      if (b.along[c.tensor] == 0) continue;
      Bits* w = reinterpret_cast<Bits*>(b.weights[c.tensor]) + c.begin;
      const Bits* g = reinterpret_cast<const Bits*>(b.along[c.tensor]) + c.begin;
      Bits* backup = static_cast<Bits*>(b.backup) + c.slot;
      const Group& group = a.options[c.group];
      const auto scale = perturb_scale<typename Storage<T>::Compute>(a.norm, group.rho, a.eps);
      const RoundingBits random{a.rounding.key, static_cast<uint32_t>(c.slot)};
      using P = Perturb<T>;
      if (!moves) std::memcpy(backup, w, static_cast<size_t>(c.count) * sizeof(Bits));
      else if (group.adaptive != 0.0)
        P::template run<true, Stream, Stochastic>(w, g, backup, c.count, group.eta, scale, random);
      else P::template run<false, Stream, Stochastic>(w, g, backup, c.count, 0.0, scale, random);
    }
    if constexpr (Stream) stream_fence();
  });
}

template <class T, bool Stream>
void perturb_of(const Args& a) {
  if constexpr (kRounded<T>) {
    if (a.rounding.stochastic) return perturb_of<T, Stream, true>(a);
  }
  perturb_of<T, Stream, false>(a);
}

}  // namespace

int64_t perturb(const Bucket& b, const Group* options, const double* partials, int64_t num_partials, double eps,
                double* norm, Rounding rounding, int threads) {
  const Args args{b, options, norm_of(partials, num_partials), eps, rounding, threads};
  *norm = args.norm;
  const bool streams = num_elements(b) * b.itemsize >= kStreamBytes;
  with_dtype(b.dtype, [&](auto format) {
    if (streams) perturb_of<decltype(format), true>(args);
    else perturb_of<decltype(format), false>(args);
  });
  // Written last and within this call: no Python signal can come between the move and the note that says it must be
  // undone.
  int64_t tensors = 0;
  for (int64_t i = 0; i < b.num_tensors; ++i) {
    if (b.along[i] == 0) continue;
    ++tensors;
    b.saved[i] = b.weights[i];
  }
  return tensors;
}

}  // namespace SAM_ISA
}  // namespace sam
