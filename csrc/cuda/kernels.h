// The operations of the cuda backend, as the bindings call them: asynchronous, on one stream of one device. Each is one file.
//
// Addresses are as in csrc/cpu/kernels.h; they, the row table and the groups lie in host memory and are not needed after the call. All other
// pointers are the device's. Errors are thrown as std::runtime_error.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../table.h"

namespace sam::cuda {

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

// The number of partial sums that grad_norm writes for these rows on the current device, whichever of them have a gradient.
int grad_norm_blocks(DType dtype, const Row* rows, int64_t num_rows);

// partials[0 .. blocks) = partial sums of (T g)^2 over all rows with a gradient, in float64.
void grad_norm(DType dtype, const Bucket& bucket, const uint64_t* weights, const uint64_t* grads, double* partials, int blocks, Place place);

// As sam::PerturbArgs in csrc/cpu/kernels.h. Every block sums the partials itself. `saved` (host memory) is written launch by launch.
// reverse: walk the tiles backwards, so that the gradients that grad_norm read last come first.
int64_t perturb(DType dtype, const Bucket& bucket, const uint64_t* weights, const uint64_t* grads, uint64_t* saved, const double* partials,
                int num_partials, double eps, double* norm, void* flat, bool reverse, Place place);

// As sam::CopyArgs in csrc/cpu/kernels.h.
void backup(int itemsize, const Bucket& bucket, const uint64_t* rows, uint64_t* saved, void* flat, Place place);
void restore(int itemsize, const Bucket& bucket, const uint64_t* rows, uint64_t* saved, const void* flat, bool release, Place place);

}  // namespace sam::cuda
