// What a step does with one chunk: the walk over its vectors.
#pragma once

#include <array>
#include <utility>

#include "kernels.h"
#include "ends.h"
#include "simd.h"

namespace sam {
inline namespace SAM_ISA {

// The operations of steps.h on vectors. What is not a vector becomes one.
struct VectorMath {
  template <class A, class B, class V>
  static inline V madd(A a, B b, V c) {
    return MultiplyAdd::madd(as<V>(a), as<V>(b), c);
  }
  template <class V>
  static inline V root(V v) {
    return sam::root<static_cast<int>(sizeof(V) / sizeof(v[0]))>(v);
  }

 private:
  template <class V, class X>
  static inline V as(X x) {
    if constexpr (std::is_same_v<V, X>) return x;
    else return x - V{};  // x + V{} would lose the sign of a zero
  }
};

// The vectors of one dtype.
template <class T>
struct Lanes {
  using Bits = typename Storage<T>::Bits;
  using Compute = typename Storage<T>::Compute;
  static constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Compute));
  using V = Vec<Compute, kWidth>;
  template <class Part>
  static inline V read(const Bits* p, Part part) {
    return Storage<T>::template widen<kWidth>(part.template load<Vec<Bits, kWidth>>(p));
  }
  template <class Part>
  static inline void write(Bits* p, V v, Part part) {
    part.store(p, Storage<T>::template narrow<kWidth>(v));
  }
  // Past: writes past the caches. With `random` it rounds stochastically. A template parameter for that would double
  // the code, and save less than can be measured.
  template <bool Past, class Part>
  static inline void write_weight(Bits* p, V v, [[maybe_unused]] const RoundingBits* random, [[maybe_unused]] int64_t i,
                                  Part part) {
    Vec<Bits, kWidth> bits = Storage<T>::template narrow<kWidth>(v);
    if constexpr (kRounded<T>) {
      if (random != nullptr) bits = Storage<T>::template narrow<kWidth>(v, random->at(i));
    }
    if constexpr (Past) stream(p, bits);
    else part.store(p, bits);
  }
};

// What is computed once for all tensors of one group and counter.
template <class Step, class Compute>
struct Prepared {
  typename Step::template Numbers<Compute> numbers;
  Compute grad_scale;
  int flags;
};

// Where a run of elements is.
template <class T, int NumStates>
struct Elements {
  using Bits = typename Lanes<T>::Bits;
  const Bits* from;  // the weights as they were: the backup's, or `to`
  Bits* to;
  const Bits* grads;
  std::array<Bits*, NumStates> states;
};

// How many bytes ahead to prefetch. A hardware prefetcher stops at the end of a page; this one goes on. On a Zen 5 core
// it saves 5 to 15 % of a step with SGD that does not perturb, and 2 to 6 % of SGD's second step. Adam's second step
// has four streams to read and one that goes past the caches: it gained nothing.
constexpr int64_t kStepAhead = 2048;

template <class Step, class T>
struct ChunkStep {
  static constexpr int K = Step::kNumStates;
  using L = Lanes<T>;
  using V = typename L::V;
  using Bits = typename L::Bits;
  using P = Prepared<Step, typename L::Compute>;
  using E = Elements<T, K>;

  // The elements from i on, as many as a vector has, or a part of them.
  template <bool Past, class Flags, class Part = Whole>
  static inline void vector(const E& e, int64_t i, const P& prepared, Flags flags, const RoundingBits* random,
                            Part part = {}) {
    const V weight = L::read(e.from + i, part);
    const V grad = L::read(e.grads + i, part) * prepared.grad_scale;
    V states[K + 1];  // one more: there may be none
    for (int s = 0; s < K; ++s)
      if (Step::uses(s, flags)) states[s] = L::read(e.states[s] + i, part);
    const V stepped = Step::template apply<VectorMath>(weight, grad, states, prepared.numbers, flags);
    for (int s = 0; s < K; ++s)
      if (Step::uses(s, flags)) L::write(e.states[s] + i, states[s], part);
    L::template write_weight<Past>(e.to + i, stepped, random, i, part);
  }

  // The cache lines of `count` elements from the i-th on.
  template <class Flags>
  static inline void prefetch(const E& e, int64_t i, int64_t count, Flags flags) {
    for (const int64_t end = i + count; i < end; i += kLineBytes / static_cast<int64_t>(sizeof(Bits))) {
      __builtin_prefetch(e.from + i);
      __builtin_prefetch(e.grads + i);
      for (int s = 0; s < K; ++s)
        if (Step::uses(s, flags)) __builtin_prefetch(e.states[s] + i);
    }
  }

  // left: elements from the first to the tensor's last, behind which there is nothing to prefetch.
  template <bool Past, class Flags>
  static inline void run(const E& e, int64_t n, int64_t left, const P& in_memory, Flags flags,
                         const RoundingBits* random) {
    constexpr int64_t kTwo = 2 * L::kWidth, kAhead = kStepAhead / static_cast<int64_t>(sizeof(Bits));
    const P prepared = in_memory;  // so that the compiler knows that no store changes it
    int64_t i = 0;
    const auto two_vectors = [&] {
      for (int k = 0; k < 2; ++k, i += L::kWidth) vector<Past>(e, i, prepared, flags, random);
    };
    if constexpr (!Past || K < 2) {
      for (const int64_t end = left - kAhead < n ? left - kAhead : n; i + kTwo <= end;) {
        prefetch(e, i + kAhead, kTwo, flags);
        two_vectors();
      }
    }
    while (i + kTwo <= n) two_vectors();
    for (; i + L::kWidth <= n; i += L::kWidth) vector<Past>(e, i, prepared, flags, random);
    if (i < n) vector<false>(e, i, prepared, flags, random, First{n - i});
  }
};

// Calls call(std::integral_constant<int, flags>{}).
template <class Step, size_t... I, class Call>
inline void with_flags(int flags, std::index_sequence<I...>, const Call& call) {
  (void)((Step::kCombinations[I] == flags && (call(std::integral_constant<int, Step::kCombinations[I]>{}), true)) ||
         ...);
}

// past_caches: the old weights are read from the backup, so what is written over need not be read.
template <class Step, class T>
inline void step_chunk(const Elements<T, Step::kNumStates>& e, int64_t n, int64_t left,
                       const Prepared<Step, typename Lanes<T>::Compute>& prepared, bool past_caches,
                       const RoundingBits* random) {
  using Combinations = std::make_index_sequence<sizeof(Step::kCombinations) / sizeof(int)>;
  with_flags<Step>(prepared.flags, Combinations{}, [&](auto flags) {
    if (past_caches) ChunkStep<Step, T>::template run<true>(e, n, left, prepared, flags, random);
    else ChunkStep<Step, T>::template run<false>(e, n, left, prepared, flags, random);
  });
}

}  // namespace SAM_ISA
}  // namespace sam
