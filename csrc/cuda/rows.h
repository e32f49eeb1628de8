// The rows of one launch, handed to the kernel by value, and the walk over their tiles.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../table.h"
#include "format.h"

namespace sam::cuda {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // independent 16-byte loads in flight, for each stream that is read
// The same where rows lie askew or end, and units (format.h) may be narrower: four elements of at most 16 bytes, but at least one unit. More would
// not leave enough registers.
template <class U>
constexpr int kUnitsPerBatch = std::max(1, std::min(4 / U::kSize, 16 / U::kBytes));
// What the registers must allow: 98 KB of loads in flight, five times what an H100 needs. Turing makes bfloat16 of several instructions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocksPerProcessor = 2;
#else
constexpr int kBlocksPerProcessor = 3;
#endif
constexpr int kTileBytes = kThreads * kVectorsPerThread * 16;
constexpr int kSlotBytes = 64;  // every slot starts on such a line: sam_fast.bucket.ALIGNMENT

// Which of a row's addresses is which; those of its state follow.
constexpr int kWeights = 0, kGrads = 1, kStates = 2;

// A tile is kTileBytes of one row, or what is left at the row's end. Blocks take tiles in turn.
template <int Addresses>
struct Tile {
  uint64_t address[Addresses];  // of the tile's first element; 0 where the row has none
  int64_t slot;                 // bytes from the start of the flat buffer
  int64_t count;                // elements
  int group;                    // index into Rows::groups
  int row;                      // index into the tables of Rows

  // Whether it is as long as tiles are.
  template <class Bits>
  __device__ __forceinline__ bool full() const {
    return count == kTileBytes / static_cast<int>(sizeof(Bits));
  }
};

// The dice of a tile of elements of the format T.
template <class T, int Addresses>
__device__ __forceinline__ Dice dice_of(const Tile<Addresses>& tile, uint32_t key) {
  return {key, static_cast<uint32_t>(tile.slot / static_cast<int64_t>(sizeof(typename T::Bits)))};
}

// Kernel arguments are as large as CUDA allows: 4 KB everywhere, 32 KB with driver 530 (CUDA 12.1) and compute capability 7.0. A bucket
// with more rows takes several launches.
template <class GroupOptions, int Addresses, int MaxRows, int MaxGroups>
struct Rows {
  using Group = GroupOptions;
  static constexpr int kAddresses = Addresses;
  static constexpr int kMaxRows = MaxRows;
  static constexpr int kMaxGroups = MaxGroups;

  uint64_t address[Addresses][MaxRows];
  int64_t numel[MaxRows];
  Group groups[MaxGroups];
  uint32_t slot[MaxRows];        // in lines of kSlotBytes
  uint32_t last_tile[MaxRows];   // number of tiles of this row and all before it
  uint16_t group[MaxRows];
  int32_t num_rows;
  int32_t num_groups;

  __host__ __device__ __forceinline__ uint32_t num_tiles() const { return num_rows == 0 ? 0 : last_tile[num_rows - 1]; }

  // Tile `index` of num_tiles(), for elements of `itemsize` bytes.
  __device__ __forceinline__ Tile<Addresses> tile(uint32_t index, int itemsize) const {
    int low = 0, high = num_rows - 1;  // the first row whose tiles reach beyond `index`
    while (low < high) {
      const int middle = (low + high) / 2;
      if (last_tile[middle] > index) high = middle;
      else low = middle + 1;
    }
    const int64_t elements = kTileBytes / itemsize;
    const int64_t begin = (index - (low == 0 ? 0 : last_tile[low - 1])) * elements;
    const int64_t rest = numel[low] - begin;
    Tile<Addresses> tile;
#pragma unroll
    for (int i = 0; i < Addresses; ++i) tile.address[i] = address[i][low] == 0 ? 0 : address[i][low] + static_cast<uint64_t>(begin * itemsize);
    tile.slot = static_cast<int64_t>(slot[low]) * kSlotBytes + begin * itemsize;
    tile.count = rest < elements ? rest : elements;
    tile.group = group[low];
    tile.row = low;
    return tile;
  }
};

constexpr size_t kOtherArguments = 96;  // an upper bound of what the kernels take beside the rows

// The three sizes of an operation's rows. Medium is for most networks: all of it is copied at every launch, used or not.
template <class SmallRows, class MediumRows, class LargeRows>
struct Tables {
  using Small = SmallRows;
#if CUDART_VERSION >= 12010
  using Medium = MediumRows;
  using Large = LargeRows;
#else
  using Medium = SmallRows;
  using Large = SmallRows;
#endif
  static_assert(sizeof(SmallRows) + kOtherArguments <= 4096);
  static_assert(sizeof(MediumRows) < sizeof(LargeRows));
  static_assert(sizeof(LargeRows) + kOtherArguments <= 32764);
};

// Of grad_norm, perturb and copy.
using PlainTables = Tables<Rows<Group, 2, 96, 24>, Rows<Group, 2, 256, 48>, Rows<Group, 2, 800, 224>>;

}  // namespace sam::cuda
