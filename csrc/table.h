// What Python hands to the kernels: flat tables that describe one bucket. sam_fast/bucket.py builds them; its layout must match.
#pragma once

#include <cstdint>

namespace sam {

// Matches sam_fast.bucket.DTYPE_CODES.
enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3 };

// A run of elements of one row (one tensor, or with flattening one group's tensors), small enough that rows of all sizes balance over threads.
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

}  // namespace sam
