// The operations of the cuda backend, as the bindings call them: asynchronous, on one stream of one device. Each is one file.
//
// Addresses are as in csrc/cpu/kernels.h; they, the row table and the groups lie in host memory and are not needed after the call. All other
// pointers are the device's. Errors are thrown as std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../table.h"

namespace sam::cuda {

// The rows, and what a kernel has to know of the group that each is in.
template <class Group>
struct Bucket {
  const Row* rows;
  int64_t num_rows;
  const Group* groups;
};

// A stream, and how large its kernels' arguments may be.
struct Place {
  cudaStream_t stream;
  bool large_arguments;
};

// Throws if the current device has no machine code here, or the driver cannot run it.
void probe();

// The number of partial sums that grad_norm writes for these rows on the current device, whichever of them have a gradient.
int grad_norm_blocks(DType dtype, const Row* rows, int64_t num_rows);

// partials[0 .. blocks) = partial sums of (T g)^2 over all rows with a gradient, in float64.
void grad_norm(DType dtype, const Bucket<Group>& bucket, const uint64_t* weights, const uint64_t* grads, double* partials, int blocks, Place place);

// As sam::PerturbArgs in csrc/cpu/kernels.h. Every block sums the partials itself. `saved` (host memory) is written launch by launch.
// reverse: walk the tiles backwards, so that the gradients that grad_norm read last come first.
int64_t perturb(DType dtype, const Bucket<Group>& bucket, const uint64_t* weights, const uint64_t* grads, uint64_t* saved, const double* partials,
                int num_partials, double eps, double* norm, void* flat, bool reverse, Rounding rounding, Place place);

// As sam::CopyArgs in csrc/cpu/kernels.h.
void backup(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, uint64_t* saved, void* flat, Place place);
void restore(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, uint64_t* saved, const void* flat, bool release, Place place);

// As sam::UpdateArgs in csrc/cpu/kernels.h, and what only the device knows. `saved` (host memory) is written launch by launch.
// grad_scale: gradients are divided by it; null: by 1. found_inf: where it is not 0, weights are only put back and the state stays; null: it is 0.
// learning_rates: one for each group, or null.
struct UpdateArgs {
  DType dtype;
  const Row* rows;
  int64_t num_rows;
  const uint64_t* weights;
  const uint64_t* grads;
  uint64_t* saved;
  const void* flat;
  const float* grad_scale;
  const float* found_inf;
  const LearningRate* learning_rates;
  Rounding rounding;
  Place place;
};

struct RestoreSgdArgs {
  UpdateArgs update;
  const SgdGroup* groups;
  const uint64_t* momentum_buffers;
};

// steps: addresses of step counters (float32) that this step is to be added to. In host memory they are counted here; found_inf is then not looked
// at for them. On the device (device_steps) they are only read: whoever calls this counts them, afterwards and on the same stream.
struct RestoreAdamArgs {
  UpdateArgs update;
  const AdamGroup* groups;
  bool device_steps;
  const uint64_t* steps;
  const uint64_t* exp_avgs;
  const uint64_t* exp_avg_sqs;
  const uint64_t* max_exp_avg_sqs;
};

// Return how many rows are still saved: those without a gradient.
int64_t restore_sgd(const RestoreSgdArgs& a);
int64_t restore_adam(const RestoreAdamArgs& a);

}  // namespace sam::cuda
