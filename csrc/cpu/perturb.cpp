// perturb: back the weights up and climb, w <- w + e, in one pass over memory.
#include "../sam_math.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace sam {
inline namespace SAM_ISA {
namespace {

template <class T>
struct Climb {
  using Bits = typename Storage<T>::Bits;
  using Compute = typename Storage<T>::Compute;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Compute));
  using B = Vec<Bits, kWidth>;
  using C = Vec<Compute, kWidth>;

  template <bool Adaptive, bool Stream, bool Stochastic>
  static inline void vector(Bits* w, const Bits* g, Bits* flat, C eta, C scale, [[maybe_unused]] const Dice& dice) {
    const B bits = load<B>(w);
    if constexpr (Stream) stream(flat, bits);
    else store(flat, bits);
    const C weight = Storage<T>::template widen<kWidth>(bits);
    const C grad = Storage<T>::template widen<kWidth>(load<B>(g));
    C moved;
    if constexpr (Adaptive) moved = climb_adaptive(weight, grad, eta, scale);
    else moved = climb(weight, grad, scale);
    if constexpr (Stochastic) store(w, Storage<T>::template narrow<kWidth>(moved, dice));
    else store(w, Storage<T>::template narrow<kWidth>(moved));
  }

  template <bool Adaptive, bool Stream, bool Stochastic>
  static void run(Bits* w, const Bits* g, Bits* flat, int64_t n, double eta_value, double scale_value, const Dice& dice) {
    const C eta = C{} + static_cast<Compute>(eta_value);
    const C scale = C{} + static_cast<Compute>(scale_value);
    int64_t i = 0;
    for (; i + 4 * kWidth <= n; i += 4 * kWidth)
      for (int k = 0; k < 4; ++k)
        vector<Adaptive, Stream, Stochastic>(w + i + k * kWidth, g + i + k * kWidth, flat + i + k * kWidth, eta, scale, dice.at(i + k * kWidth));
    for (; i + kWidth <= n; i += kWidth) vector<Adaptive, Stream, Stochastic>(w + i, g + i, flat + i, eta, scale, dice.at(i));
    if (i < n) {
      const size_t bytes = static_cast<size_t>(n - i) * sizeof(Bits);
      Bits w_tail[kWidth] = {}, g_tail[kWidth] = {}, flat_tail[kWidth];
      std::memcpy(w_tail, w + i, bytes);
      std::memcpy(g_tail, g + i, bytes);
      vector<Adaptive, false, Stochastic>(w_tail, g_tail, flat_tail, eta, scale, dice.at(i));
      std::memcpy(w + i, w_tail, bytes);
      std::memcpy(flat + i, flat_tail, bytes);
    }
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

template <class T, bool Stream, bool Stochastic>
void perturb_of(const PerturbArgs& a, double norm) {
  using Bits = typename Storage<T>::Bits;
  const bool climbs = can_climb(norm);
  parallel_chunks(a.chunks, a.threads, [&](Range range) {
    // Backwards: the gradients that grad_norm read last are the ones still in cache.
    for (int64_t i = range.end; i-- > range.begin;) {
      const Chunk& c = a.chunks.data[i];
      if (a.grads[c.row] == 0) continue;
      Bits* w = reinterpret_cast<Bits*>(a.weights[c.row]) + c.begin;
      const Bits* g = reinterpret_cast<const Bits*>(a.grads[c.row]) + c.begin;
      Bits* flat = static_cast<Bits*>(a.flat) + c.slot;
      const Group& group = a.groups[c.group];
      const auto scale = climb_scale<typename Storage<T>::Compute>(norm, group.rho, a.eps);
      const Dice dice{a.rounding.key, static_cast<uint32_t>(c.slot)};
      if (!climbs) std::memcpy(flat, w, static_cast<size_t>(c.count) * sizeof(Bits));
      else if (group.adaptive != 0.0) Climb<T>::template run<true, Stream, Stochastic>(w, g, flat, c.count, group.eta, scale, dice);
      else Climb<T>::template run<false, Stream, Stochastic>(w, g, flat, c.count, 0.0, scale, dice);
    }
    if constexpr (Stream) stream_fence();
  });
}

template <class T, bool Stream>
void perturb_of(const PerturbArgs& a, double norm) {
  if constexpr (kRounded<T>) {
    if (a.rounding.stochastic) return perturb_of<T, Stream, true>(a, norm);
  }
  perturb_of<T, Stream, false>(a, norm);
}

template <class T>
void perturb_of(const PerturbArgs& a) {
  const double norm = norm_of(a.partials, a.num_partials);
  const Chunk& last = a.chunks.data[a.chunks.size - 1];
  const int64_t bytes = (last.slot + last.count) * static_cast<int64_t>(sizeof(T));
  if (bytes >= kStreamBytes) perturb_of<T, true>(a, norm);
  else perturb_of<T, false>(a, norm);
  *a.norm = norm;
}

}  // namespace

int64_t perturb(const PerturbArgs& a) {
  if (a.chunks.size == 0) {
    *a.norm = norm_of(a.partials, a.num_partials);
    return 0;
  }
  switch (a.dtype) {
    case DType::f32: perturb_of<float>(a); break;
    case DType::f64: perturb_of<double>(a); break;
    case DType::bf16: perturb_of<bf16>(a); break;
    case DType::f16: perturb_of<f16>(a); break;
  }
  // Written last and within this call: no Python signal can come between a climb and the note that says it must be undone.
  int64_t rows = 0;
  for (int64_t i = 0; i < a.chunks.size; ++i) {
    const int64_t row = a.chunks.data[i].row;
    if (a.grads[row] == 0) continue;
    rows += a.chunks.data[i].begin == 0;
    a.saved[row] = a.weights[row];
  }
  return rows;
}

}  // namespace SAM_ISA
}  // namespace sam
