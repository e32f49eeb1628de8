// What the fused second steps have in common: the walk over chunks, and which rows they touch.
#pragma once

#include <array>

#include "../step_math.h"
#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace sam {
inline namespace SAM_ISA {

// The vectors of one dtype.
template <class T>
struct Lanes {
  using Bits = typename Storage<T>::Bits;
  using Compute = typename Storage<T>::Compute;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Compute));
  using C = Vec<Compute, kWidth>;
  static inline C read(const Bits* p) { return Storage<T>::template widen<kWidth>(load<Vec<Bits, kWidth>>(p)); }
  static inline void write(Bits* p, C v) { store(p, Storage<T>::template narrow<kWidth>(v)); }
  // Past: past the caches. With `dice` rounded stochastically. A template parameter would double the code for less than can be measured.
  template <bool Past>
  static inline void write_weight(Bits* p, C v, [[maybe_unused]] const Dice* dice, [[maybe_unused]] int64_t i) {
    Vec<Bits, kWidth> bits = Storage<T>::template narrow<kWidth>(v);
    if constexpr (kRounded<T>) {
      if (dice != nullptr) bits = Storage<T>::template narrow<kWidth>(v, dice->at(i));
    }
    if constexpr (Past) stream(p, bits);
    else store(p, bits);
  }
  static inline C all(double value) { return C{} + static_cast<Compute>(value); }
};

template <class T, int K>
using States = std::array<typename Lanes<T>::Bits*, K>;

// How a chunk's new weights are stored.
struct Output {
  bool past_caches;
  bool stochastic;
  Dice dice;  // of the chunk's first element
};

// step.apply(from, g, states) on every vector of n elements gives its new weight, from the weight at `from` and the gradient, and updates the K arrays of
// the base optimizer's state.
template <class T, bool Past, int K, class Step>
inline void for_vectors(int64_t n, const Step& step, const typename Lanes<T>::Bits* from, typename Lanes<T>::Bits* to,
                        const typename Lanes<T>::Bits* g, const States<T, K>& states, const Dice* dice) {
  using L = Lanes<T>;
  using Bits = typename Lanes<T>::Bits;
  constexpr int kWidth = Lanes<T>::kWidth;
  const auto at = [&states](int64_t i) {
    States<T, K> moved{};
    for (int s = 0; s < K; ++s) moved[s] = states[s] + i;
    return moved;
  };
  int64_t i = 0;
  for (; i + 2 * kWidth <= n; i += 2 * kWidth)
    for (int k = 0; k < 2; ++k) {
      const int64_t j = i + k * kWidth;
      L::template write_weight<Past>(to + j, step.apply(from + j, g + j, at(j)), dice, j);
    }
  for (; i + kWidth <= n; i += kWidth) L::template write_weight<Past>(to + i, step.apply(from + i, g + i, at(i)), dice, i);
  if (i == n) return;
  const size_t bytes = static_cast<size_t>(n - i) * sizeof(Bits);
  Bits tails[K + 3][kWidth] = {};
  States<T, K> state_tails{};
  std::memcpy(tails[K], from + i, bytes);
  std::memcpy(tails[K + 1], g + i, bytes);
  for (int s = 0; s < K; ++s) {
    std::memcpy(tails[s], states[s] + i, bytes);
    state_tails[s] = tails[s];
  }
  L::template write_weight<false>(tails[K + 2], step.apply(tails[K], tails[K + 1], state_tails), dice, i);
  std::memcpy(to + i, tails[K + 2], bytes);
  for (int s = 0; s < K; ++s) std::memcpy(states[s] + i, tails[s], bytes);
}

template <class T, int K, class Step>
inline void for_vectors(int64_t n, const Step& step, const typename Lanes<T>::Bits* from, typename Lanes<T>::Bits* to,
                        const typename Lanes<T>::Bits* g, const States<T, K>& states, const Output& output) {
  const Dice* dice = output.stochastic ? &output.dice : nullptr;
  if (output.past_caches) for_vectors<T, true, K>(n, step, from, to, g, states, dice);
  else for_vectors<T, false, K>(n, step, from, to, g, states, dice);
}

// work(chunk, from, to, g, output) for every chunk of a row with a gradient.
template <class T, class Work>
inline void for_updated_chunks(const UpdateArgs& a, const Work& work) {
  using Bits = typename Lanes<T>::Bits;
  if (a.chunks.size == 0) return;
  const Chunk& last = a.chunks.data[a.chunks.size - 1];
  const bool large = (last.slot + last.count) * static_cast<int64_t>(sizeof(Bits)) >= kStreamBytes;
  parallel_chunks(a.chunks, a.threads, [&](Range range) {
    for (int64_t i = range.begin; i < range.end; ++i) {
      const Chunk& c = a.chunks.data[i];
      if (a.grads[c.row] == 0) continue;
      Bits* to = reinterpret_cast<Bits*>(a.weights[c.row]) + c.begin;
      const Bits* g = reinterpret_cast<const Bits*>(a.grads[c.row]) + c.begin;
      const Bits* from = a.saved[c.row] != 0 ? static_cast<const Bits*>(a.flat) + c.slot : to;
      // Only the backup is read from: what is written here need not be read before.
      const bool aligned = reinterpret_cast<uintptr_t>(to) % kVectorBytes == 0;
      work(c, from, to, g, Output{large && aligned && from != to, a.rounding.stochastic, Dice{a.rounding.key, static_cast<uint32_t>(c.slot)}});
    }
    if (large) stream_fence();
  });
}

// Notes which rows are as the step left them; returns how many are still saved.
inline int64_t release_updated(const UpdateArgs& a) {
  int64_t left = 0;
  for (int64_t row = 0; row < a.num_rows; ++row) {
    if (a.grads[row] != 0) a.saved[row] = 0;
    left += a.saved[row] != 0;
  }
  return left;
}

}  // namespace SAM_ISA
}  // namespace sam
