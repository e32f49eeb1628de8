// What Python hands to the kernels: one description of a bucket, and tables of options. sam_fast/backends/native.py
// fills them; tests compare the members' names.
#pragma once

#include <cstdint>

namespace sam {

// Matches DTYPE_CODES in sam_fast/backends/native.py.
enum class DType : int64_t { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// One tensor of the bucket: a parameter, or with flattening all parameters of a group.
struct TensorInfo {
  int64_t group;  // index into the options
  int64_t numel;  // number of elements
  int64_t slot;   // its first element's position in the bucket
};

// A run of one tensor's elements, small enough that tensors of all sizes balance over threads. Slots ascend.
struct Chunk {
  int64_t tensor;  // index into the bucket's tensors
  int64_t group;   // index into the options
  int64_t begin;   // first element within the tensor
  int64_t count;   // number of elements
  int64_t slot;    // its first element's position in the bucket
};

constexpr int kMaxStates = 3;  // tensors of state that a base optimizer may have for each parameter

// A bucket: tensors of one dtype on one device, in one index space. The backup is aligned to 64 bytes, and so is every
// tensor's slot in it.
//
// weights, along, saved, counters and states[i] are arrays of addresses, one for each tensor; an address is 0 where
// there is nothing, and where the tensor has no elements. All lie in host memory; what they point to is on the bucket's
// device.
#define SAM_BUCKET(X)                                                                                       \
  X(int64_t, dtype)    /* DType; -1 where the bucket is only copied */                                      \
  X(int64_t, itemsize) /* bytes of an element */                                                            \
  X(int64_t, num_tensors)                                                                                   \
  X(int64_t, num_chunks)                                                                                    \
  X(const TensorInfo*, tensors)                                                                             \
  X(const Chunk*, chunks) /* the cpu backend's */                                                           \
  X(const uint64_t*, weights)                                                                               \
  X(const uint64_t*, along)    /* the direction to perturb along, or a step's gradient; 0: takes no part */ \
  X(uint64_t*, saved)          /* where the weight was when it was backed up; 0: has no backup */           \
  X(void*, backup)             /* all tensors' elements, each in its slot */                                \
  X(const uint64_t*, counters) /* float32 step counters, on the host unless a step is told otherwise */

struct Bucket {
#define SAM_MEMBER(type, name) type name;
  SAM_BUCKET(SAM_MEMBER)
#undef SAM_MEMBER
  const uint64_t* states[kMaxStates];  // of the base optimizer
};
static_assert(sizeof(Bucket) == 8 * 14, "Python fills it as an array of 8-byte numbers");

// The perturbation's options of one parameter group. rho is negative where the objective is maximized.
struct Group {
  double rho;
  double eta;
  double adaptive;  // 0 or 1; a double so that the table is one array of doubles
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
