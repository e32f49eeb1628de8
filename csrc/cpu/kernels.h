// The operations of the cpu backend, as the bindings call them. Each is one file, compiled once per instruction set;
// the step once for each of SAM_STEPS too.
//
// A tensor without a direction (Bucket::along) takes no part. Sums are taken per chunk and in a fixed order: results do
// not depend on the number of threads, nor on the instruction set.
#pragma once

#include <cstdint>

#include "../steps.h"
#include "../table.h"

namespace sam {

struct Kernels {
  const char* isa;

  // partials[i] = sum over chunk i of (T g)^2, in float64; 0 for tensors that take no part.
  void (*grad_norm)(const Bucket&, const Group* options, double* partials, int threads);

  // norm = sqrt(sum of partials); backup = w; saved = address of w; w = w + rho / (norm + eps) * T^2 g, left alone if
  // the norm is not finite. Returns the number of tensors with elements that it saved.
  int64_t (*perturb)(const Bucket&, const Group* options, const double* partials, int64_t num_partials, double eps,
                     double* norm, Rounding, int threads);

  // Copy weights to or from the backup, whatever their dtype. backup: saved = address of w. restore: only tensors that
  // are saved; with `release` they are not saved any more afterwards.
  void (*backup)(const Bucket&, int threads);
  void (*restore)(const Bucket&, bool release, int threads);

  // Restore and the base optimizer's step in one pass: w as it was backed up (or as it is, for a tensor that was not),
  // updated as torch.optim does it with the gradient times grad_scale. Counts the step. The tensors that took part are
  // not saved any more; returns how many still are. options: a Step::Options for each group.
  int64_t (*steps[kNumSteps])(const Bucket&, const void* options, double grad_scale, Rounding, int threads);
};

// The fastest kernels this processor can run; null if `isa` is given and is unknown or not supported here.
const Kernels* select_kernels(const char* isa = nullptr);

}  // namespace sam
