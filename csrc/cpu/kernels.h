// The operations of the cpu backend, as the bindings call them. Each is one file, compiled once per instruction set.
//
// Addresses: weights[row], grads[row], saved[row] are the address of a row's first element, 0 where there is none. A row without a
// gradient takes no part. All tensors of a bucket have one dtype; the flat buffer is aligned to 64 bytes and so is every row's slot in it.
// Sums are taken per chunk and in a fixed order: results do not depend on the number of threads, nor on the instruction set.
#pragma once

#include <cstdint>

#include "../table.h"

namespace sam {

// partials[i] = sum over chunk i of (T g)^2, in float64; 0 for rows without a gradient.
struct GradNormArgs {
  DType dtype;
  Chunks chunks;
  const uint64_t* weights;
  const uint64_t* grads;
  const Group* groups;
  double* partials;
  int threads;
};

// norm = sqrt(sum of partials); flat = w; saved = address of w; w = w + rho / (norm + eps) * T^2 g, left alone if the norm is not finite.
// w is rounded as `rounding` says. Returns the number of rows with elements that it saved.
struct PerturbArgs {
  DType dtype;
  Chunks chunks;
  const uint64_t* weights;
  const uint64_t* grads;
  uint64_t* saved;
  const Group* groups;
  const double* partials;
  int64_t num_partials;
  double eps;
  double* norm;
  void* flat;
  Rounding rounding;
  int threads;
};

// Copies rows to (backup) or from (restore) the bucket's flat buffer, for any element size. Rows with address 0 are skipped.
// backup: saved = address of the row. restore: only rows that are saved; with `release` they are not saved any more afterwards.
struct CopyArgs {
  int64_t itemsize;
  Chunks chunks;
  const uint64_t* rows;
  uint64_t* saved;
  void* flat;
  bool release;
  int threads;
};

// The second step in one pass: w as it was backed up (or as it is, for a row that was not), updated with the gradient as torch.optim does it.
// Rows without a gradient are left alone, saved or not; those that were updated are not saved any more. Returns how many rows still are.
// state addresses are 0 where the group's options need none. Gradients are multiplied by grad_scale first.
struct UpdateArgs {
  DType dtype;
  Chunks chunks;
  int64_t num_rows;
  const uint64_t* weights;
  const uint64_t* grads;
  uint64_t* saved;
  const void* flat;
  double grad_scale;
  Rounding rounding;
  int threads;
};

struct RestoreSgdArgs {
  UpdateArgs update;
  const SgdGroup* groups;
  const uint64_t* momentum_buffers;
};

// Adds 1 to the step counters (float32) of the rows that it updates.
struct RestoreAdamArgs {
  UpdateArgs update;
  const AdamGroup* groups;
  const uint64_t* steps;
  const uint64_t* exp_avgs;
  const uint64_t* exp_avg_sqs;
  const uint64_t* max_exp_avg_sqs;
};

struct Kernels {
  const char* isa;
  void (*grad_norm)(const GradNormArgs&);
  int64_t (*perturb)(const PerturbArgs&);
  void (*backup)(const CopyArgs&);
  void (*restore)(const CopyArgs&);
  int64_t (*restore_sgd)(const RestoreSgdArgs&);
  int64_t (*restore_adam)(const RestoreAdamArgs&);
};

// The fastest kernels this processor can run; null if `isa` is given and is unknown or not supported here.
const Kernels* select_kernels(const char* isa = nullptr);

}  // namespace sam
