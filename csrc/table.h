// What Python hands to the kernels: flat tables that describe one bucket. sam_fast/bucket.py builds them; its layout must match.
#pragma once

#include <cstdint>

namespace sam {

// Matches sam_fast.backends.addresses.DTYPE_CODES.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// One tensor of the bucket, or with flattening one group's tensors.
struct Row {
  int64_t group;  // index into the group table
  int64_t numel;  // number of elements
  int64_t slot;   // first element within the bucket's flat index space
};

// A run of elements of one row, small enough that rows of all sizes balance over threads.
struct Chunk {
  int64_t row;    // index into the address tables
  int64_t group;  // index into the group table
  int64_t begin;  // first element within the row
  int64_t count;  // number of elements
  int64_t slot;   // first element within the bucket's flat index space
};

struct Chunks {
  const Chunk* data;
  int64_t size;
};

// The options of one parameter group. rho is negative where the objective is maximized.
struct Group {
  double rho;
  double eta;
  double adaptive;  // 0 or 1; a double so that the table is one array of doubles
};

// The options of one parameter group of torch.optim.SGD. Flags are 0 or 1.
struct SgdGroup {
  double lr;
  double momentum;
  double dampening;
  double weight_decay;
  double nesterov;
  double maximize;
};

// The options of one parameter group of torch.optim.Adam or AdamW. decoupled: the weight decay is AdamW's.
struct AdamGroup {
  double lr;
  double beta1;
  double beta2;
  double eps;
  double weight_decay;
  double decoupled;
  double amsgrad;
  double maximize;
};

// Where a group's learning rate is on the device, one float32 or float64; address 0: the options have it.
struct LearningRate {
  uint64_t address;
  int64_t dtype;
};

// How new weights in a 16-bit format are rounded: to nearest, or stochastically (rounding.h).
struct Rounding {
  bool stochastic;
  uint32_t key;
};

}  // namespace sam
