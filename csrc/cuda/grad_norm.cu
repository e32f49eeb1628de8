// grad_norm: the squared norm ||T g||^2 of a bucket, as one float64 partial sum per block.
#include "../sam_math.h"
#include "format.h"
#include "plan.h"
#include "reduce.h"

namespace sam::cuda {
namespace {

// Sums of squares within these bounds have lost nothing to overflow or underflow in float32.
constexpr float kLeastTrusted = 1e-25f;
constexpr float kMostTrusted = 1e30f;

template <class V, bool Adaptive>
__device__ __forceinline__ V squared_term(V w, V g, V eta) {
  V term;
  if constexpr (Adaptive) term = norm_term_adaptive(w, g, eta);
  else term = norm_term(g);
  return term * term;
}

template <class T>
__device__ __forceinline__ double as_double(typename T::Bits bits) {
  return static_cast<double>(T::widen(bits));
}

// The squares of a thread's part of the elements from `begin` to `end`, whole units, every one in float64.
template <class T, bool Adaptive, class U>
__device__ __forceinline__ double sum_of_units(const Tile<kStates>& tile, int begin, int end, double eta) {
  using Bits = typename T::Bits;
  constexpr int kStride = kThreads * U::kSize;
  const Bits* w = reinterpret_cast<const Bits*>(tile.address[kWeights]);
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kAlong]);
  double sum = 0.0;
#pragma unroll 1
  for (int first = begin + static_cast<int>(threadIdx.x) * U::kSize; first < end;
       first += kUnitsPerBatch<U> * kStride) {
    U weights[kUnitsPerBatch<U>] = {},
      grads[kUnitsPerBatch<U>] = {};  // zero bits are zero in every format, and add nothing
#pragma unroll
    for (int k = 0; k < kUnitsPerBatch<U>; ++k) {
      const int i = first + k * kStride;
      if (i < end) grads[k] = load_unit<false, U>(g + i);
      if (Adaptive && i < end) weights[k] = load_unit<false, U>(w + i);
    }
#pragma unroll
    for (int k = 0; k < kUnitsPerBatch<U>; ++k)
#pragma unroll
      for (int j = 0; j < U::kSize; ++j)
        sum +=
            squared_term<double, Adaptive>(as_double<T>(weights[k].element[j]), as_double<T>(grads[k].element[j]), eta);
  }
  return sum;
}

// A thread's part of a full, aligned tile. Squares are summed pairwise in the arithmetic's type, then once in float64:
// a conversion to it for every element would make this kernel compute-bound where float64 units are few. That is at
// most six roundings of 2^-24 in a sum of squares, so under 2e-7 in the norm.
template <class T, bool Adaptive>
__device__ __forceinline__ double sum_of_full_tile(const Tile<kStates>& tile, double eta) {
  using Bits = typename T::Bits;
  using Compute = typename T::Compute;
  constexpr int kSize = Vector<Bits>::kSize;
  const Bits* w = reinterpret_cast<const Bits*>(tile.address[kWeights]) + threadIdx.x * kSize;
  const Bits* g = reinterpret_cast<const Bits*>(tile.address[kAlong]) + threadIdx.x * kSize;
  Vector<Bits> w_vectors[kVectorsPerThread], g_vectors[kVectorsPerThread];
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    g_vectors[k] = load_unit<false, Vector<Bits>>(g + k * kThreads * kSize);
    if constexpr (Adaptive) w_vectors[k] = load_unit<false, Vector<Bits>>(w + k * kThreads * kSize);
  }
  Compute sums[kVectorsPerThread];
  bool zero = true;
#pragma unroll
  for (int k = 0; k < kVectorsPerThread; ++k) {
    Compute squares[kSize];
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      Compute weight{};
      if constexpr (Adaptive) weight = T::widen(w_vectors[k].element[i]);
      const Compute grad = T::widen(g_vectors[k].element[i]);
      zero = zero && grad == Compute{};
      squares[i] = squared_term<Compute, Adaptive>(weight, grad, static_cast<Compute>(eta));
    }
