// The per-element formulas of SAM and ASAM, stated once for every native backend.
//
// V is a floating-point scalar or a SIMD vector of them. Nothing here may be contracted into fused multiply-adds (build
// with -ffp-contract=off / -fmad=false): every backend and every instruction set then computes the same bits.
//
// SAM:  Foret et al., https://arxiv.org/abs/2010.01412        e = rho * g / ||g||
// ASAM: Kwon et al.,  https://arxiv.org/abs/2102.11600        e = rho * T^2 g / ||T g||,  T = |w| + eta
#pragma once

#include <cfloat>

#ifdef __CUDACC__
#define SAM_HD __host__ __device__ __forceinline__
#else
#define SAM_HD inline
#endif

namespace sam {
// Each instruction set gets its own copy: a copy compiled for AVX-512 must never be linked into the baseline's code.
#ifdef SAM_ISA
inline namespace SAM_ISA {
#endif

// ASAM's normalization operator T.
template <class V>
SAM_HD V asam_t(V w, V eta) {
  return (w < V{} ? -w : w) + eta;
}

// The term whose square is summed into the squared norm.
template <class V>
SAM_HD V norm_term(V g) {
  return g;
}
template <class V>
SAM_HD V norm_term_adaptive(V w, V g, V eta) {
  return asam_t(w, eta) * g;
}

// w + e, given scale = rho / (||T g|| + eps).
template <class V>
SAM_HD V perturbed(V w, V g, V scale) {
  return w + g * scale;
}
template <class V>
SAM_HD V perturbed_adaptive(V w, V g, V eta, V scale) {
  const V t = asam_t(w, eta);
  // T g is at most the norm, so T g times the scale is at most rho. T T g alone may overflow, or lose its bits to
  // underflow.
  return w + ((t * g) * scale) * t;
}

// True if a first pass with this norm may perturb: an infinite or NaN norm has no direction.
SAM_HD bool can_perturb(double norm) { return norm - norm == 0.0; }

// rho / (norm + eps) in the arithmetic's own type. 0 where norm and eps are both 0: a zero gradient moves nothing. At
// most the largest finite number: a scale of infinity would make NaN of every element whose gradient is 0.
template <class Compute>
SAM_HD Compute perturb_scale(double norm, double rho, double eps) {
  constexpr double kMost = sizeof(Compute) == sizeof(float) ? FLT_MAX : DBL_MAX;
  const double scale = norm + eps > 0.0 ? rho / (norm + eps) : 0.0;
  return static_cast<Compute>(scale > kMost ? kMost : (scale < -kMost ? -kMost : scale));
}

#ifdef SAM_ISA
}  // namespace SAM_ISA
#endif
}  // namespace sam
