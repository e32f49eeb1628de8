// restore_adam: put w back and step as torch.optim.Adam or AdamW does, in one pass over memory.
#include <cmath>
#include <vector>

#include "update.h"

namespace sam {
inline namespace SAM_ISA {
namespace {

// The bias corrections of one row: rows may have taken different numbers of steps.
struct Corrections {
  double minus_step_size;
  double root_correction;
};

enum class Decay { coupled, decoupled };  // none is decoupled, with a factor of 1

template <class T, Decay D, bool AmsGrad>
struct AdamStep {
  using L = Lanes<T>;
  using Bits = typename L::Bits;
  using C = typename L::C;
  bool from_m;
  C coefficient, beta2, keep2, eps, decay, scale, minus_step_size, root_correction;

  AdamStep(const AdamGroup& group, const Corrections& row, double grad_scale)
      : from_m(static_cast<typename L::Compute>(1.0 - group.beta1) < static_cast<typename L::Compute>(0.5)),
        coefficient(L::all(1.0 - group.beta1) - (from_m ? C{} : L::all(1.0))),
        beta2(L::all(group.beta2)),
        keep2(L::all(1.0 - group.beta2)),
        eps(L::all(group.eps)),
        decay(L::all(D == Decay::decoupled ? 1.0 - group.lr * group.weight_decay : group.weight_decay)),
        scale(L::all(group.maximize != 0.0 ? -grad_scale : grad_scale)),
        minus_step_size(L::all(row.minus_step_size)),
        root_correction(L::all(row.root_correction)) {}

  static constexpr int kStates = AmsGrad ? 3 : 2;  // exp_avg, exp_avg_sq, max_exp_avg_sq

  inline C apply(const Bits* from, const Bits* g, const States<T, kStates>& states) const {
    C weight = L::read(from);
    C grad = L::read(g) * scale;
    if constexpr (D == Decay::coupled) grad = decayed_gradient<MultiplyAdd>(weight, grad, decay);
    if constexpr (D == Decay::decoupled) weight = decayed_weight(weight, decay);
    const C m = adam_first_moment<MultiplyAdd>(L::read(states[0]), grad, coefficient, from_m);
    C v = adam_second_moment<MultiplyAdd>(L::read(states[1]), grad, beta2, keep2);
    L::write(states[0], m);
    L::write(states[1], v);
    if constexpr (AmsGrad) {
      const C before = L::read(states[2]);
      v = before > v || before != before ? before : v;  // as torch.maximum: NaN stays
      L::write(states[2], v);
    }
    return adam_step(weight, m, root<L::kWidth>(v), minus_step_size, root_correction, eps);
  }
};

template <class T, Decay D, bool AmsGrad>
void step_chunk(const RestoreAdamArgs& a, const Corrections& row, const Chunk& c, const typename Lanes<T>::Bits* from, typename Lanes<T>::Bits* to,
                const typename Lanes<T>::Bits* g, const Output& output) {
  using Bits = typename Lanes<T>::Bits;
  using Step = AdamStep<T, D, AmsGrad>;
  const Step step(a.groups[c.group], row, a.update.grad_scale);
  States<T, Step::kStates> states{};
  states[0] = reinterpret_cast<Bits*>(a.exp_avgs[c.row]) + c.begin;
  states[1] = reinterpret_cast<Bits*>(a.exp_avg_sqs[c.row]) + c.begin;
  if constexpr (AmsGrad) states[2] = reinterpret_cast<Bits*>(a.max_exp_avg_sqs[c.row]) + c.begin;
  for_vectors<T, Step::kStates>(c.count, step, from, to, g, states, output);
}

template <class T, Decay D>
void step_chunk(const RestoreAdamArgs& a, const Corrections& row, const Chunk& c, const typename Lanes<T>::Bits* from, typename Lanes<T>::Bits* to,
                const typename Lanes<T>::Bits* g, const Output& output) {
  if (a.groups[c.group].amsgrad != 0.0) step_chunk<T, D, true>(a, row, c, from, to, g, output);
  else step_chunk<T, D, false>(a, row, c, from, to, g, output);
}

template <class T>
void restore_adam_of(const RestoreAdamArgs& a, const std::vector<Corrections>& corrections) {
  for_updated_chunks<T>(a.update, [&](const Chunk& c, const auto* from, auto* to, const auto* g, const Output& output) {
    const AdamGroup& group = a.groups[c.group];
    const Corrections& row = corrections[static_cast<size_t>(c.row)];
    if (group.decoupled == 0.0 && group.weight_decay != 0.0) step_chunk<T, Decay::coupled>(a, row, c, from, to, g, output);
    else step_chunk<T, Decay::decoupled>(a, row, c, from, to, g, output);
  });
}

// Counts the step and computes what follows from its number.
std::vector<Corrections> count_steps(const RestoreAdamArgs& a, const std::vector<int64_t>& group_of) {
  std::vector<Corrections> corrections(static_cast<size_t>(a.update.num_rows));
  const AdamGroup* last_group = nullptr;  // rows mostly have their group and count in common
  float last_step = 0.0f;
  Corrections last{};
  for (int64_t row = 0; row < a.update.num_rows; ++row) {
    if (a.update.grads[row] == 0) continue;
    const AdamGroup& group = a.groups[group_of[static_cast<size_t>(row)]];
    float* step = reinterpret_cast<float*>(a.steps[row]);
    *step += 1.0f;
    if (&group != last_group || *step != last_step) {
      const double t = static_cast<double>(*step);
      last = {-group.lr / (1.0 - std::pow(group.beta1, t)), std::sqrt(1.0 - std::pow(group.beta2, t))};
      last_group = &group;
      last_step = *step;
    }
    corrections[static_cast<size_t>(row)] = last;
  }
  return corrections;
}

}  // namespace

int64_t restore_adam(const RestoreAdamArgs& a) {
  std::vector<int64_t> group_of(static_cast<size_t>(a.update.num_rows));
  for (int64_t i = 0; i < a.update.chunks.size; ++i) group_of[static_cast<size_t>(a.update.chunks.data[i].row)] = a.update.chunks.data[i].group;
  const std::vector<Corrections> corrections = count_steps(a, group_of);
  switch (a.update.dtype) {
    case DType::f32: restore_adam_of<float>(a, corrections); break;
    case DType::f64: restore_adam_of<double>(a, corrections); break;
    case DType::bf16: restore_adam_of<bf16>(a, corrections); break;
    case DType::f16: restore_adam_of<f16>(a, corrections); break;
  }
  return release_updated(a.update);
}

}  // namespace SAM_ISA
}  // namespace sam
