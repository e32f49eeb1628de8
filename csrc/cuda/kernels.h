// The operations of the cuda backend, as the bindings call them: asynchronous, on one stream of one device.
//
// The bucket and the options lie in host memory and are not needed after the call. All other pointers are the device's.
// Errors are thrown as std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../table.h"

namespace sam::cuda {

// Where to launch, and how large kernel arguments may be.
struct Launch {
  cudaStream_t stream;
  bool large_arguments;
};

// Throws if the current device has no machine code here, or the driver cannot run it.
void probe();

// The number of partial sums that grad_norm writes on the current device, whichever tensors have a direction.
int grad_norm_blocks(const Bucket& bucket);

// partials[0 .. blocks) = partial sums of (T g)^2 over all tensors with a direction g, in float64.
void grad_norm(const Bucket& bucket, const Group* options, double* partials, int blocks, Launch on);

// As csrc/cpu/kernels.h has it. Every block sums the partials itself. `saved` is written launch by launch.
// reverse: walk the tiles backwards, so that the gradients that grad_norm read last come first.
int64_t perturb(const Bucket& bucket, const Group* options, const double* partials, int num_partials, double eps,
                double* norm, bool reverse, Rounding rounding, Launch on);

// As csrc/cpu/kernels.h has them.
void backup(const Bucket& bucket, Launch on);
void restore(const Bucket& bucket, bool release, Launch on);

// What a step takes on the device beside the bucket.
// grad_scale: gradients are divided by it; null: by 1. found_inf: where it is not 0, weights are only put back and the
// state stays; null: it is 0. learning_rates: one for each group, or null. device_counters: the bucket's step counters
// are on the device and are only read: whoever calls this counts them, afterwards and on the same stream. Those in host
// memory are counted here, and found_inf is then not looked at for them.
struct StepArgs {
  const float* grad_scale;
  const float* found_inf;
  const LearningRate* learning_rates;
  bool device_counters;
  Rounding rounding;
};

// The second step of the base optimizer `Step` (steps.h). `saved` is written launch by launch. Returns how many tensors
// are still saved: those without a gradient.
template <class Step>
int64_t step(const Bucket& bucket, const void* options, const StepArgs& args, Launch on);

}  // namespace sam::cuda
