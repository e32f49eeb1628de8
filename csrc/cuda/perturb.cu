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

// A tile that is cut off or lies askew, element by element.
template <class T, Mode M>
__device__ __forceinline__ void climb_odd_tile(const Tile<kStates>& tile, typename T::Bits* saved, typename T::Compute eta, typename T::Compute scale,
                                               const Dice& dice) {
  using Bits = typename T::Bits;
  Bits* w = reinterpret_cast<Bits*>(tile.address[kWeights]);
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kGrads]);
  const int count = static_cast<int>(tile.count);
#pragma unroll 1
  for (int first = static_cast<int>(threadIdx.x); first < count; first += kElementsPerBatch<Bits> * kThreads) {
    Bits weights[kElementsPerBatch<Bits>], grads[kElementsPerBatch<Bits>];
#pragma unroll
    for (int k = 0; k < kElementsPerBatch<Bits>; ++k) {
      const int i = first + k * kThreads;
      if (i < count) grads[k] = load<true>(g + i);
      if (i < count) weights[k] = load<false>(w + i);
    }
#pragma unroll
    for (int k = 0; k < kElementsPerBatch<Bits>; ++k) {
      const int i = first + k * kThreads;
      if (i < count) store<true>(saved + i, weights[k]);
      if (i < count) store<false>(w + i, moved<T, M>(weights[k], grads[k], eta, scale, dice, i));
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
    g_vectors[k] = load_vector<true>(g + k * kStride);
    w_vectors[k] = load_vector<false>(w + k * kStride);
  }
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    store_vector<true>(saved + first + k * kStride, w_vectors[k]);
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      w_vectors[k].element[i] =
          moved<T, M>(w_vectors[k].element[i], g_vectors[k].element[i], eta, scale, dice, first + k * kStride + i);
    store_vector<false>(w + k * kStride, w_vectors[k]);
  }
}

template <class T, Mode M>
__device__ __forceinline__ void climb_tile(const Tile<kStates>& tile, typename T::Bits* saved, typename T::Compute eta, typename T::Compute scale,
                                           const Dice& dice) {
  const bool aligned = (tile.address[kWeights] | tile.address[kGrads]) % kVectorBytes == 0;
  if (tile.full<typename T::Bits>() && aligned) climb_full_tile<T, M>(tile, saved, eta, scale, dice);
  else climb_odd_tile<T, M>(tile, saved, eta, scale, dice);
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
    scales[i] = static_cast<Compute>(climb_scale(norm, rows.groups[i].rho, eps));
  __syncthreads();

  const bool moves = can_climb(norm);
  const uint32_t tiles = rows.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = rows.tile(reverse ? tiles - 1 - index : index, sizeof(typename T::Bits));
    const Group group = rows.groups[tile.group];
    auto* saved = reinterpret_cast<typename T::Bits*>(flat + tile.slot);
    const Compute eta = static_cast<Compute>(group.eta), scale = scales[tile.group];
    const Dice dice = dice_of<T>(tile, rounding_key);
    if (!moves) climb_odd_tile<T, Mode::hold>(tile, saved, eta, scale, dice);
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
