// backup / restore: copy a bucket's rows to and from its flat buffer, bit for bit, whatever their dtype: rows are bytes here.
#include "format.h"
#include "plan.h"

namespace sam::cuda {
namespace {

// Moves `count` bytes, kTileBytes at most, in units of Unit.
template <class Unit>
__device__ __forceinline__ void copy_units(char* to, const char* from, int count) {
  const int units = count / static_cast<int>(sizeof(Unit));
  const Unit* source = reinterpret_cast<const Unit*>(from);
  Unit* target = reinterpret_cast<Unit*>(to);
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < units; first += kVectorsPerThread * kThreads) {
    Unit moved[kVectorsPerThread];
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k)
      if (first + k * kThreads < units) moved[k] = load<false>(source + first + k * kThreads);
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k)
      if (first + k * kThreads < units) store<false>(target + first + k * kThreads, moved[k]);
  }
  using Byte = unsigned char;
  const int rest = units * static_cast<int>(sizeof(Unit)) + static_cast<int>(threadIdx.x);
  if (rest < count) store<false>(reinterpret_cast<Byte*>(to) + rest, load<false>(reinterpret_cast<const Byte*>(from) + rest));
}

template <bool ToFlat, class Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) copy_kernel(const __grid_constant__ Table rows, char* flat) {
  const uint32_t tiles = rows.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = rows.tile(index, 1);
    char* row = reinterpret_cast<char*>(tile.address[kWeights]);
    char* to = ToFlat ? flat + tile.slot : row;
    const char* from = ToFlat ? row : flat + tile.slot;
    const int count = static_cast<int>(tile.count);
    // Slots are aligned; a row may lie anywhere its dtype allows.
    if (tile.address[kWeights] % 16 == 0) copy_units<uint4>(to, from, count);
    else if (tile.address[kWeights] % 4 == 0) copy_units<unsigned int>(to, from, count);
    else if (tile.address[kWeights] % 2 == 0) copy_units<unsigned short>(to, from, count);
    else copy_units<unsigned char>(to, from, count);
  }
}

// The rows' elements as bytes.
std::vector<Row> in_bytes(int itemsize, const Bucket<Group>& bucket) {
  std::vector<Row> rows(bucket.rows, bucket.rows + bucket.num_rows);
  for (Row& row : rows) row = {0, row.numel * itemsize, row.slot * itemsize};
  return rows;
}

template <bool ToFlat, class TakesPart>
void copy_rows(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, char* flat, Place place, const TakesPart& takes_part) {
  const std::vector<Row> bytes = in_bytes(itemsize, bucket);
  for_launches<PlainTables>(
      Bucket<Group>{bytes.data(), bucket.num_rows, nullptr}, place, 1, {rows, nullptr}, false, false, takes_part,
      [&](const auto& table, const std::vector<int64_t>&) {
        using Table = std::decay_t<decltype(table)>;
        launch(ToFlat ? "backup" : "restore", copy_kernel<ToFlat, Table>, blocks_for(copy_kernel<ToFlat, Table>, table.num_tiles()), kThreads,
               place.stream, table, flat);
      });
}

}  // namespace

void backup(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, uint64_t* saved, void* flat, Place place) {
  copy_rows<true>(itemsize, bucket, rows, static_cast<char*>(flat), place, [&](int64_t row) { return rows[row] != 0; });
  for (int64_t row = 0; row < bucket.num_rows; ++row) saved[row] = rows[row];
}

void restore(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, uint64_t* saved, const void* flat, bool release, Place place) {
  copy_rows<false>(itemsize, bucket, rows, static_cast<char*>(const_cast<void*>(flat)), place,
                   [&](int64_t row) { return rows[row] != 0 && saved[row] != 0; });
  if (!release) return;
  for (int64_t row = 0; row < bucket.num_rows; ++row)
    if (rows[row] != 0) saved[row] = 0;
}

}  // namespace sam::cuda
