// The tensors of one launch, handed to the kernel by value, and the walk over their tiles.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "../table.h"
#include "format.h"

namespace sam::cuda {

constexpr int kThreads = 256;
constexpr int kVectorsPerThread = 4;  // independent 16-byte loads in flight, for each stream that is read
// The same at the ends of tensors and where they are not aligned, so that units (format.h) may be narrower: four
// elements of at most 16 bytes, but at least one unit. More would not leave enough registers.
template <class U>
constexpr int kUnitsPerBatch = std::max(1, std::min(4 / U::kSize, 16 / U::kBytes));
// The registers must suffice for so many blocks: 98 KB of loads in flight, five times what an H100 needs. On Turing
// bfloat16 takes several instructions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
constexpr int kBlocksPerProcessor = 2;
#else
constexpr int kBlocksPerProcessor = 3;
#endif
constexpr int kTileBytes = kThreads * kVectorsPerThread * 16;
constexpr int kSlotBytes = 64;  // every slot starts on such a line: ALIGNMENT in sam_fast/backends/memory.py

// Which of a tensor's addresses is which; those of its state follow.
constexpr int kWeights = 0, kAlong = 1, kStates = 2;

// A tile is kTileBytes of one tensor, or what is left at its end. Blocks take tiles in turn.
template <int Addresses>
struct Tile {
  uint64_t address[Addresses];  // of the tile's first element; 0 where the tensor has none
  int64_t slot;                 // bytes from the start of the backup
  int64_t count;                // elements
  int group;                    // index into Arguments::groups
  int tensor;                   // index into the tables of Arguments

  // Whether it is kTileBytes long.
  template <class Bits>
  __device__ __forceinline__ bool full() const {
    return count == kTileBytes / static_cast<int>(sizeof(Bits));
  }
};

// The random bits of a tile of elements of the format T.
template <class T, int Addresses>
__device__ __forceinline__ RoundingBits rounding_bits_of(const Tile<Addresses>& tile, uint32_t key) {
  return {key, static_cast<uint32_t>(tile.slot / static_cast<int64_t>(sizeof(typename T::Bits)))};
}

// Kernel arguments are as large as CUDA allows: 4 KB everywhere, 32 KB with driver 530 (CUDA 12.1) and compute
// capability 7.0. A bucket with more tensors takes several launches.
template <class GroupOptions, int Addresses, int MaxTensors, int MaxGroups>
struct Arguments {
  using Group = GroupOptions;
  static constexpr int kAddresses = Addresses;
  static constexpr int kMaxTensors = MaxTensors;
  static constexpr int kMaxGroups = MaxGroups;

  uint64_t address[Addresses][MaxTensors];
  int64_t numel[MaxTensors];
  Group groups[MaxGroups];
  uint32_t slot[MaxTensors];       // in lines of kSlotBytes
  uint32_t last_tile[MaxTensors];  // number of tiles of this tensor and all before it
  uint16_t group[MaxTensors];
  int32_t num_tensors;
  int32_t num_groups;

  __host__ __device__ __forceinline__ uint32_t num_tiles() const {
    return num_tensors == 0 ? 0 : last_tile[num_tensors - 1];
  }

  // Tile `index` of num_tiles(), for elements of `itemsize` bytes.
  __device__ __forceinline__ Tile<Addresses> tile(uint32_t index, int itemsize) const {
    int low = 0, high = num_tensors - 1;  // the first tensor whose tiles reach beyond `index`
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
    for (int i = 0; i < Addresses; ++i)
      tile.address[i] = address[i][low] == 0 ? 0 : address[i][low] + static_cast<uint64_t>(begin * itemsize);
    tile.slot = static_cast<int64_t>(slot[low]) * kSlotBytes + begin * itemsize;
    tile.count = rest < elements ? rest : elements;
    tile.group = group[low];
    tile.tensor = low;
    return tile;
  }
};

constexpr int kOtherArguments = 112;  // an upper bound of what the kernels take beside the tensors, and of padding

// As many tensors as fit into `Bytes` of arguments beside groups of `GroupBytes` together.
template <class Group, int Addresses, int Bytes, int GroupBytes>
struct Fitting {
  static constexpr int kGroups = GroupBytes / static_cast<int>(sizeof(Group));
  static constexpr int kBytesPerTensor = 8 * Addresses + 8 + 4 + 4 + 2;  // address, numel, slot, last_tile, group
  static constexpr int kTensors =
      (Bytes - kOtherArguments - kGroups * static_cast<int>(sizeof(Group))) / kBytesPerTensor;
  using type = Arguments<Group, Addresses, kTensors, kGroups>;
  static_assert(sizeof(type) + kOtherArguments <= Bytes + 16);
};

constexpr int kSmallArguments = 4096;
constexpr int kLargeArguments = 32764;

// The three sizes of an operation's arguments. Medium is for most networks: all of it is copied at every launch, used
// or not. SmallGroups and LargeGroups: bytes that the groups may take.
template <class Group, int Addresses, int SmallGroups, int LargeGroups>
struct Sizes {
  static constexpr int kAddresses = Addresses;
  using GroupType = Group;
  using Small = typename Fitting<Group, Addresses, kSmallArguments, SmallGroups>::type;
#if CUDART_VERSION >= 12010
  using Medium = Arguments<Group, Addresses, 256, 2 * SmallGroups / static_cast<int>(sizeof(Group))>;
  using Large = typename Fitting<Group, Addresses, kLargeArguments, LargeGroups>::type;
#else
  using Medium = Small;
  using Large = Small;
#endif
  static_assert(sizeof(Medium) <= sizeof(Large));
};

// Those of grad_norm, perturb and copy.
using PlainSizes = Sizes<Group, 2, 576, 5376>;

}  // namespace sam::cuda
