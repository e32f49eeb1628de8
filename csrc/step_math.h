// The per-element formulas of the base optimizers, stated once for every native backend, with the operations and roundings of torch.optim's default
// path: where PyTorch's kernels use a fused multiply-add, so does this. Results then equal restore + step() to the bit in float32 and float64.
//
// V: as in sam_math.h. M::madd(a, b, c) = a * b + c, rounded once where PyTorch on the same processor rounds once.
#pragma once

#include "sam_math.h"

namespace sam {
#ifdef SAM_ISA
inline namespace SAM_ISA {
#endif

// Weight decay as part of the gradient (SGD, Adam), and decoupled from it (AdamW: factor = 1 - lr * weight_decay).
template <class M, class V>
SAM_HD V decayed_gradient(V w, V g, V decay) {
  return M::madd(w, decay, g);
}
template <class V>
SAM_HD V decayed_weight(V w, V factor) {
  return w * factor;
}

// SGD: keep = 1 - dampening.
template <class M, class V>
SAM_HD V sgd_momentum(V m, V g, V momentum, V keep) {
  return M::madd(g, keep, m * momentum);
}
template <class M, class V>
SAM_HD V sgd_nesterov(V g, V m, V momentum) {
  return M::madd(m, momentum, g);
}
template <class M, class V>
SAM_HD V sgd_step(V w, V direction, V minus_lr) {
  return M::madd(direction, minus_lr, w);
}

// Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980): keep = 1 - beta. The first moment is torch.lerp(m, g, keep), which starts from the nearer
// end: coefficient = keep and base = m where keep < 0.5, else keep - 1 and g.
template <class M, class V>
SAM_HD V adam_first_moment(V m, V g, V coefficient, bool from_m) {
  return M::madd(coefficient, g - m, from_m ? m : g);
}
template <class M, class V>
SAM_HD V adam_second_moment(V v, V g, V beta2, V keep) {
  return M::madd(g * keep, g, v * beta2);
}
// minus_step_size = -lr / (1 - beta1^t), root_correction = sqrt(1 - beta2^t).
template <class V>
SAM_HD V adam_step(V w, V m, V root_of_v, V minus_step_size, V root_correction, V eps) {
  return w + (m * minus_step_size) / (root_of_v / root_correction + eps);
}

#ifdef SAM_ISA
}  // namespace SAM_ISA
#endif
}  // namespace sam
