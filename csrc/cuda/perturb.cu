// perturb: back the weights up and move them, w <- w + e, in one pass over memory.
#include "../sam_math.h"
#include "format.h"
#include "plan.h"
#include "reduce.h"

namespace sam::cuda {
namespace {

// hold: back up only, where the norm is not finite.
enum class Mode { hold, move, move_adaptive };

// The new bits of element i of a tile.
template <class T, Mode M>
__device__ __forceinline__ typename T::Bits moved(typename T::Bits w, typename T::Bits g, typename T::Compute eta,
                                                  typename T::Compute scale, const RoundingBits& random, int i) {
  if constexpr (M == Mode::move) return narrow_weight<T>(perturbed(T::widen(w), T::widen(g), scale), random, i);
  else if constexpr (M == Mode::move_adaptive)
    return narrow_weight<T>(perturbed_adaptive(T::widen(w), T::widen(g), eta, scale), random, i);
  else return w;
}

// The elements from `begin` to `end` of a tile, whole units.
template <class T, Mode M, class U, int Batch>
__device__ __forceinline__ void perturb_units(const Tile<kStates>& tile, int begin, int end, typename T::Bits* saved,
                                              typename T::Compute eta, typename T::Compute scale,
                                              const RoundingBits& random) {
  using Bits = typename T::Bits;
  constexpr int kStride = kThreads * U::kSize;
  Bits* w = reinterpret_cast<Bits*>(tile.address[kWeights]);
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kAlong]);
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
        weights[k].element[j] = moved<T, M>(weights[k].element[j], grads[k].element[j], eta, scale, random, i + j);
      store_unit<false>(w + i, weights[k]);
    }
  }
}

template <class T, Mode M>
__device__ __forceinline__ void perturb_full_tile(const Tile<kStates>& tile, typename T::Bits* saved,
                                                  typename T::Compute eta, typename T::Compute scale,
                                                  const RoundingBits& random) {
  using Bits = typename T::Bits;
  constexpr int kSize = Vector<Bits>::kSize;
  constexpr int kStride = kThreads * kSize;
  const int first = static_cast<int>(threadIdx.x) * kSize;
  Bits* w = reinterpret_cast<Bits*>(tile.address[kWeights]) + first;
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kAlong]) + first;
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
          moved<T, M>(w_vectors[k].element[i], g_vectors[k].element[i], eta, scale, random, first + k * kStride + i);
    store_unit<false>(w + k * kStride, w_vectors[k]);
  }
}

template <class T, Mode M>
__device__ __forceinline__ void perturb_tile(const Tile<kStates>& tile, typename T::Bits* saved,
                                             typename T::Compute eta, typename T::Compute scale,
                                             const RoundingBits& random) {
  using Bits = typename T::Bits;
  const uint64_t addresses = tile.address[kWeights] | tile.address[kAlong];
  const int count = static_cast<int>(tile.count);
  if (tile.full<Bits>() && addresses % kVectorBytes == 0) {
    perturb_full_tile<T, M>(tile, saved, eta, scale, random);
    return;
  }
  in_widest_units<Bits>(addresses, count, [&](auto unit, int begin, int end) {
    using U = decltype(unit);
    perturb_units<T, M, U, kUnitsPerBatch<U>>(tile, begin, end, saved, eta, scale, random);
  });
}

// Backs a tile up where the norm is not finite, which is rare: element by element.
template <class T>
__device__ __forceinline__ void hold_tile(const Tile<kStates>& tile, typename T::Bits* saved,
                                          const RoundingBits& random) {
  perturb_units<T, Mode::hold, Single<typename T::Bits>, 2>(tile, 0, static_cast<int>(tile.count), saved, 0, 0, random);
}

template <class T, class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    perturb_kernel(const __grid_constant__ Arguments arguments, const double* __restrict__ partials, int num_partials,
                   double eps, double* __restrict__ norm_out, char* __restrict__ backup, bool reverse,
                   uint32_t rounding_key) {
  using Compute = typename T::Compute;
  __shared__ Compute scales[Arguments::kMaxGroups];
  double sum = 0.0;
#pragma unroll 4
  for (int i = static_cast<int>(threadIdx.x); i < num_partials; i += kThreads) sum += partials[i];
  const double norm = sqrt(block_sum(sum));
  if (blockIdx.x == 0 && threadIdx.x == 0) *norm_out = norm;
  // Once per block and group: a float64 division is slow.
  for (int i = static_cast<int>(threadIdx.x); i < arguments.num_groups; i += kThreads)
    scales[i] = perturb_scale<Compute>(norm, arguments.groups[i].rho, eps);
  __syncthreads();

  const bool moves = can_perturb(norm);
  const uint32_t tiles = arguments.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = arguments.tile(reverse ? tiles - 1 - index : index, sizeof(typename T::Bits));
    const Group group = arguments.groups[tile.group];
    auto* saved = reinterpret_cast<typename T::Bits*>(backup + tile.slot);
    const Compute eta = static_cast<Compute>(group.eta), scale = scales[tile.group];
    const RoundingBits random = rounding_bits_of<T>(tile, rounding_key);
    if (!moves) hold_tile<T>(tile, saved, random);
    else if (group.adaptive != 0.0) perturb_tile<T, Mode::move_adaptive>(tile, saved, eta, scale, random);
    else perturb_tile<T, Mode::move>(tile, saved, eta, scale, random);
  }
}

}  // namespace

int64_t perturb(const Bucket& b, const Group* options, const double* partials, int num_partials, double eps,
                double* norm, bool reverse, Rounding rounding, Launch on) {
  int64_t moved = 0;
  with_format(static_cast<DType>(b.dtype), rounding, [&](auto format) {
    using T = decltype(format);
    for_launches<PlainSizes>(
        Members<Group>{b.tensors, b.num_tensors, options}, on, static_cast<int>(sizeof(typename T::Bits)),
        {b.weights, b.along}, true, reverse, [&](int64_t i) { return b.along[i] != 0; },
        [&](const auto& arguments, const std::vector<int64_t>& launched) {
          const auto kernel = perturb_kernel<T, std::decay_t<decltype(arguments)>>;
          launch("perturb", kernel, blocks_for(kernel, arguments.num_tiles()), kThreads, on.stream, arguments, partials,
                 num_partials, eps, norm, static_cast<char*>(b.backup), reverse, rounding.key);
          for (const int64_t i : launched) b.saved[i] = b.weights[i];
          moved += static_cast<int64_t>(launched.size());
        });
  });
  return moved;
}

}  // namespace sam::cuda
