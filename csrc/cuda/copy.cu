// backup / restore: copy a bucket's rows to and from its flat buffer, bit for bit, whatever their dtype: rows are bytes here.
#include "format.h"
#include "plan.h"

namespace sam::cuda {
namespace {

using Byte = unsigned char;

// Moves the bytes from `begin` to `end`, whole units.
template <class U>
__device__ __forceinline__ void copy_units(Byte* to, const Byte* from, int begin, int end) {
  constexpr int kStride = kThreads * U::kSize;
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * U::kSize; first < end; first += kVectorsPerThread * kStride) {
    U moved[kVectorsPerThread];
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k)
      if (first + k * kStride < end) moved[k] = load_unit<false, U>(from + first + k * kStride);
#pragma unroll
    for (int k = 0; k < kVectorsPerThread; ++k)
      if (first + k * kStride < end) store_unit<false>(to + first + k * kStride, moved[k]);
  }
}

template <bool ToFlat, class Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor) copy_kernel(const __grid_constant__ Table rows, Byte* flat) {
  const uint32_t tiles = rows.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = rows.tile(index, 1);
    Byte* row = reinterpret_cast<Byte*>(tile.address[kWeights]);
    Byte* to = ToFlat ? flat + tile.slot : row;
    const Byte* from = ToFlat ? row : flat + tile.slot;
    // Slots are aligned; a row may lie anywhere its dtype allows.
    in_widest_units<Byte>(tile.address[kWeights], static_cast<int>(tile.count),
                          [&](auto unit, int begin, int end) { copy_units<decltype(unit)>(to, from, begin, end); });
  }
}

// The rows' elements as bytes.
std::vector<Row> in_bytes(int itemsize, const Bucket<Group>& bucket) {
  std::vector<Row> rows(bucket.rows, bucket.rows + bucket.num_rows);
  for (Row& row : rows) row = {0, row.numel * itemsize, row.slot * itemsize};
  return rows;
}

template <bool ToFlat, class TakesPart>
void copy_rows(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, void* flat, Place place, const TakesPart& takes_part) {
  const std::vector<Row> bytes = in_bytes(itemsize, bucket);
  for_launches<PlainTables>(
      Bucket<Group>{bytes.data(), bucket.num_rows, nullptr}, place, 1, {rows, nullptr}, false, false, takes_part,
      [&](const auto& table, const std::vector<int64_t>&) {
        using Table = std::decay_t<decltype(table)>;
        launch(ToFlat ? "backup" : "restore", copy_kernel<ToFlat, Table>, blocks_for(copy_kernel<ToFlat, Table>, table.num_tiles()), kThreads,
               place.stream, table, static_cast<Byte*>(flat));
      });
}

}  // namespace

void probe() {
  cudaFuncAttributes attributes;
  check(cudaFuncGetAttributes(&attributes, copy_kernel<true, PlainTables::Small>), "probe");
}

void backup(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, uint64_t* saved, void* flat, Place place) {
  copy_rows<true>(itemsize, bucket, rows, flat, place, [&](int64_t row) { return rows[row] != 0; });
  for (int64_t row = 0; row < bucket.num_rows; ++row) saved[row] = rows[row];
}

void restore(int itemsize, const Bucket<Group>& bucket, const uint64_t* rows, uint64_t* saved, const void* flat, bool release, Place place) {
  copy_rows<false>(itemsize, bucket, rows, const_cast<void*>(flat), place,
                   [&](int64_t row) { return rows[row] != 0 && saved[row] != 0; });
  if (!release) return;
  for (int64_t row = 0; row < bucket.num_rows; ++row)
    if (rows[row] != 0) saved[row] = 0;
}

}  // namespace sam::cuda
