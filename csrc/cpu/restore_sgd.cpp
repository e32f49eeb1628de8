// restore_sgd: put w back and step as torch.optim.SGD does, in one pass over memory.
#include "update.h"

namespace sam {
inline namespace SAM_ISA {
namespace {

enum class Momentum { none, plain, nesterov };

template <class T, Momentum M, bool Decay>
struct SgdStep {
  using L = Lanes<T>;
  using Bits = typename L::Bits;
  using C = typename L::C;
  C minus_lr, momentum, keep, decay, scale;

  SgdStep(const SgdGroup& group, double grad_scale)
      : minus_lr(L::all(-group.lr)),
        momentum(L::all(group.momentum)),
        keep(L::all(1.0 - group.dampening)),
        decay(L::all(group.weight_decay)),
        scale(L::all(group.maximize != 0.0 ? -grad_scale : grad_scale)) {}

  static constexpr int kStates = M == Momentum::none ? 0 : 1;

  inline C apply(const Bits* from, const Bits* g, const States<T, kStates>& states) const {
    const C weight = L::read(from);
    C direction = L::read(g) * scale;
    if constexpr (Decay) direction = decayed_gradient<MultiplyAdd>(weight, direction, decay);
    if constexpr (M != Momentum::none) {
      const C buffer = sgd_momentum<MultiplyAdd>(L::read(states[0]), direction, momentum, keep);
      L::write(states[0], buffer);
      direction = M == Momentum::nesterov ? sgd_nesterov<MultiplyAdd>(direction, buffer, momentum) : buffer;
    }
    return sgd_step<MultiplyAdd>(weight, direction, minus_lr);
  }
};

template <class T, Momentum M, bool Decay>
void step_chunk(const SgdGroup& group, double grad_scale, const Chunk& c, const typename Lanes<T>::Bits* from, typename Lanes<T>::Bits* to,
                const typename Lanes<T>::Bits* g, uint64_t buffer, const Output& output) {
  const SgdStep<T, M, Decay> step(group, grad_scale);
  constexpr int K = SgdStep<T, M, Decay>::kStates;
  States<T, K> states{};
  if constexpr (K == 1) states[0] = reinterpret_cast<typename Lanes<T>::Bits*>(buffer) + c.begin;
  for_vectors<T, K>(c.count, step, from, to, g, states, output);
}

template <class T>
void restore_sgd_of(const RestoreSgdArgs& a) {
  for_updated_chunks<T>(a.update, [&](const Chunk& c, const auto* from, auto* to, const auto* g, const Output& output) {
    const SgdGroup& group = a.groups[c.group];
    const uint64_t m = a.momentum_buffers[c.row];
    const double scale = a.update.grad_scale;
    const bool decay = group.weight_decay != 0.0;
    if (group.momentum == 0.0) {
      if (decay) step_chunk<T, Momentum::none, true>(group, scale, c, from, to, g, m, output);
      else step_chunk<T, Momentum::none, false>(group, scale, c, from, to, g, m, output);
    } else if (group.nesterov == 0.0) {
      if (decay) step_chunk<T, Momentum::plain, true>(group, scale, c, from, to, g, m, output);
      else step_chunk<T, Momentum::plain, false>(group, scale, c, from, to, g, m, output);
    } else {
      if (decay) step_chunk<T, Momentum::nesterov, true>(group, scale, c, from, to, g, m, output);
      else step_chunk<T, Momentum::nesterov, false>(group, scale, c, from, to, g, m, output);
    }
  });
}

}  // namespace

int64_t restore_sgd(const RestoreSgdArgs& a) {
  switch (a.update.dtype) {
    case DType::f32: restore_sgd_of<float>(a); break;
    case DType::f64: restore_sgd_of<double>(a); break;
    case DType::bf16: restore_sgd_of<bf16>(a); break;
    case DType::f16: restore_sgd_of<f16>(a); break;
  }
  return release_updated(a.update);
}

}  // namespace SAM_ISA
}  // namespace sam
