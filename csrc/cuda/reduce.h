// Sums over the threads of a block, in a fixed order.
#pragma once

#include <cuda_runtime.h>

#include "arguments.h"

namespace sam::cuda {

// The sum over all threads of the block, on every thread. All threads must call it.
__device__ __forceinline__ double block_sum(double value) {
  constexpr int kWarps = kThreads / 32;
  __shared__ double sums[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += sums[warp];
  return total;
}

}  // namespace sam::cuda
