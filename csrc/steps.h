// The fused steps of base optimizers, each stated once for every native backend. A new one is a struct here and a line
// in SAM_STEPS; the build, the kernels, the bindings and the tests read that list.
//
// Formulas have the operations and roundings of torch.optim's default path: where PyTorch's kernels use a fused
// multiply-add, so do these. Results then equal restore + step() to the bit in float32 and float64.
//
// A step has
//   Options       what a parameter group may set, all doubles (flags are 0 or 1); `lr` and `maximize` are among them
//   kStates       the names of its state in torch.optim, a tensor like the parameter each; kNumStates of them
//   kCounts       whether it has step counters; then counted(options, t) is what follows from the number t of a step
//   flags()       what the options switch on and off. kCombinations: all that may come out; the CPU has code for each
//   uses()        whether it has this state, given the flags
//   numbers()     what apply() takes: computed in float64, once for all tensors of one group and counter, and rounded
//                 to C, the type of the arithmetic
//   apply()       an element's new weight from its weight, its gradient and its state, which it updates
// V is C or a SIMD vector of C. `flags` is an int, or on the CPU a std::integral_constant. M::madd(a, b, c) = a * b +
// c, rounded once where PyTorch on the same processor rounds once, M::root is the square root.
#pragma once

#include <cmath>

#include "sam_math.h"
#include "table.h"