#pragma unroll
    for (int half = kSize / 2; half > 0; half /= 2)
#pragma unroll
      for (int i = 0; i < half; ++i) squares[i] += squares[i + half];
    sums[k] = squares[0];
  }
#pragma unroll
  for (int half = kVectorsPerThread / 2; half > 0; half /= 2)
#pragma unroll
    for (int k = 0; k < half; ++k) sums[k] += sums[k + half];
  // A sum of zero is right if every gradient is zero: tensors that took no part in the loss are common, and not worth a
  // second look.
  const bool nothing = zero && sums[0] == Compute{};
  const bool trusted =
      sizeof(Compute) == sizeof(double) || nothing || (sums[0] >= kLeastTrusted && sums[0] <= kMostTrusted);
  return trusted ? static_cast<double>(sums[0])
                 : sum_of_units<T, Adaptive, Vector<Bits>>(tile, 0, static_cast<int>(tile.count), eta);
}

template <class T, bool Adaptive>
__device__ __forceinline__ double sum_of_squares(const Tile<kStates>& tile, double eta) {
  using Bits = typename T::Bits;
  const uint64_t addresses = tile.address[kAlong] | (Adaptive ? tile.address[kWeights] : 0);
  if (tile.full<Bits>() && addresses % kVectorBytes == 0) return sum_of_full_tile<T, Adaptive>(tile, eta);
  double sum = 0.0;
  in_widest_units<Bits>(addresses, static_cast<int>(tile.count), [&](auto unit, int begin, int end) {
    sum += sum_of_units<T, Adaptive, decltype(unit)>(tile, begin, end, eta);
  });
  return sum;
}

template <class T, class Arguments>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor)
    grad_norm_kernel(const __grid_constant__ Arguments arguments, double* __restrict__ partials, bool add) {
  double sum = 0.0;
  const uint32_t tiles = arguments.num_tiles();
  for (uint32_t index = blockIdx.x; index < tiles; index += gridDim.x) {
    const auto tile = arguments.tile(index, sizeof(typename T::Bits));
    const Group group = arguments.groups[tile.group];
    sum += group.adaptive != 0.0 ? sum_of_squares<T, true>(tile, group.eta) : sum_of_squares<T, false>(tile, 0.0);
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = add ? partials[blockIdx.x] + sum : sum;
}

template <class T>
void grad_norm_of(const Bucket& b, const Group* options, double* partials, int blocks, Launch on) {
  bool add = false;  // a further launch adds to what the one before it left
  for_launches<PlainSizes>(
      Members<Group>{b.tensors, b.num_tensors, options}, on, static_cast<int>(sizeof(typename T::Bits)),
      {b.weights, b.along}, true, false, [&](int64_t i) { return b.along[i] != 0; },
      [&](const auto& arguments, const std::vector<int64_t>&) {
        const auto kernel = grad_norm_kernel<T, std::decay_t<decltype(arguments)>>;
        launch("grad_norm", kernel, static_cast<unsigned>(blocks), kThreads, on.stream, arguments, partials, add);
        add = true;
      });
}

template <class T>
int blocks_of(const Bucket& b) {
  int64_t tiles = 0;
  for (int64_t i = 0; i < b.num_tensors; ++i)
    tiles += tiles_of(b.tensors[i].numel, static_cast<int>(sizeof(typename T::Bits)));
  return static_cast<int>(blocks_for(grad_norm_kernel<T, PlainSizes::Large>, tiles));
}

}  // namespace

int grad_norm_blocks(const Bucket& b) {
  return with_dtype(static_cast<DType>(b.dtype), [&](auto format) { return blocks_of<decltype(format)>(b); });
}

void grad_norm(const Bucket& b, const Group* options, double* partials, int blocks, Launch on) {
  with_dtype(static_cast<DType>(b.dtype),
             [&](auto format) { grad_norm_of<decltype(format)>(b, options, partials, blocks, on); });
}

}  // namespace sam::cuda
