// The rows of one launch, handed to the kernel by value, and the walk over their tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../table.h"

namespace sam::cuda {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // independent 16-byte loads in flight, for each stream that is read
// The same where elements are moved one by one; as many as leave registers.
template <class Bits>
constexpr int kElementsPerBatch = sizeof(Bits) > 4 ? 2 : 4;
constexpr int kBlocksPerProcessor = 3;  // what the registers must allow: 98 KB of loads in flight, five times what an H100 needs
constexpr int kTileBytes = kThreads * kVectorsPerThread * 16;
constexpr int kSlotBytes = 64;  // every slot starts on such a line: sam_fast.bucket.ALIGNMENT

// A tile is kTileBytes of one row, or what is left at the row's end. Blocks take tiles in turn.
struct Tile {
  uint64_t weights;  // address of the tile's first element
  uint64_t grads;
  int64_t slot;   // bytes from the start of the flat buffer
  int64_t count;  // elements
  int group;      // index into Rows::groups
};

// Kernel arguments are as large as CUDA allows: 4 KB everywhere, 32 KB with driver 530 (CUDA 12.1) and compute capability 7.0. A bucket
// with more rows takes several launches.
template <int MaxRows, int MaxGroups>
struct Rows {
  static constexpr int kMaxRows = MaxRows;
  static constexpr int kMaxGroups = MaxGroups;

  uint64_t weights[MaxRows];
  uint64_t grads[MaxRows];
  int64_t numel[MaxRows];
  Group groups[MaxGroups];
  uint32_t slot[MaxRows];        // in lines of kSlotBytes
  uint32_t last_tile[MaxRows];   // number of tiles of this row and all before it
  uint16_t group[MaxRows];
  int32_t num_rows;
  int32_t num_groups;

  __host__ __device__ __forceinline__ uint32_t num_tiles() const { return num_rows == 0 ? 0 : last_tile[num_rows - 1]; }

  // Tile `index` of num_tiles(), for elements of `itemsize` bytes.
  __device__ __forceinline__ Tile tile(uint32_t index, int itemsize) const {
    int low = 0, high = num_rows - 1;  // the first row whose tiles reach beyond `index`
    while (low < high) {
      const int middle = (low + high) / 2;
      if (last_tile[middle] > index) high = middle;
      else low = middle + 1;
    }
    const int64_t elements = kTileBytes / itemsize;
    const int64_t begin = (index - (low == 0 ? 0 : last_tile[low - 1])) * elements;
    const int64_t rest = numel[low] - begin;
    return {weights[low] + static_cast<uint64_t>(begin * itemsize), grads[low] == 0 ? 0 : grads[low] + static_cast<uint64_t>(begin * itemsize),
            static_cast<int64_t>(slot[low]) * kSlotBytes + begin * itemsize, rest < elements ? rest : elements, group[low]};
  }
};

using SmallRows = Rows<96, 24>;
#if CUDART_VERSION >= 12010
using LargeRows = Rows<800, 224>;
#else
using LargeRows = SmallRows;
#endif

constexpr size_t kOtherArguments = 96;  // an upper bound of what the kernels take beside the rows
static_assert(sizeof(SmallRows) + kOtherArguments <= 4096);
static_assert(sizeof(LargeRows) + kOtherArguments <= 32764);

}  // namespace sam::cuda
