// perturb: back the weights up and climb, w <- w + e, in one pass over memory.
#include "../sam_math.h"
#include "format.h"
#include "plan.h"
#include "reduce.h"

namespace sam::cuda {
namespace {

// hold: back up only, where the norm is not finite.
enum class Mode { hold, climb, climb_adaptive };

// The new bits of element i of a tile.
template <class T, Mode M>
__device__ __forceinline__ typename T::Bits moved(typename T::Bits w, typename T::Bits g, typename T::Compute eta, typename T::Compute scale,
                                                  const Dice& dice, int i) {
  if constexpr (M == Mode::climb) return narrow_weight<T>(climb(T::widen(w), T::widen(g), scale), dice, i);
  else if constexpr (M == Mode::climb_adaptive) return narrow_weight<T>(climb_adaptive(T::widen(w), T::widen(g), eta, scale), dice, i);
  else return w;
}

// The elements from `begin` to `end` of a tile, whole units.
template <class T, Mode M, class U, int Batch>
__device__ __forceinline__ void climb_units(const Tile<kStates>& tile, int begin, int end, typename T::Bits* saved, typename T::Compute eta,
                                            typename T::Compute scale, const Dice& dice) {
  using Bits = typename T::Bits;
  constexpr int kStride = kThreads * U::kSize;
  Bits* w = reinterpret_cast<Bits*>(tile.address[kWeights]);
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kGrads]);
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * U::kSize; first < end; first += Batch * kStride) {
    U weights[Batch], grads[Batch];
#pragma unroll
    for (int k = 0; k < Batch; ++k) {
      const int i = first + k * kStride;
      if (i < end) grads[k] = load_unit<true, U>(g + i);
      if (i < end) weights[k] = load_unit<false, U>(w + i);
    }
#pragma unroll
    for (int k = 0; k < Batch; ++k) {
      const int i = first + k * kStride;
      if (i >= end) continue;
      store_unit<true>(saved + i, weights[k]);
#pragma unroll
      for (int j = 0; j < U::kSize; ++j)
        weights[k].element[j] = moved<T, M>(weights[k].element[j], grads[k].element[j], eta, scale, dice, i + j);
      store_unit<false>(w + i, weights[k]);
    }
  }
}

template <class T, Mode M>
__device__ __forceinline__ void climb_full_tile(const Tile<kStates>& tile, typename T::Bits* saved, typename T::Compute eta, typename T::Compute scale,
                                                const Dice& dice) {
  using Bits = typename T::Bits;
  constexpr int kSize = Vector<Bits>::kSize;
  constexpr int kStride = kThreads * kSize;
  const int first = static_cast<int>(threadIdx.x) * kSize;
  Bits* w = reinterpret_cast<Bits*>(tile.address[kWeights]) + first;
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kGrads]) + first;
  Vector<Bits> w_vectors[kVectorsPerThread], g_vectors[kVectorsPerThread];
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    g_vectors[k] = load_unit<true, Vector<Bits>>(g + k * kStride);
    w_vectors[k] = load_unit<false, Vector<Bits>>(w + k * kStride);
  }
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    store_unit<true>(saved + first + k * kStride, w_vectors[k]);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      w_vectors[k].element[i] =
          moved<T, M>(w_vectors[k].element[i], g_vectors[k].element[i], eta, scale, dice, first + k * kStride + i);
    store_unit<false>(w + k * kStride, w_vectors[k]);
  }
}

template <class T, Mode M>
__device__ __forceinline__ void climb_tile(const Tile<kStates>& tile, typename T::Bits* saved, typename T::Compute eta, typename T::Compute scale,
                                           const Dice& dice) {
  using Bits = typename T::Bits;
  const uint64_t addresses = tile.address[kWeights] | tile.address[kGrads];
  const int count = static_cast<int>(tile.count);
  if (tile.full<Bits>() && addresses % kVectorBytes == 0) {
    climb_full_tile<T, M>(tile, saved, eta, scale, dice);
    return;
  }
  in_widest_units<Bits>(addresses, count, [&](auto unit, int begin, int end) {
    using U = decltype(unit);
    climb_units<T, M, U, kUnitsPerBatch<U>>(tile, begin, end, saved, eta, scale, dice);
  });
}

// Backs a tile up where the norm is not finite, which is rare: element by element.
template <class T>
__device__ __forceinline__ void hold_tile(const Tile<kStates>& tile, typename T::Bits* saved, const Dice& dice) {
  climb_units<T, Mode::hold, Single<typename T::Bits>, 2>(tile, 0, static_cast<int>(tile.count), saved, 0, 0, dice);
}

template <class T, class Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    perturb_kernel(const __grid_constant__ Table rows, const double* __restrict__ partials, int num_partials, double eps, double* __restrict__ norm_out,
                   char* __restrict__ flat, bool reverse, uint32_t rounding_key) {
  using Compute = typename T::Compute;
  __shared__ Compute scales[Table::kMaxGroups];
  double sum = 0.0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < num_partials; i += kThreads) sum += partials[i];
  const double norm = sqrt(block_sum(sum));
  if (blockIdx.x == 0 && threadIdx.x == 0) *norm_out = norm;
  // Once per block and group: a float64 division is slow.
  for (int i = static_cast<int>(threadIdx.x); i < rows.num_groups; i += kThreads)
    scales[i] = climb_scale<Compute>(norm, rows.groups[i].rho, eps);
  __syncthreads();

  const bool moves = can_climb(norm);
  const uint32_t tiles = rows.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = rows.tile(reverse ? tiles - 1 - index : index, sizeof(typename T::Bits));
    const Group group = rows.groups[tile.group];
    auto* saved = reinterpret_cast<typename T::Bits*>(flat + tile.slot);
    const Compute eta = static_cast<Compute>(group.eta), scale = scales[tile.group];
    const Dice dice = dice_of<T>(tile, rounding_key);
    if (!moves) hold_tile<T>(tile, saved, dice);
    else if (group.adaptive != 0.0) climb_tile<T, Mode::climb_adaptive>(tile, saved, eta, scale, dice);
    else climb_tile<T, Mode::climb>(tile, saved, eta, scale, dice);
  }
}

}  // namespace

int64_t perturb(DType dtype, const Bucket<Group>& bucket, const uint64_t* weights, const uint64_t* grads, uint64_t* saved, const double* partials,
                int num_partials, double eps, double* norm, void* flat, bool reverse, Rounding rounding, Place place) {
  int64_t rows = 0;
  with_format(dtype, rounding, [&](auto format) {
    using T = decltype(format);
    for_launches<PlainTables>(
        bucket, place, static_cast<int>(sizeof(typename T::Bits)), {weights, grads}, true, reverse, [&](int64_t row) { return grads[row] != 0; },
        [&](const auto& table, const std::vector<int64_t>& members) {
          using Table = std::decay_t<decltype(table)>;
          launch("perturb", perturb_kernel<T, Table>, blocks_for(perturb_kernel<T, Table>, table.num_tiles()), kThreads, place.stream, table, partials,
                 num_partials, eps, norm, static_cast<char*>(flat), reverse, rounding.key);
          for (const int64_t row : members) saved[row] = weights[row];
          rows += static_cast<int64_t>(members.size());
        });
  });
  return rows;
}

}  // namespace sam::cuda