namespace sam {
#ifdef SAM_ISA
inline namespace SAM_ISA {
#endif

// Defines Options, their names, and switched(on): options of which the i-th is on if bit i of `on` is.
#define SAM_OPTION_MEMBER(name) double name;
#define SAM_OPTION_NAME(name) #name,
#define SAM_OPTION_SWITCH(name) (on >> i++ & 1) * 0.5,
#define SAM_OPTIONS(LIST)                                            \
  struct Options {                                                   \
    LIST(SAM_OPTION_MEMBER)                                          \
  };                                                                 \
  static constexpr const char* kOptions[] = {LIST(SAM_OPTION_NAME)}; \
  static constexpr Options switched(int on) {                        \
    int i = 0;                                                       \
    return {LIST(SAM_OPTION_SWITCH)};                                \
  }

// The base of steps without counters.
struct Uncounted {
  static constexpr bool kCounts = false;
  struct Counted {};
  template <class Options>
  static SAM_HD Counted counted(const Options&, double) {
    return {};
  }
};

// torch.lerp(a, b, weight), which starts from the nearer end.
template <class C>
struct Lerp {
  C coefficient;
  bool from_a;
  static SAM_HD Lerp of(double weight) {
    const C rounded = C(weight);
    const bool from_a = rounded < C(0.5);
    return {from_a ? rounded : rounded - C(1.0), from_a};
  }
  template <class M, class V>
  SAM_HD V between(V a, V b) const {
    return M::madd(coefficient, b - a, from_a ? a : b);
  }
};

// ---- torch.optim.SGD ------------------------------------------------------------------------------------------------

#define SAM_SGD_OPTIONS(X) X(lr) X(momentum) X(dampening) X(weight_decay) X(nesterov) X(maximize)

struct Sgd : Uncounted {
  SAM_OPTIONS(SAM_SGD_OPTIONS)
  static constexpr int kNumStates = 1;
  static constexpr const char* kStates[kNumStates] = {"momentum_buffer"};

  static constexpr int kDecay = 1, kMomentum = 2, kNesterov = 4;
  static constexpr int kCombinations[] = {0,      kMomentum,          kMomentum | kNesterov,
                                          kDecay, kMomentum | kDecay, kMomentum | kNesterov | kDecay};
  static SAM_HD constexpr int flags(const Options& o) {
    const int momentum = o.momentum == 0.0 ? 0 : kMomentum | (o.nesterov == 0.0 ? 0 : kNesterov);
    return momentum | (o.weight_decay == 0.0 ? 0 : kDecay);
  }
  static SAM_HD constexpr bool uses(int, int flags) { return (flags & kMomentum) != 0; }

  template <class C>
  struct Numbers {
    C minus_lr, momentum, keep, decay;
  };
  template <class C>
  static SAM_HD Numbers<C> numbers(const Options& o, double lr, const Counted&) {
    return {C(-lr), C(o.momentum), C(1.0 - o.dampening), C(o.weight_decay)};
  }

  template <class M, class C, class V, class Flags>
  static SAM_HD V apply(V w, V g, V* state, const Numbers<C>& n, Flags flags) {
    if (flags & kDecay) g = M::madd(w, n.decay, g);
    if (flags & kMomentum) {
      state[0] = M::madd(g, n.keep, state[0] * n.momentum);
      if (flags & kNesterov) g = M::madd(state[0], n.momentum, g);
      else g = state[0];
    }
    return M::madd(g, n.minus_lr, w);
  }
};

// ---- torch.optim.Adam and AdamW (Kingma and Ba, https://arxiv.org/abs/1412.6980) ------------------------------------

// decoupled: the weight decay is AdamW's.
#define SAM_ADAM_OPTIONS(X) X(lr) X(beta1) X(beta2) X(eps) X(weight_decay) X(decoupled) X(amsgrad) X(maximize)

struct Adam {
  SAM_OPTIONS(SAM_ADAM_OPTIONS)
  static constexpr int kNumStates = 3;
  static constexpr const char* kStates[kNumStates] = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"};

  static constexpr bool kCounts = true;
  struct Counted {
    double correction1, root_of_correction2;
  };
  static SAM_HD Counted counted(const Options& o, double t) {
    return {1.0 - pow(o.beta1, t), sqrt(1.0 - pow(o.beta2, t))};
  }

  // Weight decay that is not coupled is decoupled, with a factor of 1 where there is none.
  static constexpr int kCoupled = 1, kAmsgrad = 2;
  static constexpr int kCombinations[] = {0, kCoupled, kAmsgrad, kAmsgrad | kCoupled};
  static SAM_HD constexpr int flags(const Options& o) {
    return (o.decoupled == 0.0 && o.weight_decay != 0.0 ? kCoupled : 0) | (o.amsgrad == 0.0 ? 0 : kAmsgrad);
  }
  static SAM_HD constexpr bool uses(int state, int flags) { return state < 2 || (flags & kAmsgrad) != 0; }

  template <class C>
  struct Numbers {
    Lerp<C> first;
    C beta2, keep2, eps, decay, minus_step_size, root_of_correction2;
  };
  template <class C>
  static SAM_HD Numbers<C> numbers(const Options& o, double lr, const Counted& c) {
    const double decay = flags(o) & kCoupled ? o.weight_decay : 1.0 - lr * o.weight_decay;
    return {Lerp<C>::of(1.0 - o.beta1), C(o.beta2), C(1.0 - o.beta2), C(o.eps), C(decay), C(-lr / c.correction1),
            C(c.root_of_correction2)};
  }

  template <class M, class C, class V, class Flags>
  static SAM_HD V apply(V w, V g, V* state, const Numbers<C>& n, Flags flags) {
    if (flags & kCoupled) g = M::madd(w, n.decay, g);
    else w = w * n.decay;
    const V m = n.first.template between<M>(state[0], g);
    V v = M::madd(g * n.keep2, g, state[1] * n.beta2);
    state[0] = m;
    state[1] = v;
    if (flags & kAmsgrad) {
      const V before = state[2];
      v = before > v || before != before ? before : v;  // as torch.maximum: NaN stays
      state[2] = v;
    }
    return w + (m * n.minus_step_size) / (M::root(v) / n.root_of_correction2 + n.eps);
  }
};

// ---- Lion (Chen et al., https://arxiv.org/abs/2302.06675) -----------------------------------------------------------

// coupled: the weight decay is part of the gradient. fixed_decay: it is not multiplied by lr. interpolated: averages
// are torch.lerp's; else each is m * beta + g * (1 - beta).
#define SAM_LION_OPTIONS(X) \
  X(lr) X(beta1) X(beta2) X(weight_decay) X(coupled) X(fixed_decay) X(interpolated) X(maximize)

struct Lion : Uncounted {
  SAM_OPTIONS(SAM_LION_OPTIONS)
  static constexpr int kNumStates = 1;
  static constexpr const char* kStates[kNumStates] = {"exp_avg"};

  // Weight decay that is not coupled is decoupled, with a factor of 1 where there is none.
  static constexpr int kCoupled = 1, kInterpolated = 2;
  static constexpr int kCombinations[] = {0, kCoupled, kInterpolated, kInterpolated | kCoupled};
  static SAM_HD constexpr int flags(const Options& o) {
    const int coupled = o.coupled != 0.0 && o.weight_decay != 0.0 ? kCoupled : 0;
    return coupled | (o.interpolated == 0.0 ? 0 : kInterpolated);
  }
  static SAM_HD constexpr bool uses(int, int) { return true; }

  template <class C>
  struct Numbers {
    Lerp<C> first, second;
    C beta1, keep1, beta2, keep2, decay, minus_lr;
  };
  template <class C>
  static SAM_HD Numbers<C> numbers(const Options& o, double lr, const Counted&) {
    const double decoupled = o.coupled != 0.0 ? 1.0 : 1.0 - o.weight_decay * (o.fixed_decay != 0.0 ? 1.0 : lr);
    const double decay = flags(o) & kCoupled ? o.weight_decay : decoupled;
    return {Lerp<C>::of(1.0 - o.beta1),
            Lerp<C>::of(1.0 - o.beta2),
            C(o.beta1),
            C(1.0 - o.beta1),
            C(o.beta2),
            C(1.0 - o.beta2),
            C(decay),
            C(-lr)};
  }

  template <class M, class C, class V, class Flags>
  static SAM_HD V apply(V w, V g, V* state, const Numbers<C>& n, Flags flags) {
    if (flags & kCoupled) g = M::madd(w, n.decay, g);
    else w = w * n.decay;
    const V m = state[0];
    V direction;
    if (flags & kInterpolated) {
      direction = n.first.template between<M>(m, g);
      state[0] = n.second.template between<M>(m, g);
    } else {
      direction = M::madd(g, n.keep1, m * n.beta1);
      state[0] = M::madd(g, n.keep2, m * n.beta2);
    }
    const V zero{};
    const V sign = (direction > zero ? zero + C(1) : zero) - (direction < zero ? zero + C(1) : zero);  // of NaN: 0
    return M::madd(sign, n.minus_lr, w);
  }
};

// ---- The list -------------------------------------------------------------------------------------------------------

// The name in the bindings, and the struct. One to a line: the build reads it too.
#define SAM_STEPS(X) \
  X(sgd, Sgd)        \
  X(adam, Adam)      \
  X(lion, Lion)

#define SAM_COUNT_STEP(name, Step) +1
constexpr int kNumSteps = 0 SAM_STEPS(SAM_COUNT_STEP);

// Whether kCombinations has the flags of all options that are on or off.
template <class Step>
constexpr bool has_all_combinations() {
  constexpr int kNumOptions = static_cast<int>(sizeof(Step::kOptions) / sizeof(*Step::kOptions));
  for (int on = 0; on < 1 << kNumOptions; ++on) {
    bool found = false;
    for (const int flags : Step::kCombinations) found = found || flags == Step::flags(Step::switched(on));
    if (!found) return false;
  }
  return true;
}
#define SAM_CHECK_STEP(name, Step) static_assert(has_all_combinations<Step>() && Step::kNumStates <= kMaxStates, #name);
SAM_STEPS(SAM_CHECK_STEP)

#ifdef SAM_ISA
}  // namespace SAM_ISA
#endif
}  // namespace sam
